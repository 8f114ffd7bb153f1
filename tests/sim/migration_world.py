"""Explores every state that a few nodes, one session and a bad network can get into.

The network is the set of all messages that were ever sent. Any of them may arrive at any time, again and
again, in any order, or never: that is loss, duplication, delay and partition at once, and sending again
what was sent before adds no state. Nodes are functions: (state, event) -> state, messages. So each
distinct state of a node is made once, its answers are remembered, and a state of the world is a few
numbers: one for each node, the messages as bits, what may still go wrong.

Clocks are left out: any limit may run out at any time (a machine's timer is called with a time far
ahead, and afterwards it knows of no time). A token says how it came to be: the one before it, and the
epoch and attempt that generated it; so whatever mixes the work of two owners shows.
"""

import copy
import math
from collections import deque
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from sllm_node.cluster.holder import Holder
from sllm_node.cluster.migration import (
    Acquire,
    Compute,
    Decode,
    End,
    Free,
    HolderState,
    MigrationLimits,
    MigrationOutcome,
    Report,
    Seek,
    Show,
    Told,
)
from sllm_node.cluster.migration_messages import Piece, Reason
from sllm_node.cluster.migrations import Migrations
from sllm_node.cluster.proposal import Target
from sllm_node.core.errors import MoveRefusedError
from sllm_node.core.types import (
    FinishReason,
    GenerationRequest,
    ModelId,
    NodeId,
    SamplingParameters,
    SessionId,
)

SESSION = SessionId("session")
FIRST_TOKEN = 1
_MAKER_BITS = 6
_ATTEMPT_BITS = 2


class EagerPace:
    """Hands over as soon as it may."""

    def aim(self, fit, *, is_replayed): ...

    def came(self, tokens, elapsed_s): ...

    def resumed(self, tokens, elapsed_s): ...

    def is_last(self, gap):
        return True


class LatePace(EagerPace):
    """Hands over when nothing is missing, or the rounds are spent."""

    def is_last(self, gap):
        return gap == 0


class NearPace(EagerPace):
    """Hands over when one token or none is missing, as `Pace` always does; more get a round."""

    def is_last(self, gap):
        return gap <= 1


@dataclass(frozen=True)
class Setting:
    """What is explored."""

    entry: str
    owner: str
    nodes: tuple[str, ...] = ("a", "b", "c")
    tokens: int = 2
    moves: tuple[str, ...] = ()
    """Destinations that the session is told to move to, in this order, each at any time."""
    crashes: tuple[str, ...] = ()
    """Nodes of which one may die, at any time."""
    restarts: bool = False
    """Whether it comes back."""
    suspicions: int = 0
    """Times that somebody is taken for lost who is not."""
    refusals: int = 0
    """Acquisitions, computations and generations that fail."""
    drains: tuple[str, ...] = ()
    """Nodes of which one may drain."""
    cancels: bool = False
    resends: bool = False
    """Whether nodes send again what was not answered. What they sent can arrive again and again anyway,
    but questions, and tokens put together anew, are other messages."""
    attempts: int = 1
    """Holders that a node makes in one epoch; each copy of an old message may make one."""
    recoveries: int = 1
    pace: type = EagerPace

    @property
    def limits(self):
        return MigrationLimits(rounds_max=2, recoveries_max=self.recoveries)


class Budget(NamedTuple):
    moves: int
    crashes: int
    suspicions: int
    refusals: int
    drains: int
    cancels: int
    down: str = ""
    """The node that crashed."""


@dataclass(frozen=True)
class Local:
    """One node: its machines, what its shell is doing, what its reader got."""

    node: Migrations | None
    """None: it is down."""
    boot: int = 1
    jobs: frozenset = frozenset()
    places: frozenset = frozenset()
    made: tuple[int, ...] = ()
    """Epochs of the holders that it made."""
    shown: tuple[int, ...] = ()
    end: str = ""


def key_of_local(local: Local):
    if local.node is None:
        return ("down", local.boot, local.shown, local.end)
    node = local.node
    entries = tuple(key_of_entry(e) for e in node.entries.values())
    holders = tuple(sorted(key_of_holder(h) for h in node.holders.values()))
    counts = (node._attempts, node._is_draining, local.boot)
    return (entries, holders, counts, local.jobs, local.made, local.shown, local.end)


