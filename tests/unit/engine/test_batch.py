import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sllm_node.core.types import GenerationRequest, ModelId, SamplingParameters, SessionId
from sllm_node.engine.batch import Batch, becoming_due
from sllm_node.engine.blocks import Blocks
from sllm_node.engine.session import Session, SessionEvent, SessionState

BLOCK = 4


PLAIN = SamplingParameters()
PENALISED = SamplingParameters(presence_penalty=1.0)


def make(
    number, prompt=6, max_tokens=8, priority=0, resumed=(), like=None, salt="",
    sampling=PLAIN, resume=None,
):  # fmt: skip
    """Return a session; its tokens are its own, or those of the sessions that are `like` the same."""
    first = 1000 * (number if like is None else like)
    request = GenerationRequest(
        SessionId(f"s{number}"), ModelId("m"), tuple(range(first, first + prompt)),
        sampling, max_tokens, resumed=resumed, priority=priority, cache_salt=salt, resume=resume,
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


def test_beside_a_session_that_decodes_prompts_get_a_part_of_the_budget():
    made = Batch(Blocks(64, BLOCK), 8, 16, prefill_beside_tokens=3)
    made.add(make(1, prompt=20))
    assert [p.count for p in step(made)] == [16]
    made.add(make(2, prompt=5))
    made.add(make(3, prompt=9))
    assert [p.count for p in step(made)] == [4, 5, 7]
    assert [(p.session.number, p.count) for p in step(made)] == [(1, 1), (2, 1), (3, 2)]


@pytest.mark.parametrize(("decoding", "beside"), [(2, 7), (3, 9), (4, 12)])
def test_many_sessions_that_decode_take_more_of_prompts_beside_them(decoding, beside):
    made = Batch(Blocks(64, BLOCK), 8, 32, prefill_beside_tokens=7)
    for number in range(decoding):
        made.add(make(number, prompt=1))
    step(made)
    made.add(make(9, prompt=25))
    assert [part.count for part in step(made)] == [*[1] * decoding, beside]


def test_sessions_become_due_that_have_a_token_and_wait_for_one_more():
    made = batch(budget=16)
    for session in (make(1, max_tokens=1), make(2), make(3)):
        made.add(session)
    plan = made.plan()  # 1 has its last token, 3 has not all of its prompt
    assert [part.is_last for part in plan] == [True, True, False]
    assert becoming_due(plan) == 1
    made.end(plan[1].session)
    assert becoming_due(plan) == 0


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
    session = make(0, prompt=3, resumed=(90, 91))
    assert session.tokens(1, 3) == (1, 2, 90)
    assert session.tokens(3, 2) == (90, 91)
    assert session.tokens(0, 2) == (0, 1)


# --- planned ahead --------------------------------------------------------------------------------


def taken(made, plan):
    """End the oldest step; every finished part gains a token."""
    made.stepped(plan)
    for part in plan:
        if part.is_last and part.session.state is not SessionState.ENDED:
            part.session.output.append(0)


def test_a_step_is_planned_with_a_token_that_is_still_coming():
    made = batch()
    session = make(1, prompt=6)
    made.add(session)
    first = made.plan()
    second = made.plan()
    assert [(p.start, p.count, p.is_last, p.is_ahead) for p in first] == [(0, 6, True, False)]
    assert [(p.start, p.count, p.is_last, p.is_ahead) for p in second] == [(6, 1, True, True)]
    taken(made, first)
    taken(made, second)
    assert (session.computed, session.length, session.coming) == (7, 8, 0)


def test_pieces_of_a_prompt_follow_each_other_ahead():
    made = batch(budget=4)
    made.add(make(1, prompt=6))
    plans = [made.plan(), made.plan()]
    assert [(p.start, p.count, p.is_last) for plan in plans for p in plan] == [
        (0, 4, False), (4, 2, True),
    ]  # fmt: skip


def test_nothing_is_planned_behind_the_last_token_that_a_session_may_have():
    made = batch()
    made.add(make(1, prompt=6, max_tokens=1))
    assert made.plan()
    assert made.plan() == []


def test_a_session_with_penalties_joins_when_its_last_token_is_known():
    made = batch()
    for number in (1, 2, 3):
        made.add(make(number, sampling=PENALISED if number == 1 else PLAIN))
    plans = [made.plan(), made.plan()]
    for _ in range(4):
        taken(made, plans[-2])
        plans.append(made.plan())
    numbers = [[part.session.number for part in plan] for plan in plans]
    assert numbers == [[1, 2, 3], [2, 3]] * 3


def test_all_wait_where_half_of_the_sessions_would_sit_a_step_out():
    made = batch()
    made.add(make(1, sampling=PENALISED))
    first = made.plan()
    made.add(make(2, sampling=PENALISED))
    made.add(make(3))
    assert made.plan() == []
    taken(made, first)
    second = made.plan()
    assert [part.session.number for part in second] == [1, 2, 3]
    assert made.plan() == []
    made.end(second[1].session)
    assert made.plan() == []
    taken(made, second)
    assert [part.session.number for part in made.plan()] == [1, 3]


def test_as_many_sessions_run_as_a_step_has_tokens():
    made = batch(blocks=64, budget=3)
    for number in range(6):
        made.add(make(number, prompt=1, sampling=PLAIN if number else PENALISED))
    assert [len(made.plan()), len(made.plan()), made.waiting] == [3, 2, 3]


def test_nobody_is_preempted_and_nobody_else_goes_on_while_a_step_is_under_way():
    made = batch(blocks=4)
    old, young = make(1, prompt=7, max_tokens=20), make(2, prompt=7, max_tokens=20)
    for session in (old, young):
        made.add(session)
    first = made.plan()
    second = made.plan()
    taken(made, first)
    assert made.plan() == []  # both need a block, and there is none
    assert made.preemptions == 0
    taken(made, second)
    assert [part.session for part in made.plan()] == [old]
    assert made.preemptions == 1


def test_a_token_too_many_leaves_no_block_behind():
    made = batch()
    session = make(1, prompt=7)
    made.add(session)
    first = made.plan()
    second = made.plan()
    made.end(session)
    made.stepped(first)
    assert made.blocks.cached == 0
    made.stepped(second)
    assert (made.blocks.cached, made.blocks.free) == (1, 16)  # not the one that the token fills


# --- what is found cached -------------------------------------------------------------------------


def ran(made, session, steps=50):
    """Add a session and step until it has all its tokens; return where each of its parts began."""
    made.add(session)
    starts = []
    for _ in range(steps):
        starts += [part.start for part in step(made) if part.session is session]
        if len(session.output) >= session.request.max_tokens:
            made.end(session)
            return starts
    raise AssertionError("it did not end")


def test_a_session_begins_behind_the_blocks_that_it_finds():
    made = batch()
    ran(made, make(1, prompt=10, max_tokens=1, like=7))
    later = make(2, prompt=14, max_tokens=1, like=7)
    assert ran(made, later) == [8]
    assert (later.found, later.cached_tokens) == (8, 8)
    assert (made.asked_tokens, made.found_tokens) == (24, 8)


def test_the_last_token_is_computed_even_if_all_of_them_are_cached():
    made = batch()
    ran(made, make(1, prompt=8, max_tokens=1, like=7))
    assert ran(made, make(2, prompt=8, max_tokens=1, like=7)) == [4]


def test_a_second_turn_finds_the_answer_of_the_first():
    made = batch()
    first = make(1, prompt=6, max_tokens=7)
    ran(made, first)
    second = make(2, prompt=6, like=1, resumed=(*first.output, 5, 5), max_tokens=12)
    assert ran(made, second)[0] == 12
    assert second.cached_tokens == 6


# --- output tokens that are known ------------------------------------------------------------------


def parts(made, session, steps):
    """Step and return what each step computed of `session`: (first token, tokens)."""
    plans = [step(made) for _ in range(steps)]
    return [(p.start, p.count) for plan in plans for p in plan if p.session is session]


def test_what_is_resumed_fast_is_one_prompt():
    made = batch()
    session = make(1, prompt=6, resumed=(7, 8, 9))
    made.add(session)
    assert parts(made, session, 2) == [(0, 9), (9, 1)]
    assert session.output == [7, 8, 9, 0, 0]


def test_what_is_replayed_goes_one_token_a_step_and_draws_after_the_last():
    made = batch()
    session = make(1, prompt=6, resumed=(7, 8, 9), resume="replay")
    made.add(session)
    assert parts(made, session, 4) == [(0, 6), (6, 1), (7, 1), (8, 1)]
    assert session.output == [7, 8, 9, 0]


def test_what_is_replayed_steps_with_those_that_decode_and_before_prompts():
    made = batch(budget=8)
    first, replayed = make(1, max_tokens=20), make(2, prompt=4, resumed=(5, 5, 5), resume="replay")
    made.add(first)
    step(made)
    made.add(replayed)
    step(made)
    made.add(make(3, prompt=12))
    plan = step(made)
    assert [(part.session.number, part.count) for part in plan] == [(1, 1), (2, 1), (3, 6)]


def test_a_preempted_session_replays_what_is_not_cached_any_more():
    made = Batch(Blocks(16, BLOCK, is_caching=False), 8, 16)
    session = make(1, prompt=5, max_tokens=12, resume="replay")
    made.add(session)
    parts(made, session, 4)
    made._preempt(session)
    assert parts(made, session, 4) == [(0, 5), (5, 1), (6, 1), (7, 1)]


def test_a_preempted_session_finds_what_its_own_decode_steps_computed():
    made = batch()
    session = make(1, prompt=5, max_tokens=12, resume="replay")
    made.add(session)
    parts(made, session, 9)
    made._preempt(session)
    assert parts(made, session, 2) == [(12, 1), (13, 1)]


@pytest.mark.parametrize(("other", "starts"), [("fast", [4, 6, 7, 8]), ("replay", [8])])
def test_output_is_taken_from_the_cache_only_if_decode_steps_computed_it(other, starts):
    made = batch()
    known = (7, 8, 9)
    ran(made, make(1, prompt=6, max_tokens=4, like=7, resumed=known, resume=other))
    resumed = make(2, prompt=6, max_tokens=4, like=7, resumed=known, resume="replay")
    assert ran(made, resumed) == starts


def test_a_prompt_is_taken_as_cached_and_decode_steps_behind_another_prompt_are_no_replay():
    made = batch()
    ran(made, make(1, prompt=6, max_tokens=4, like=7, resumed=(7, 8, 9), resume="replay"))
    prompt = (*range(7000, 7006), 7, 8)
    request = GenerationRequest(
        SessionId("s"), ModelId("m"), prompt, SamplingParameters(), 4, resumed=(9, 5, 5),
        resume="replay",
    )  # fmt: skip
    assert ran(made, Session(request, 2)) == [8, 9, 10]
    longer = make(3, prompt=5, max_tokens=5, like=7, resumed=(7005, 7, 8, 9), resume="replay")
    assert ran(made, longer) == [4, 5, 6, 7, 8]


def test_what_is_replayed_is_not_exchanged_for_what_a_prefill_computed():
    made = batch()
    first = make(1, prompt=6, max_tokens=5, like=7, resumed=(7, 8, 9), resume="replay")
    second = make(2, prompt=6, max_tokens=5, like=7, resumed=(7, 8, 9))
    made.add(first)
    made.add(second)
    step(made)
    own = first.table[1]
    for _ in range(3):
        step(made)
    assert first.table[0] == second.table[0]
    assert first.table[1] == own != second.table[1]


def test_sessions_with_other_salts_find_nothing():
    made = batch()
    ran(made, make(1, prompt=10, like=7, salt="a"))
    assert ran(made, make(2, prompt=10, like=7, salt="b"))[0] == 0
    assert ran(made, make(3, prompt=10, like=7))[0] == 0
    assert ran(made, make(4, prompt=10, like=7, salt="a"))[0] == 8


def test_nothing_is_found_without_the_cache():
    made = Batch(Blocks(16, BLOCK, is_caching=False), 8, 16)
    ran(made, make(1, prompt=10, like=7))
    assert ran(made, make(2, prompt=10, like=7))[0] == 0
    assert made.blocks.cached == 0


def test_sessions_of_one_step_compute_what_they_share_each_and_share_it_afterwards():
    made = batch(budget=32)
    twins = [make(number, prompt=10, like=7) for number in (1, 2)]
    for session in twins:
        made.add(session)
    assert [part.start for part in step(made)] == [0, 0]
    first, second = (session.table for session in twins)
    assert first[:2] == second[:2]
    assert first[2] != second[2]
    assert made.blocks.free == 16 - 4


def test_a_block_is_not_found_while_the_step_that_fills_it_is_under_way():
    made = batch(budget=64)
    made.add(make(1, prompt=10, like=7))
    plan = made.plan()
    late = make(2, prompt=10, like=7)
    assert made.blocks.find(late.key(index, BLOCK) for index in range(2)) == []
    made.stepped(plan)
    assert len(made.blocks.find(late.key(index, BLOCK) for index in range(2))) == 2


def test_nothing_that_a_failed_step_wrote_is_found():
    made = batch()
    session = make(1, prompt=10, like=7)
    made.add(session)
    made.failed(made.plan())
    made.end(session)
    assert (made.blocks.cached, made.blocks.free) == (0, 16)


def test_a_preempted_session_comes_back_behind_its_own_blocks():
    made = batch(blocks=6)
    old, young = make(1, prompt=7, max_tokens=20), make(2, prompt=9, max_tokens=9)
    made.add(old)
    made.add(young)
    while young.state is not SessionState.WAITING or not made.preemptions:
        step(made)
    made.end(old)
    starts = [part.start for part in step(made) if part.session is young]
    assert starts == [12]  # all but the block that was not full
    assert young.found == 0


# --- properties -----------------------------------------------------------------------------------

LIKES = st.integers(0, 2)


def check_blocks(made, blocks):
    """Every block is blank, cached or held, and held by as many sessions as have it."""
    inner = made.blocks
    tables = [session.table for session in made.sessions()]
    holders = [sum(table.count(block) for table in tables) for block in range(blocks)]
    assert inner._holders == holders
    held = {block for block in range(blocks) if holders[block]}
    blank, cached = set(inner._blank), set(inner._cached)
    assert len(blank) + len(cached) + len(held) == blocks == len(blank | cached | held)
    assert inner.free == len(blank) + len(cached)
    assert {inner._keys[b] for b in range(blocks)} - {None} == set(inner._known)
    assert all(inner._keys[block] == key for key, block in inner._known.items())
    for session in made.sessions():
        full, table = session.computed // BLOCK, session.table
        # Nobody writes where somebody else reads, and who is found leads on from who is found.
        assert all(holders[block] == 1 and inner._keys[block] is None for block in table[full:])
        known = [inner._keys[block] for block in table[:full]]
        assert known == [session.key(index, BLOCK) for index in range(full)]


@settings(deadline=None, max_examples=100, derandomize=True)
@given(
    st.lists(
        st.tuples(st.integers(1, 20), st.integers(1, 12), st.integers(0, 2), LIKES),
        min_size=1, max_size=14,
    ),
    st.integers(8, 20),
    st.integers(1, 24),
    st.data(),
)  # fmt: skip
def test_every_session_ends_and_every_block_comes_back(wishes, blocks, budget, data):
    made = Batch(Blocks(blocks, BLOCK), 4, budget)
    sessions = [
        make(i, prompt, out, priority, like=like)
        for i, (prompt, out, priority, like) in enumerate(wishes)
    ]
    for session in sessions:
        if session.length + session.request.max_tokens <= made.blocks.capacity_tokens:
            made.add(session)
    for _ in range(3000):
        if not (plan := step(made)):
            break
        assert sum(part.count for part in plan) <= budget
        assert all(part.count >= 1 for part in plan)
        check_blocks(made, blocks)
        for session in {part.session.number: part.session for part in plan}.values():
            if (session.pending and len(session.output) >= session.request.max_tokens) or data.draw(
                st.integers(0, 30)
            ) == 0:
                made.end(session)
        check_blocks(made, blocks)
    assert made.sessions() == []
    assert made.blocks.free == blocks
    assert made.blocks.usage == 0.0
