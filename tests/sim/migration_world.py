"""Explores every state that one session, its nodes and their connections can get into, around the real `Arbiter`.

What is real here is the machine that decides (`cluster/arbiter.py`); what `RoutedStream`, `Move` and `Part` do for
it is written down in a few lines each, in any order that their tasks may run in: a part's records come in order
and as late as they like, that it broke is heard behind them, a round and its answer take their time, and between
any two of these a move may be asked for, a node fall silent, or the reader go away.

A connection may break with the records on it or without them; silence is a node that is given up while it is
there and goes on. Of a part that was given up anything may still come, at any time: so in each state everything
is offered to the arbiter that any such part could say, and nothing may come of it. The same with tokens of the
owner that begin elsewhere than where the session stands, which lose it its part.

Each step leads forward (the states have no circle), so a run is finite; each state in which nothing is bound to
happen must be an end. So every run ends, in whatever order things happen, once nothing goes wrong any more.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from sllm_node.cluster.arbiter import (
    TRANSITIONS,
    Accept,
    Action,
    Approach,
    Arbiter,
    Close,
    EntryEvent,
    EntryState,
    Extend,
    Open,
)
from sllm_node.core.errors import MessageFormatError


@dataclass(frozen=True)
class Setting:
    """What is explored."""

    tokens: int = 3
    """That the session has in the end."""
    moves: int = 1
    """Times that somebody wants it moved, each at any time: an operator, a drain, another model."""
    losses: int = 0
    """Connections and answers that break, nodes that fall silent, destinations that are given up."""
    stops: int = 0
    """Times that its reader goes away, or no node is found for it."""
    chunk: int = 1
    """Tokens that come at once, at most."""
    in_flight: int = 2
    """Records of a part that are on their way at once."""
    rounds: int = 1
    is_near: tuple[bool, ...] = (True, False)
    """What the pace may say."""


class Record(NamedTuple):
    """What a node says: tokens, or how many it has computed while it holds."""

    start: int
    length: int = 0
    is_last: bool = False
    is_standing: bool = False


class Part(NamedTuple):
    """One that the entry has not closed."""

    epoch: int
    is_held: bool
    have: int
    """Tokens that its node knows: given, or its own."""
    told: int = -1
    """As its last standing."""
    is_done: bool = False
    """Its last record is on its way."""
    is_cut: bool = False
    """Nothing more comes, and the entry hears of that behind the records."""
    records: tuple[Record, ...] = ()


class Sending(NamedTuple):
    """Tokens on their way to a destination."""

    epoch: int
    start: int
    end: int
    lets_go: bool
    answer: bool | None = None


class State(NamedTuple):
    """Of the world."""

    arbiter: tuple[Any, ...]
    parts: tuple[Part, ...]
    sending: Sending | None
    shown: int
    """Tokens that the reader has."""
    shown_of: int
    """The epoch that gave the last of them."""
    opened: int
    """The epoch that was opened last."""
    moves: int
    losses: int
    stops: int


@dataclass
class Found:
    """What an exploration found."""

    states: int = 0
    steps: int = 0
    ends: dict[str, int] = field(default_factory=dict)
    stuck: list[State] = field(default_factory=list)
    """Nothing is bound to happen, and it has not ended."""
    circle: int = 0
    """States that lie on a circle, or behind one."""


class World:
    """The states that a setting can get into; a machine with a mistake may be put in the place of the real one."""

    def __init__(self, setting: Setting, machine: type[Arbiter] = Arbiter) -> None:
        self.setting = setting
        self._machine = machine
        self._probed: set[Any] = set()

    def begin(self) -> State:
        """Return the state of a session that just came."""
        arbiter = self._machine(0, self.setting.rounds)
        limits = self.setting
        return State(_key(arbiter), (), None, 0, 0, 0, limits.moves, limits.losses, limits.stops)

    def steps(self, state: State) -> Iterator[tuple[bool, State]]:
        """Yield what may happen: whether it is bound to, if nothing else does, and the state after it."""
        for part in state.parts:
            yield from self._at_node(state, part)
            yield from self._on_the_way(state, part)
        if state.sending is not None:
            yield from self._sent(state, state.sending)
        yield from self._at_entry(state)

    # --- nodes ----------------------------------------------------------------------------------

    def _at_node(self, state: State, part: Part) -> Iterator[tuple[bool, State]]:
        if part.is_cut or part.is_done or len(part.records) >= self.setting.in_flight:
            return
        if part.is_held:
            for told in range(max(part.told + 1, part.have - 1), part.have + 1):
                said = (*part.records, Record(told, is_standing=True))
                yield True, _with(state, part, part._replace(told=told, records=said))
            return
        left = self.setting.tokens - part.have
        for count in range(1, min(left, self.setting.chunk) + 1) if left else (0,):
            for is_last in (True, False) if 0 < count == left else (not left,):
                said = (*part.records, Record(part.have, count, is_last))
                after = part._replace(have=part.have + count, is_done=is_last, records=said)
                yield True, _with(state, part, after)

    def _on_the_way(self, state: State, part: Part) -> Iterator[tuple[bool, State]]:
        if part.records:
            yield True, self._deliver(state, part)
        elif part.is_cut:
            yield True, self._lost(state, part.epoch)
        if state.losses:
            less = state._replace(losses=state.losses - 1)
            yield False, self._lost(less, part.epoch)  # silent, slow, or another one is sooner
            if not part.is_cut:
                for records in {part.records, ()}:
                    yield False, _with(less, part, part._replace(is_cut=True, records=records))

    def _deliver(self, state: State, part: Part) -> State:
        record, *rest = part.records
        state = _with(state, part, part._replace(records=tuple(rest)))
        arbiter = self._arbiter(state)
        if record.is_standing:
            arbiter.stands(part.epoch, record.start)
            return state._replace(arbiter=_key(arbiter))
        actions = self._take(arbiter, part.epoch, record)
        assert actions[:1] == (Accept(),), f"tokens of {part} are not taken"
        assert record.start == state.shown, f"{record} for a reader that has {state.shown} tokens"
        assert part.epoch >= state.shown_of, "tokens of two owners are mixed"
        shown = state.shown + record.length
        state = state._replace(shown=shown, shown_of=part.epoch)
        if record.is_last:
            assert shown == self.setting.tokens
            state = _with(state, part, None)  # it has ended by itself
        return self._carry_out(state, arbiter, actions[1:])

    def _take(self, arbiter: Arbiter, epoch: int, record: Record) -> tuple[Action, ...]:
        try:
            return arbiter.take(epoch, record.start, record.length, is_last=record.is_last)
        except MessageFormatError as error:
            raise AssertionError("the owner's tokens do not fit") from error

    def _lost(self, state: State, epoch: int) -> State:
        arbiter = self._arbiter(state)
        return self._carry_out(state, arbiter, arbiter.lost(epoch))

    # --- rounds ---------------------------------------------------------------------------------

    def _sent(self, state: State, sending: Sending) -> Iterator[tuple[bool, State]]:
        if sending.answer is None:
            yield True, self._arrive(state, sending)
        else:
            after = state._replace(sending=None)
            yield True, after if sending.answer else self._lost(after, sending.epoch)
        if state.losses and sending.answer is not False:
            less = state._replace(losses=state.losses - 1)
            yield False, less._replace(sending=sending._replace(answer=False))

    def _arrive(self, state: State, sending: Sending) -> State:
        (part,) = (part for part in state.parts if part.epoch == sending.epoch)
        if part.is_cut:
            return state._replace(sending=sending._replace(answer=False))
        assert part.is_held, f"{sending} for one that generates: {part}"
        assert sending.start == part.have, f"{sending} leaves a gap, or comes again: {part}"
        have = max(part.have, sending.end)
        after = part._replace(have=have, is_held=not sending.lets_go)
        return _with(state, part, after)._replace(sending=sending._replace(answer=True))

    # --- the entry ------------------------------------------------------------------------------

    def _at_entry(self, state: State) -> Iterator[tuple[bool, State]]:
        arbiter = self._arbiter(state)
        if arbiter.state is EntryState.SEEKING:
            yield True, self._opened(state, arbiter, arbiter.placed())
        elif arbiter.is_reached and state.sending is None:
            for is_near in self.setting.is_near:
                arbiter = self._arbiter(state)
                yield True, self._carry_out(state, arbiter, arbiter.go_on(is_near=is_near))
        arbiter = self._arbiter(state)
        if state.moves and arbiter.can_move and state.sending is None:
            less = state._replace(moves=state.moves - 1)
            yield False, self._opened(less, arbiter, arbiter.move())
        arbiter = self._arbiter(state)
        if state.stops and not arbiter.is_over:
            less = state._replace(stops=state.stops - 1)
            yield False, self._carry_out(less, arbiter, arbiter.stop())

    def _opened(self, state: State, arbiter: Arbiter, asked: Open) -> State:
        part = Part(asked.epoch, asked.is_held, state.shown)
        assert asked.epoch > state.opened, f"{asked} was given before"
        parts = (*state.parts, part)
        return state._replace(arbiter=_key(arbiter), parts=parts, opened=asked.epoch)

    def _carry_out(self, state: State, arbiter: Arbiter, actions: tuple[Action, ...]) -> State:
        for action in actions:
            match action:
                case Close(epoch):
                    (part,) = (part for part in state.parts if part.epoch == epoch)
                    state = _with(state, part, None)
                    if state.sending is not None and state.sending.epoch == epoch:
                        state = state._replace(sending=None)
                case Extend(epoch, start, lets_go):
                    others = [p for p in state.parts if not p.is_held]
                    assert not (lets_go and others), f"two nodes generate: {others}, {action}"
                    state = state._replace(sending=Sending(epoch, start, state.shown, lets_go))
                case _:
                    raise AssertionError(f"{action} is not asked for")
        return state._replace(arbiter=_key(arbiter))

    def _arbiter(self, state: State) -> Arbiter:
        found, position, owner, destination, epochs = state.arbiter
        arbiter = self._machine(position, self.setting.rounds)
        arbiter.state, arbiter.owner, arbiter.epochs = found, owner, epochs
        arbiter.destination = None if destination is None else Approach(*destination)
        return arbiter

    # --- what must hold -------------------------------------------------------------------------

    def check(self, state: State) -> None:
        """Assert what holds in every state."""
        arbiter = self._arbiter(state)
        approach = arbiter.destination
        open_now = {arbiter.owner, None if approach is None else approach.epoch} - {None}
        assert {part.epoch for part in state.parts} == open_now, (
            "a part is open for nobody, or lost"
        )
        assert sum(not part.is_held for part in state.parts) <= 1, "two nodes generate"
        assert state.shown == arbiter.position, "the reader got something else"
        if state.arbiter not in self._probed:
            self._probed.add(state.arbiter)
            self._probe(state, open_now)

    def _probe(self, state: State, open_now: set[int | None]) -> None:
        """Offer the arbiter whatever may be said to it and must not count."""
        owner, epochs = self._arbiter(state).owner, self._arbiter(state).epochs
        for epoch in range(epochs + 2):
            for start in range(self.setting.tokens + 1):
                for record in (Record(start, 1), Record(start, 1, is_last=True)):
                    self._probe_tokens(state, epoch, record, is_owner=epoch == owner)
            arbiter = self._arbiter(state)
            if arbiter.destination is None or epoch != arbiter.destination.epoch:
                assert not arbiter.stands(epoch, self.setting.tokens)
            if epoch not in open_now:
                assert arbiter.lost(epoch) == ()
                assert _key(arbiter) == state.arbiter
        arbiter = self._arbiter(state)
        assert arbiter.can_move == (EntryEvent.MOVE in TRANSITIONS[arbiter.state])

    def _probe_tokens(self, state: State, epoch: int, record: Record, *, is_owner: bool) -> None:
        arbiter = self._arbiter(state)
        if is_owner and record.start == state.shown:
            return
        try:
            actions = arbiter.take(epoch, record.start, record.length, is_last=record.is_last)
        except MessageFormatError:
            assert is_owner, "what is nobody's loses a node its session"
        else:
            assert actions == (), f"{record} of epoch {epoch} is taken"
            assert not is_owner, f"{record} of the owner is dropped"
        assert _key(arbiter) == state.arbiter

    def end_of(self, state: State) -> str:
        """Return how it ended."""
        return "finished" if state.shown == self.setting.tokens else "stopped"


def _key(arbiter: Arbiter) -> tuple[Any, ...]:
    found = arbiter.destination
    destination = found and (found.epoch, found.sent, found.standing, found.rounds)
    return (arbiter.state, arbiter.position, arbiter.owner, destination, arbiter.epochs)


def _with(state: State, part: Part, after: Part | None) -> State:
    """Return the state in which a part is another; None: it is not there any more."""
    pairs = ((one, after if one.epoch == part.epoch else one) for one in state.parts)
    return state._replace(parts=tuple(new for _, new in pairs if new is not None))


def explore(
    setting: Setting, machine: type[Arbiter] = Arbiter, states_max: int = 2_000_000
) -> Found:
    """Visit every state; an AssertionError tells what went wrong."""
    world, found = World(setting, machine), Found()
    start = world.begin()
    ways: dict[State, list[State]] = {}
    open_states = [start]
    while open_states:
        state = open_states.pop()
        if state in ways:
            continue
        assert len(ways) < states_max, "more states than expected"
        world.check(state)
        made = list(world.steps(state))
        ways[state] = [after for _, after in made]
        open_states += ways[state]
        found.steps += len(made)
        if not any(is_bound for is_bound, _ in made):
            _judge(world, state, found)
    found.states, found.circle = len(ways), _circle(ways)
    return found


def _judge(world: World, state: State, found: Found) -> None:
    if state.arbiter[0] is not EntryState.ENDED:
        found.stuck.append(state)
        return
    end = world.end_of(state)
    found.ends[end] = found.ends.get(end, 0) + 1


def _circle(ways: dict[State, list[State]]) -> int:
    """Return how many states can't be put in an order in which each step leads forward."""
    inbound = dict.fromkeys(ways, 0)
    for followers in ways.values():
        for after in followers:
            inbound[after] += 1
    free = [state for state, count in inbound.items() if not count]
    left = len(ways)
    while free:
        left -= 1
        for after in ways[free.pop()]:
            inbound[after] -= 1
            if not inbound[after]:
                free.append(after)
    return left