def key_of_entry(e):
    owner = e.owner and (e.owner.node, e.owner.epoch, e.owner.attempt)
    p = e.proposal
    proposal = p and (
        p.target.node, p.epoch, p.source, p.attempt, p.is_ready, p.held, p.computed, p.round_end, len(p.rounds),
    )  # fmt: skip
    return (
        e.state,
        tuple(e.session.output),
        owner,
        proposal,
        e.last_epoch,
        e.recoveries,
        e.is_seeking,
    )


def key_of_holder(h):
    t = h.task
    return (
        t.epoch, t.entry, t.attempt.boot, t.attempt.number, h.state.value, tuple(h.tokens), h.computed,
        h.sent_from, tuple(p.tokens for p in h.unsent), h.is_leaving,
    )  # fmt: skip


def clone(node: Migrations) -> Migrations:
    new = copy.copy(node)
    new.entries = {k: clone_entry(e) for k, e in node.entries.items()}
    new.holders = {k: clone_holder(h) for k, h in node.holders.items()}
    new._sends, new._actions = [], []
    return new


def clone_entry(e):
    new = copy.copy(e)
    new.session = replace(e.session, output=list(e.session.output))
    new.owner, new.proposal = copy.copy(e.owner), copy.copy(e.proposal)
    if new.proposal is not None:
        new.proposal.rounds = list(new.proposal.rounds)
    new.outbox = []
    return new


def clone_holder(h: Holder) -> Holder:
    new = copy.copy(h)
    new.tokens, new.unsent, new.outbox = list(h.tokens), deque(h.unsent), []
    return new


def forget_time(node: Migrations) -> None:
    for e in node.entries.values():
        e.since, e.last_token_at = 0.0, None
        for side in (e.owner, e.proposal):
            if side is not None:
                side.heard_at = side.said_at = 0.0
        if e.proposal is not None:
            e.proposal.since = 0.0
    for h in node.holders.values():
        h.heard_at = h.said_at = h.waits_since = 0.0


def check_tokens(output) -> None:
    """Every token follows from the one before it; epochs never go back."""
    before, epochs = FIRST_TOKEN, []
    for token in output:
        assert token >> _MAKER_BITS == before, f"the output {output} mixes owners"
        epochs.append((token & ((1 << _MAKER_BITS) - 1)) >> _ATTEMPT_BITS)
        before = token
    assert epochs == sorted(epochs)


@dataclass
class Found:
    """What an exploration found."""

    states: int = 0
    transitions: int = 0
    ends: dict[str, int] = field(default_factory=dict)
    stuck: list[Any] = field(default_factory=list)
    rounds: set[tuple[int, ...]] = field(default_factory=set)
    """Of the migrations that were made; those of one length may stand for others."""


