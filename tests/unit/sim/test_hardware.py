from dataclasses import replace

from sllm_node.core.types import ModelId
from sllm_node.sim.hardware import Model, Session, Tier

MODEL = Model(0, ModelId("m-0"), 10, 7, 12, 1, 2, 0.01, 0.1, 0.5)


def test_a_tier_gives_up_what_was_used_longest_ago():
    tier = Tier(20)
    a, b, c = (replace(MODEL, number=i) for i in range(3))
    assert tier.add(a) == []
    assert tier.add(b) == []
    tier.touch(a)
    assert tier.add(c) == [b]
    assert tier.free == 6


def test_a_tier_keeps_what_must_stay_and_refuses_what_does_not_fit():
    tier = Tier(7)
    other = replace(MODEL, number=1)
    tier.add(MODEL)
    assert tier.add(other, frozenset({0})) is None
    assert tier.has(MODEL)


def test_a_session_puts_out_tokens_at_its_pace_and_no_more_than_it_has():
    session = Session(0, MODEL, 0.0, 10, 4, done=1, decode_from=2.0)
    assert [session.out_at(t) for t in (1.0, 2.0, 2.6, 99.0)] == [1, 2, 3, 4]
