"""A batch in any order of events, beside a model of what KV memory holds."""

from typing import ClassVar

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from sllm_node.engine.batch import Batch
from sllm_node.engine.blocks import Blocks
from sllm_node.engine.session import SessionState
from tests.unit.engine.test_batch import BLOCK, LIKES, make


class BatchMachine(RuleBasedStateMachine):
    """Sessions come, step, end and are cancelled in any order; memory holds what is said of it.

    `memory` is what the KV cache would hold: for each slot the salt and the tokens up to its own.
    """

    BLOCKS = 9
    WINDOW: ClassVar[int | None] = None

    def __init__(self):
        super().__init__()
        self.batch = Batch(Blocks(self.BLOCKS, BLOCK), 3, 11, self.WINDOW)
        self.memory = {}
        self.plan, self.frozen = [], {}
        self.number = 0

    @rule(prompt=st.integers(1, 17), out=st.integers(1, 9), like=LIKES, salt=st.sampled_from("ab"))
    def come(self, prompt, out, like, salt):
        self.number += 1
        self.batch.add(make(self.number, prompt, out, like=like, salt=salt))

    @precondition(lambda self: not self.plan)
    @rule()
    def begin_step(self):
        self.plan = self.batch.plan()
        self.frozen = {part.session.number: list(part.session.table) for part in self.plan}
        written = [self.slot(part.session, at) for part in self.plan for at in self.reach(part)]
        assert len(written) == len(set(written))
        for part in self.plan:
            for at in self.reach(part):
                self.memory[self.slot(part.session, at)] = self.past(part.session, at)

    @precondition(lambda self: self.plan)
    @rule()
    def end_step(self):
        for part in self.plan:
            assert part.session.table == self.frozen[part.session.number]
            first = 0 if self.WINDOW is None else max(0, part.start + 1 - self.WINDOW)
            for at in range(first, part.start + part.count):
                assert self.memory[self.slot(part.session, at)] == self.past(part.session, at)
        last = [part.is_last for part in self.plan]
        self.batch.stepped(self.plan)
        for part, is_last in zip(self.plan, last, strict=True):
            session = part.session
            if is_last and session.state is not SessionState.ENDED:
                session.output.append(session.length)
                if len(session.output) >= session.request.max_tokens:
                    self.batch.end(session)
        self.plan, self.frozen = [], {}

    @precondition(lambda self: self.plan)
    @rule()
    def fail_step(self):
        for part in self.plan:
            for at in self.reach(part):
                self.memory[self.slot(part.session, at)] = "garbage"
        self.batch.failed(self.plan)
        for part in self.plan:
            self.batch.end(part.session)
        self.plan, self.frozen = [], {}

    @precondition(lambda self: self.batch.sessions())
    @rule(data=st.data())
    def cancel(self, data):
        self.batch.end(data.draw(st.sampled_from(self.batch.sessions())))

    @invariant()
    def every_block_is_blank_cached_or_held(self):
        inner, tables = self.batch.blocks, [*self.frozen.values()]
        tables += [s.table for s in self.batch.sessions() if s.number not in self.frozen]
        held = [sum(table.count(block) for table in tables) for block in range(self.BLOCKS)]
        assert inner._holders == held
        assert sum(map(bool, held)) + len(inner._blank) + len(inner._cached) == self.BLOCKS
        assert not set(inner._blank) & set(inner._cached)

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
        if self.plan:
            self.end_step()
        while self.batch.sessions():
            self.begin_step()
            assert self.plan, "somebody waits for ever"
            self.end_step()
        assert self.batch.blocks.free == self.BLOCKS

    def slot(self, session, at):
        return session.table[at // BLOCK - session.passed_blocks] * BLOCK + at % BLOCK

    def past(self, session, at):
        return session.request.cache_salt, session.tokens(0, at + 1)

    def reach(self, part):
        return range(part.start, part.start + part.count)


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
TestBatchMachine.settings = TestWindowMachine.settings = settings(
    deadline=None, max_examples=60, stateful_step_count=40, derandomize=True
)