class World:
    """The states that a setting can get into."""

    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        self.locals: list[Local] = []
        self._numbers: dict[Any, int] = {}
        self._effects: dict[tuple[int, int, Any], tuple[int, int] | None] = {}
        self.messages: list[tuple[int, str, Any]] = []
        """(receiver's place, sender, message), by bit."""
        self._bits: dict[Any, int] = {}
        self.to_node = [0] * len(setting.nodes)
        """By node: the bits of messages to it."""
        self._silent: dict[tuple[int, int], int] = {}
        """By node and its state: the bits of messages that change nothing at it."""
        self._checked: set[int] = set()
        self.rounds: set[tuple[int, ...]] = set()

    # --- one node -------------------------------------------------------------------------------

    def number(self, local: Local) -> int:
        key = key_of_local(local)
        if key not in self._numbers:
            self._numbers[key] = len(self.locals)
            self.locals.append(local)
            self._check_local(local)
        return self._numbers[key]

    def effect(self, place: int, number: int, event) -> tuple[int, int] | None:
        """Return the node's new state and the messages that it sends; None: it can't happen."""
        key = (place, number, event)
        if key not in self._effects:
            self._effects[key] = self._make_effect(place, self.locals[number], event)
        return self._effects[key]

    def _make_effect(self, place, local, event):
        name = self.setting.nodes[place]
        kind, *details = event
        if kind == "crash":
            return self.number(
                Local(None, local.boot, made=local.made, shown=local.shown, end=local.end)
            ), 0
        if kind == "restart":
            node = Migrations(NodeId(name), local.boot + 1, self.setting.limits)
            return self.number(
                Local(
                    node,
                    local.boot + 1,
                    made=local.made,
                    shown=local.shown,
                    end=local.end or "entry died",
                )
            ), 0
        if local.node is None:
            return None
        node = clone(local.node)
        jobs, made = set(local.jobs), list(local.made)
        if kind == "deliver":
            details.append(made)
        if getattr(self, f"_do_{kind}")(node, jobs, *details) is False:
            return None
        forget_time(node)
        before = replace(local, node=node, jobs=frozenset(jobs), made=tuple(sorted(made)))
        after, sends = self._carry_out(name, node, before)
        return self.number(after), sends

    def _do_deliver(self, node, jobs, bit, made):
        _, sender, message = self.messages[bit]
        before = node._attempts
        node.receive(NodeId(sender), message, 0.0)
        if node._attempts > before:
            made.append(message.epoch)
            return made.count(message.epoch) <= self.setting.attempts
        return None

    def _do_job(self, node, jobs, job):
        kind, epoch, detail = job
        jobs.discard(job)
        if kind == "acquire":
            node.acquired(SESSION, epoch, 0.0)
        elif kind == "compute":
            node.computed(SESSION, epoch, detail, 0.0)
        elif kind == "decode":
            last, count = detail
            attempt = node.holders[SESSION, epoch].task.attempt.number % (1 << _ATTEMPT_BITS)
            token = last << _MAKER_BITS | epoch << _ATTEMPT_BITS | attempt
            is_last = count + 1 == self.setting.tokens
            if not is_last:
                jobs.add(("decode", epoch, (token, count + 1)))
            finish: FinishReason | None = "length" if is_last else None
            node.generated(SESSION, epoch, Piece((token,), finish=finish), 0.0)

    def _do_fail(self, node, jobs, job):
        node.failed(SESSION, job[1], Reason.MEMORY)

    def _do_placed(self, node, jobs, job, to):
        jobs.discard(job)
        node.placed(SESSION, Target(NodeId(to)), 0.0)

    def _do_no_place(self, node, jobs, job):
        jobs.discard(job)
        node.no_place(SESSION)

    def _do_begin(self, node, jobs, to):
        request = GenerationRequest(
            SESSION, ModelId("m"), (FIRST_TOKEN,), SamplingParameters(), self.setting.tokens
        )
        node.begin(request, 0.0, Target(NodeId(to)))
        node.entries[SESSION].pace = self.setting.pace()

    def _do_move(self, node, jobs, to):
        if SESSION not in node.entries:
            return False
        try:
            node.move(SESSION, Target(NodeId(to)), "test", 0.0)
        except MoveRefusedError:
            return None
        return None

    def _do_cancel(self, node, jobs):
        node.cancel(SESSION)

    def _do_drain(self, node, jobs):
        node.drain(0.0)

    def _do_peer_lost(self, node, jobs, peer):
        node.peer_lost(NodeId(peer), 0.0)

    def _do_late(self, node, jobs, seconds, which):
        machines = node.entries if which == "entry" else node.holders
        for machine in tuple(machines.values()):
            machine.on_timer(seconds)
            node._gather(machine)

    def _carry_out(self, name, node, local):
        jobs, places = set(local.jobs), set(local.places)
        shown, end = local.shown, local.end
        for action in node.actions():
            if isinstance(action, Show | Seek | End | Report):
                assert not end, f"{action} after the end"
            match action:
                case Acquire(epoch=epoch):
                    assert epoch not in places, "acquired twice"
                    places.add(epoch)
                    jobs.add(("acquire", epoch, 0))
                case Compute(parts=parts):
                    for part in parts:
                        known = part.request.prompt + part.request.resumed
                        assert part.epoch in places, "computes without a place"
                        assert part.start < len(known)
                        jobs.add(("compute", part.epoch, len(known)))
                case Decode(epoch=epoch, request=request):
                    assert epoch in places, "decodes without a place"
                    known = request.prompt + request.resumed
                    assert len(request.prompt) == 1
                    assert len(request.resumed) < self.setting.tokens, "nothing is left to generate"
                    jobs = {job for job in jobs if job[1] != epoch}
                    jobs.add(("decode", epoch, (known[-1], len(request.resumed))))
                case Free(epoch=epoch):
                    assert epoch in places, "freed twice"
                    places.remove(epoch)
                    jobs = {job for job in jobs if job[1] != epoch}
                case Seek(excluded=excluded, is_orphan=is_orphan):
                    jobs.add(("seek", -1, (excluded, is_orphan)))
                case Report(outcome=MigrationOutcome.MOVED, rounds=rounds):
                    self.rounds.add(rounds)
                case Show(piece=piece):
                    shown += piece.tokens
                case End(error=error):
                    end = "lost" if error else "ended"
                    jobs = {job for job in jobs if job[0] != "seek"}
                case _:
                    assert isinstance(action, Report | Told)
        sends = 0
        for send in node.to_send():
            sends |= 1 << self._bit(name, send)
        return replace(
            local, jobs=frozenset(jobs), places=frozenset(places), shown=shown, end=end
        ), sends

    def _bit(self, sender, send) -> int:
        place = self.setting.nodes.index(send.to)
        key = (place, sender, send.message)
        if key not in self._bits:
            self._bits[key] = len(self.messages)
            self.messages.append(key)
            self.to_node[place] |= 1 << self._bits[key]
        return self._bits[key]

    def _check_local(self, local: Local) -> None:
        check_tokens(local.shown)
        if local.node is None:
            return
        for entry in local.node.entries.values():
            assert tuple(entry.session.output) == local.shown, "the reader got something else"
        holders = local.node.holders.values()
        held = {h.task.epoch for h in holders if h.state is not HolderState.FINISHED}
        assert held == local.places, "a place is lost, or held for nobody"

    # --- all of them ----------------------------------------------------------------------------

    def start(self):
        setting = self.setting
        numbers = []
        sends = 0
        for place, name in enumerate(setting.nodes):
            number = self.number(Local(Migrations(NodeId(name), 1, setting.limits)))
            if name == setting.entry:
                effect = self.effect(place, number, ("begin", setting.owner))
                assert effect is not None
                number, sends = effect
            numbers.append(number)
        budget = Budget(
            0, bool(setting.crashes), setting.suspicions, setting.refusals, bool(setting.drains),
            setting.cancels,
        )  # fmt: skip
        return (tuple(numbers), sends, budget)

    def steps(self, state):
        """Yield (is it bound to happen in the end, next state)."""
        numbers, _, budget = state
        for place, number in enumerate(numbers):
            local = self.locals[number]
            yield from self._deliveries(state, place, number)
            if local.node is None:
                if self.setting.restarts:
                    yield from self._step(state, place, ("restart",), budget)
                continue
            yield from self._jobs(state, place, local)
            yield from self._times(state, place)
            yield from self._mishaps(state, place)

    def _step(self, state, place, event, budget, *, is_fair=True):
        numbers, network, _ = state
        effect = self.effect(place, numbers[place], event)
        if effect is None:
            return
        number, sends = effect
        after = ((*numbers[:place], number, *numbers[place + 1 :]), network | sends, budget)
        if after != state:
            yield is_fair, after

    def _deliveries(self, state, place, number):
        numbers, network, budget = state
        pending = network & self.to_node[place] & ~self._silent.get((place, number), 0)
        while pending:
            low = pending & -pending
            pending ^= low
            effect = self.effect(place, number, ("deliver", low.bit_length() - 1))
            if effect is None or effect == (number, 0):
                self._silent[place, number] = self._silent.get((place, number), 0) | low
                continue
            after, sends = effect
            if after != number or sends & ~network:
                moved = (*numbers[:place], after, *numbers[place + 1 :])
                yield True, (moved, network | sends, budget)

    def _jobs(self, state, place, local):
        budget = state[2]
        for job in local.jobs:
            if job[0] == "seek":
                excluded, _ = job[2]
                for to in self.setting.nodes:
                    if to not in excluded and to != budget.down:
                        yield from self._step(state, place, ("placed", job, to), budget)
                yield from self._step(state, place, ("no_place", job), budget, is_fair=False)
                continue
            yield from self._step(state, place, ("job", job), budget)
            if budget.refusals:
                less = budget._replace(refusals=budget.refusals - 1)
                yield from self._step(state, place, ("fail", job), less, is_fair=False)

    def _times(self, state, place):
        budget = state[2]
        for which in ("entry", "holder") if self.setting.resends else ():
            yield from self._step(state, place, ("late", 1.0, which), budget)
        if budget.down:
            yield from self._step(state, place, ("peer_lost", budget.down), budget)
        elif budget.suspicions:
            less = budget._replace(suspicions=budget.suspicions - 1)
            for which in ("entry", "holder"):
                yield from self._step(state, place, ("late", math.inf, which), less, is_fair=False)
            for peer in self.setting.nodes:
                yield from self._step(state, place, ("peer_lost", peer), less, is_fair=False)
        if not budget.down and budget.suspicions < self.setting.suspicions:
            # Whoever gave up is silent in earnest now, so the entry's limits run out.
            yield from self._step(state, place, ("late", math.inf, "entry"), budget)

    def _mishaps(self, state, place):
        budget, name = state[2], self.setting.nodes[place]
        setting = self.setting
        if budget.crashes and name in setting.crashes:
            down = budget._replace(crashes=0, down=name)
            yield from self._step(state, place, ("crash",), down, is_fair=False)
        if budget.drains and name in setting.drains:
            less = budget._replace(drains=0)
            yield from self._step(state, place, ("drain",), less, is_fair=False)
        if name != setting.entry:
            return
        if budget.moves < len(setting.moves):
            less = budget._replace(moves=budget.moves + 1)
            event = ("move", setting.moves[budget.moves])
            yield from self._step(state, place, event, less, is_fair=False)
        if budget.cancels:
            less = budget._replace(cancels=0)
            yield from self._step(state, place, ("cancel",), less, is_fair=False)

    # --- what must hold -------------------------------------------------------------------------

    def check(self, numbers) -> None:
        """At most one node decodes in an epoch, and none in one that was not granted."""
        found = [self.locals[number] for number in numbers]
        decoding = [
            (h.task.epoch, local.node._me)
            for local in found
            if local.node is not None
            for h in local.node.holders.values()
            if h.state in (HolderState.DECODING, HolderState.FINISHED)
        ]
        epochs = [epoch for epoch, _ in decoding]
        assert len(set(epochs)) == len(epochs), f"two owners in one epoch: {decoding}"
        entry = found[self.setting.nodes.index(self.setting.entry)]
        if entry.node is not None and SESSION in entry.node.entries:
            owner = entry.node.entries[SESSION].owner
            limit = owner.epoch if owner else entry.node.entries[SESSION].last_epoch
            assert max(epochs, default=0) <= limit, f"{decoding} beyond the owner {owner}"

    def is_over(self, state) -> bool:
        """Return whether the session has ended and nobody has anything of it."""
        numbers, _, _ = state
        found = [self.locals[number] for number in numbers]
        entry = found[self.setting.nodes.index(self.setting.entry)]
        is_free = all(not local.node.holders and not local.jobs for local in found if local.node)
        return is_free and (entry.node is None or SESSION not in entry.node.entries)

    def end_of(self, state) -> str:
        entry = self.locals[state[0][self.setting.nodes.index(self.setting.entry)]]
        if entry.node is None or entry.end == "entry died":
            return "entry died"
        is_whole = len(entry.shown) == self.setting.tokens
        return "finished" if is_whole and entry.end == "ended" else entry.end


