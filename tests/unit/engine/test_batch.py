import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sllm_node.core.types import GenerationRequest, ModelId, SamplingParameters, SessionId
from sllm_node.engine.batch import Batch
from sllm_node.engine.blocks import Blocks
from sllm_node.engine.session import Session, SessionEvent, SessionState

BLOCK = 4


def make(number, prompt=6, max_tokens=8, priority=0, resumed=()):
    request = GenerationRequest(
        SessionId(f"s{number}"), ModelId("m"), tuple(range(prompt)), SamplingParameters(),
        max_tokens, resumed=resumed, priority=priority,
    )  # fmt: skip
    return Session(request, number)


def batch(blocks=16, max_sessions=8, budget=16):
    return Batch(Blocks(blocks, BLOCK), max_sessions, budget)


def step(made):
    """Carry one planned step out; every finished part gains a token."""
    plan = made.plan()
    last = [part.is_last for part in plan]
    made.stepped(plan)
    for part, is_last in zip(plan, last, strict=True):
        if is_last and part.session.state is not SessionState.ENDED:
            part.session.output.append(0)
    return plan


def test_decodes_come_before_prompts_and_prompts_are_cut_to_the_budget():
    made = batch(budget=8)
    first = make(1, prompt=6)
    made.add(first)
    step(made)
    made.add(make(2, prompt=20))
    assert [(p.session.number, p.count) for p in step(made)] == [(1, 1), (2, 7)]
    assert [(p.session.number, p.start, p.count) for p in step(made)] == [(1, 7, 1), (2, 7, 7)]


def test_higher_priority_is_admitted_first():
    made = batch(max_sessions=1)
    for session in (make(1), make(2, priority=5)):
        made.add(session)
    assert [part.session.number for part in made.plan()] == [2]


def test_nobody_overtakes_a_session_that_waits_for_blocks():
    made = batch(blocks=6)
    made.add(make(1, prompt=8))
    step(made)
    made.add(make(2, prompt=15))
    made.add(make(3, prompt=1))
    assert [part.session.number for part in step(made)] == [1]


def test_the_youngest_gives_way_when_blocks_run_out():
    made = batch(blocks=4)
    old, young = make(1, prompt=7, max_tokens=20), make(2, prompt=5, max_tokens=20)
    made.add(old)
    made.add(young)
    for _ in range(3):
        step(made)
    assert (old.state, young.state) == (SessionState.RUNNING, SessionState.WAITING)
    assert young.table == []
    assert made.preemptions == 1


def test_blocks_of_a_cancelled_session_stay_until_its_step_has_ended():
    made = batch()
    session = make(1)
    made.add(session)
    plan = made.plan()
    made.end(session)
    made.end(session)
    assert made.blocks.free < 16
    made.stepped(plan)
    assert made.blocks.free == 16


def test_no_stream_starves_when_a_step_has_room_for_fewer_tokens_than_sessions():
    made = batch(blocks=64, max_sessions=8, budget=3)
    for number in range(6):
        made.add(make(number, prompt=2, max_tokens=20))
    for _ in range(30):
        served = {part.session.number for part in step(made)}
        running = {s.number for s in made.sessions() if s.state is SessionState.RUNNING}
        assert served == running


def test_an_impossible_event_is_a_programmers_error():
    session = make(1)
    with pytest.raises(AssertionError, match="preempted in state waiting"):
        session.happen(SessionEvent.PREEMPTED)


def test_tokens_run_from_prompt_into_output():
    session = make(1, prompt=3, resumed=(90, 91))
    assert session.tokens(1, 3) == (1, 2, 90)
    assert session.tokens(3, 2) == (90, 91)
    assert session.tokens(0, 2) == (0, 1)


@settings(deadline=None, max_examples=60, derandomize=True)
@given(
    st.lists(st.tuples(st.integers(1, 20), st.integers(1, 12), st.integers(0, 2)), min_size=1, max_size=12),
    st.integers(8, 20),
    st.integers(1, 24),
    st.data(),
)  # fmt: skip
def test_every_session_ends_and_every_block_comes_back(wishes, blocks, budget, data):
    made = Batch(Blocks(blocks, BLOCK), 4, budget)
    sessions = [make(i, prompt, out, priority) for i, (prompt, out, priority) in enumerate(wishes)]
    for session in sessions:
        if session.length + session.request.max_tokens <= made.blocks.capacity_tokens:
            made.add(session)
    for _ in range(3000):
        if not (plan := step(made)):
            break
        assert sum(part.count for part in plan) <= budget
        tables = [block for s in made.sessions() for block in s.table]
        assert len(tables) == len(set(tables))
        assert len(tables) + made.blocks.free == blocks
        for session in {part.session.number: part.session for part in plan}.values():
            if (session.pending and len(session.output) >= session.request.max_tokens) or data.draw(
                st.integers(0, 30)
            ) == 0:
                made.end(session)
    assert made.sessions() == []
    assert made.blocks.free == blocks
    assert made.blocks.usage == 0.0
