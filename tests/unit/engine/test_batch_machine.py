"""A batch in any order of events, beside a model of what KV memory holds."""

from collections import deque
from dataclasses import dataclass
from typing import Any, ClassVar

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from sllm_node.engine.batch import Batch
from sllm_node.engine.blocks import Blocks
from sllm_node.engine.offload import Offload, Room
from sllm_node.engine.session import SessionState
from tests.unit.engine.test_batch import BLOCK, LIKES, PENALISED, PLAIN, make

SAMPLINGS = st.sampled_from([PLAIN, PENALISED])


@dataclass
class Step:
    """A planned step, with the tables that it was launched with."""

    plan: list[Any]
    tables: list[tuple[list[int], int]]
    has_run: bool = False
    back: tuple[Any, ...] = ()
    """Copies from the pool that run right before it."""


class BatchMachine(RuleBasedStateMachine):
    """Sessions come, step, end and are cancelled in any order; memory holds what is said of it.

    `memory` is what the KV cache would hold: for each slot the salt and the tokens up to its own.
    Two steps are under way at most. The device runs them in order, at any time before they end.
    """

    BLOCKS = 7
    WINDOW: ClassVar[int | None] = None

    def __init__(self):
        super().__init__()
        self.batch = Batch(Blocks(self.BLOCKS, BLOCK), 3, 11, self.WINDOW)
        self.memory = {}
        self.decoded = {}
        """For each slot, whether a step wrote it by itself."""
        self.flight = deque()
        self.came = []

    @rule(
        prompt=st.integers(1, 17), out=st.integers(1, 9), like=LIKES, salt=st.sampled_from("ab"),
        resumed=st.integers(0, 8), resume=st.sampled_from(("fast", "replay")), sampling=SAMPLINGS,
    )  # fmt: skip
    def come(self, prompt, out, like, salt, resumed, resume, sampling):
        known = tuple(range(prompt, prompt + min(resumed, out - 1)))
        more = {"like": like, "salt": salt, "resumed": known, "resume": resume}
        self.came.append(make(len(self.came) + 1, prompt, out, sampling=sampling, **more))
        self.batch.add(self.came[-1])

    @precondition(lambda self: len(self.flight) < 2)
    @rule()
    def begin(self):
        self.begin_step()

    def begin_step(self):
        self.end_copies()
        plan = self.batch.plan()
        tables = [(list(part.session.table), part.session.passed_blocks) for part in plan]
        if not plan:
            return False
        rows = (
            [part.session for part in self.flight[-1].plan if part.is_last] if self.flight else []
        )
        for part in plan:
            session, end = part.session, part.start + part.count
            assert session.state is SessionState.RUNNING
            assert end < len(session.request.prompt) + session.request.max_tokens
            assert part.is_ahead == (part.start == session.length)
            if part.is_ahead:
                assert part.count == rows.count(session) == 1
                assert session.request.sampling is not PENALISED
            else:
                assert len(session.tokens(part.start, part.count)) == part.count
        self.flight.append(Step(plan, tables, back=self.begin_copies()))
        return True

    def begin_copies(self):
        """Launch what the plan needs; return the copies that run with the step."""
        return ()

    def end_copies(self):
        """End the job that launched copies."""

    def bring_back(self, step):
        """Run the copies from the pool."""

    @precondition(lambda self: not all(step.has_run for step in self.flight))
    @rule()
    def run_step(self):
        step = next(step for step in self.flight if not step.has_run)
        step.has_run = True
        self.bring_back(step)
        written = [slot for slot, _, _ in self.writes(step)]
        assert len(written) == len(set(written))
        for slot, session, at in self.writes(step):
            self.memory[slot] = self.past(session, at)
        for part, (table, passed) in zip(step.plan, step.tables, strict=True):
            for at in range(part.start, part.start + part.count):
                self.decoded[slot_of(table, passed, at)] = part.count == 1
        for part, (table, passed) in zip(step.plan, step.tables, strict=True):
            first = 0 if self.WINDOW is None else max(0, part.start + 1 - self.WINDOW)
            for at in range(first, part.start + part.count):
                assert self.memory[slot_of(table, passed, at)] == self.past(part.session, at)
                if part.session.is_replayed and at >= len(part.session.request.prompt):
                    assert self.decoded[slot_of(table, passed, at)]

    @precondition(lambda self: self.flight)
    @rule(surprise=st.integers(0, 9), is_number=st.booleans())
    def end_step(self, surprise=9, is_number=True):
        """End the oldest; the session of part `surprise` ends with its token, or without one."""
        self.end_copies()
        if not self.flight[0].has_run:
            self.run_step()
        step = self.flight.popleft()
        self.batch.stepped(step.plan)
        for place, part in enumerate(step.plan):
            session = part.session
            if not part.is_last or session.state is SessionState.ENDED:
                continue
            if place == surprise and not is_number:
                self.batch.forget()
                self.batch.end(session)
                continue
            session.output.append(session.length)
            if place == surprise or len(session.output) >= session.request.max_tokens:
                self.batch.end(session)

    @precondition(lambda self: self.batch.sessions())
    @rule(count=st.integers(2, 9))
    def go_on(self, count):
        """Step ahead for a while, as an engine does."""
        for _ in range(count):
            while len(self.flight) < 2 and self.begin_step():
                pass
            if self.flight:
                self.end_step()

    @precondition(lambda self: self.flight)
    @rule()
    def fail_steps(self):
        for step in self.flight:
            for slot, _, _ in self.writes(step):
                self.memory[slot] = "garbage"
        for step in self.flight:
            self.batch.failed(step.plan)
        for step in self.flight:
            for part in step.plan:
                self.batch.end(part.session)
        self.flight.clear()

    @precondition(lambda self: self.batch.sessions())
    @rule(data=st.data())
    def cancel(self, data):
        self.batch.end(data.draw(st.sampled_from(self.batch.sessions())))

    @invariant()
    def every_block_is_blank_cached_or_held(self):
        inner = self.batch.blocks
        at_work = {part.session for step in self.flight for part in step.plan}
        tables = [session.table for session in at_work.union(self.batch.sessions())]
        held = [sum(table.count(block) for table in tables) for block in range(self.BLOCKS)]
        assert inner._holders == held
        assert sum(map(bool, held)) + len(inner._blank) + len(inner._cached) == self.BLOCKS
        assert not set(inner._blank) & set(inner._cached)

    @invariant()
    def sessions_count_their_steps(self):
        parts = [part for step in self.flight for part in step.plan]
        for session in self.came:
            own = [part for part in parts if part.session is session]
            assert session.in_flight == len(own)
            assert session.coming == sum(part.is_last for part in own)
            if session.state is SessionState.RUNNING:
                assert session.planned == session.computed + sum(part.count for part in own)

    @invariant()
    def only_what_is_part_of_a_session_is_known(self):
        known = set(self.batch.blocks._known)
        for session in self.came:
            known -= {session.key(index, BLOCK) for index in range(session.length // BLOCK)}
        assert not known

    @invariant()
    def cached_blocks_lose_ends_before_beginnings(self):
        inner = self.batch.blocks
        order = {inner._keys[block]: place for place, block in enumerate(inner._cached)}
        for session in self.batch.sessions():
            keys = [session.key(i, BLOCK) for i in range(session.length // BLOCK)]
            known = [key in inner._known for key in keys]
            if self.WINDOW is not None:
                continue
            assert known == sorted(known, reverse=True)
            places = [order[key] for key in keys if key in order]
            assert places == sorted(places, reverse=True)

    @invariant()
    def what_is_known_is_what_memory_holds(self):
        inner = self.batch.blocks
        for session in self.batch.sessions():
            for index in range(session.length // BLOCK):
                block = inner._known.get(session.key(index, BLOCK))
                if block is not None:
                    at = (index + 1) * BLOCK - 1
                    assert self.memory[block * BLOCK + BLOCK - 1] == self.past(session, at)

    def teardown(self):
        while self.flight:
            self.end_step()
        while self.batch.sessions():
            self.begin_step()
            assert self.flight, "somebody waits for ever"
            self.end_step()
        assert self.batch.blocks.free == self.BLOCKS

    def past(self, session, at):
        """Return what the token at a place follows from; the output counts its places."""
        prompt = session.request.prompt
        return session.request.cache_salt, (*prompt, *range(len(prompt), at + 1))[: at + 1]

    def writes(self, step):
        for part, (table, passed) in zip(step.plan, step.tables, strict=True):
            for at in range(part.start, part.start + part.count):
                yield slot_of(table, passed, at), part.session, at


class HostMemory:
    """Chunks of two blocks; what lies in a block is what KV memory held of it."""

    chunk_bytes = 2 * BLOCK

    def __init__(self):
        self.loans = []

    def lend(self, count):
        self.loans.append(FakeLoan(count))
        return self.loans[-1]


class FakeLoan:
    def __init__(self, count):
        self.views = (memoryview(b""),) * count
        self.blocks = {}
        self.is_closed = False

    def close(self):
        assert not self.is_closed
        self.is_closed = True
        self.blocks.clear()


class OffloadMachine(BatchMachine):
    """The same where preempted sessions' blocks go to the pool, and come back."""

    def __init__(self):
        super().__init__()
        self.host = HostMemory()
        self.room = Room(self.host, 5 * HostMemory.chunk_bytes)
        self.offload = Offload(self.room, BLOCK)
        blocks = Blocks(self.BLOCKS, BLOCK)
        self.batch = Batch(blocks, 3, 11, self.WINDOW)
        self.batch.offload = self.offload
        self.job: list[Any] = []
        self.is_failing = False
        """The next copies to the pool fail."""

    def begin_copies(self):
        self.job = self.offload.take()
        if any(not one.is_back for one in self.job):
            assert not self.flight, "blocks are copied while a step may write to them"
        for one in self.job:
            loan: Any = one.loan
            assert not loan._loan.is_closed
            if not one.is_back and not self.loses(self.job):
                loan._loan.blocks = dict(enumerate(map(self.content, one.blocks)))
        return tuple(one for one in self.job if one.is_back)

    def content(self, block):
        slots = range(block * BLOCK, (block + 1) * BLOCK)
        return [(self.memory.get(slot), self.decoded.get(slot)) for slot in slots]

    def bring_back(self, step):
        for one in step.back:
            assert not one.loan._loan.is_closed
            for place, block in enumerate(one.blocks, one.first):
                for offset, held in enumerate(one.loan._loan.blocks[place]):
                    self.memory[block * BLOCK + offset], self.decoded[block * BLOCK + offset] = held

    def end_copies(self):
        job, self.job = self.job, []
        if self.loses(job):
            self.offload.lost([one for one in job if not one.is_back])
            job, self.is_failing = [one for one in job if one.is_back], False
        self.offload.carried_out(job, None)

    def loses(self, job):
        """Tell whether copies of `job` to the pool fail; what comes back of them would take the step along."""
        out, back = ({id(o.loan) for o in job if o.is_back is way} for way in (False, True))
        return self.is_failing and bool(out) and not out & back

    @rule()
    def let_copies_fail(self):
        self.is_failing = True

    @precondition(lambda self: self.flight)
    @rule()
    def fail_steps(self):
        self.job = []  # what it launched has ended, however
        super().fail_steps()

    @invariant()
    def loans_are_of_sessions_that_have_not_ended_or_are_worked_on(self):
        wanted = {s.number for s in self.batch.sessions()}
        at_work = {part.session.number for step in self.flight for part in step.plan}
        at_work |= {n for n in self.offload._aside if self.job}
        assert set(self.offload._aside) <= wanted | at_work

    @invariant()
    def the_room_counts_what_is_lent(self):
        lent = [loan for loan in self.host.loans if not loan.is_closed]
        assert self.room.lent == sum(len(loan.views) for loan in lent) <= 5
        assert len(lent) == self.offload.kept

    def teardown(self):
        super().teardown()
        assert not self.room.lent


class WindowedOffloadMachine(OffloadMachine):
    """Both."""

    WINDOW: ClassVar[int | None] = 6


def slot_of(table, passed, at):
    return table[at // BLOCK - passed] * BLOCK + at % BLOCK


class WindowMachine(BatchMachine):
    """The same where a token is looked at by the next five."""

    WINDOW: ClassVar[int | None] = 6

    @invariant()
    def nobody_keeps_what_the_window_has_passed(self):
        for session in self.batch.sessions():
            if session.state is SessionState.RUNNING and not session.in_flight:
                assert (session.passed_blocks + 1) * BLOCK > session.computed + 1 - 6


TestBatchMachine = BatchMachine.TestCase
TestWindowMachine = WindowMachine.TestCase
TestOffloadMachine = OffloadMachine.TestCase
TestWindowedOffloadMachine = WindowedOffloadMachine.TestCase
_SETTINGS = settings(deadline=None, max_examples=60, stateful_step_count=40, derandomize=True)
TestBatchMachine.settings = TestWindowMachine.settings = _SETTINGS
TestOffloadMachine.settings = TestWindowedOffloadMachine.settings = _SETTINGS
