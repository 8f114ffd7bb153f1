"""Nodes with their part in migrations, a network without delay, and an engine that counts."""

from collections import Counter
from typing import Any

from sllm_node.cluster.migration import (
    Acquire,
    Compute,
    Decode,
    End,
    Free,
    MigrationLimits,
    Report,
    Seek,
    Show,
    Told,
)
from sllm_node.cluster.migration_messages import Piece
from sllm_node.cluster.migrations import Migrations
from sllm_node.cluster.proposal import Target
from sllm_node.core.types import (
    FinishReason,
    GenerationRequest,
    ModelId,
    NodeId,
    SamplingParameters,
    SessionId,
)

LIMITS = MigrationLimits()


def session_request(session="s", prompt=(1, 2, 3), max_tokens=6, **changes):
    return GenerationRequest(
        SessionId(session), ModelId("m"), prompt, SamplingParameters(), max_tokens, **changes
    )


def at(node):
    return Target(NodeId(node))


class Rig:
    """Everything is carried out as soon as it is asked for, but for steps: those are made by `step`."""

    def __init__(self, *nodes, limits=LIMITS):
        self.now = 0.0
        self.nodes: dict[Any, Any] = {
            NodeId(n): Migrations(NodeId(n), 1, limits, 0.0) for n in nodes
        }
        self.cut: set = set()
        """Pairs (sender, receiver) whose messages are lost."""
        self.refusing: dict = {}
        """Node -> reason for which it refuses."""
        self.slow: set = set()
        """Nodes whose computations are not answered."""
        self.decoding: dict = {}
        """(node, session, epoch) -> the request as far as it has come."""
        self.shown: dict = {}
        self.ends: dict = {}
        self.reports: list[Report] = []
        self.told: list[Told] = []
        self.seeks: list[tuple[NodeId, Seek]] = []
        self.computed: list[tuple[NodeId, Compute]] = []
        self.places: Counter = Counter()
        self.sent: Counter = Counter()

    def settle(self):
        """Carry out everything that is asked for, until there is nothing."""
        is_busy = True
        while is_busy:
            carried = [self._carry(name, node) for name, node in self.nodes.items()]
            is_busy = any(carried)

    def _carry(self, name, node):
        sends, actions = node.to_send(), node.actions()
        for send in sends:
            self.sent[type(send.message).__name__] += 1
            if (name, send.to) not in self.cut and send.to in self.nodes:
                self.nodes[send.to].receive(name, send.message, self.now)
        for action in actions:
            self._act(name, node, action)
        return bool(sends or actions)

    def _act(self, name, node, action):
        match action:
            case Acquire(session=session, epoch=epoch):
                self.places[name] += 1
                if name in self.refusing:
                    node.failed(session, epoch, self.refusing[name])
                else:
                    node.acquired(session, epoch, self.now)
            case Compute(parts=parts):
                self.computed.append((name, action))
                for part in parts if name not in self.slow else ():
                    known = len(part.request.prompt) + len(part.request.resumed)
                    node.computed(part.session, part.epoch, known, self.now)
            case Decode(session=session, epoch=epoch, request=request):
                self.decoding[name, session, epoch] = list(request.resumed), request.max_tokens
            case Free(session=session, epoch=epoch):
                self.places[name] -= 1
                self.decoding.pop((name, session, epoch), None)
            case Show(session=session, piece=piece):
                self.shown.setdefault(session, []).extend(piece.tokens)
            case End(session=session, error=error):
                self.ends[session] = error
            case Seek():
                self.seeks.append((name, action))
            case Report():
                self.reports.append(action)
            case _:
                assert isinstance(action, Told)
                self.told.append(action)

    def step(self, count=1):
        """Let every owner generate; the token at index i of the output is 100 + i."""
        for _ in range(count):
            self.now += 0.02
            for (name, session, epoch), (output, most) in tuple(self.decoding.items()):
                output.append(100 + len(output))
                finish: FinishReason | None = "length" if len(output) == most else None
                piece = Piece((output[-1],), "x", finish=finish)
                self.nodes[name].generated(session, epoch, piece, self.now)
            self.settle()

    def wait(self, seconds):
        """Let time go by, with the timers."""
        end = self.now + seconds
        while self.now < end:
            self.now = min(node.next_timer() for node in self.nodes.values())
            for node in self.nodes.values():
                node.on_timer(self.now)
            self.settle()

    def begin(self, node, owner, **changes):
        self.nodes[node].begin(session_request(**changes), self.now, at(owner))
        self.settle()

    def move(self, node, to, session="s"):
        self.nodes[node].move(session, at(to) if to else None, "test", self.now)
        self.settle()

    def owner(self, node, session="s"):
        return self.nodes[node].entries[session].owner

    def is_clean(self):
        held = any(node.holders or node.entries for node in self.nodes.values())
        return not held and not any(self.places.values()) and not self.decoding


def expected(count=6):
    return [100 + index for index in range(count)]