def explore(setting: Setting, states_max: int = 2_000_000, world: type[World] = World) -> Found:
    """Visit every state; an AssertionError tells what went wrong."""
    made = world(setting)
    start = made.start()
    numbers = {start: 0}
    states = [start]
    backwards: list[list[int]] = [[]]
    found = Found()
    checked: set = set()
    at = 0
    while at < len(states):
        state = states[at]
        if state[0] not in checked:
            checked.add(state[0])
            made.check(state[0])
        for is_fair, after in made.steps(state):
            found.transitions += 1
            number = numbers.get(after)
            if number is None:
                number = numbers[after] = len(states)
                assert number < states_max, "more states than expected"
                states.append(after)
                backwards.append([])
            if is_fair:
                backwards[number].append(at)
        at += 1
    found.states, found.rounds = len(states), made.rounds
    _judge_ends(made, states, backwards, found)
    return found


def _judge_ends(world, states, backwards, found) -> None:
    """Find the states from which no fair way leads to the end."""
    over = [number for number, state in enumerate(states) if world.is_over(state)]
    for number in over:
        end = world.end_of(states[number])
        found.ends[end] = found.ends.get(end, 0) + 1
    reached = bytearray(len(states))
    for number in over:
        reached[number] = 1
    while over:
        for before in backwards[over.pop()]:
            if not reached[before]:
                reached[before] = 1
                over.append(before)
    found.stuck = [states[n] for n in range(len(states)) if not reached[n]][:5]
