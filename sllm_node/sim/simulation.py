"""The simulation: one heap of events, and what becomes of each request under one policy.

Theory of operation. A request arrives, the policy says where it goes, the simulation carries that out
and pushes what follows from it: a load that ends, a session that ends. Events carry a count (`life`,
`idles`) of the thing they are about, so that what was overtaken is void. Nothing here iterates a set, reads a
clock or draws from a generator that the seed did not make, and ties in the heap go by order of
pushing: the same seed gives the same events. What loads and moves do to the cluster is in
`sim.loading` and `sim.moving`.
"""

import heapq
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Final

from sllm_node.sim.description import Description
from sllm_node.sim.faults import Faults
from sllm_node.sim.hardware import Model, Node, Replica, Session
from sllm_node.sim.journal import Journal
from sllm_node.sim.loading import Loading
from sllm_node.sim.moving import Mover
from sllm_node.sim.policy import Choice, Join, Load, Mechanisms, Policy, Queue
from sllm_node.sim.trace import Arrival

_RETRIES: Final = 8
"""Models whose waiting requests are placed again when room has come."""
_PATIENCE: Final = (2.0, 0.5)
"""A request that waits for a place decides again after so many times what was expected, and so long."""


class Simulation:
    """One run."""

    def __init__(
        self, described: Description, models: Sequence[Model], nodes: Sequence[Node],
        mechanisms: Mechanisms, seed: int, journal: Journal,
    ) -> None:  # fmt: skip
        self.limits = described.limits
        self.models = models
        self.nodes = {node.id: node for node in nodes}
        self.mechanisms = mechanisms
        self.journal = journal
        self.now = 0.0
        self.replicas: list[dict[str, Replica]] = [{} for _ in models]
        """Of each model by number: those that sessions may join, in the order they were made."""
        self.pending: dict[int, deque[Session]] = {}
        """Requests that nobody could place, by model, in the order in which each model's first came."""
        self.running = 0
        self.loading = Loading(self, seed)
        self.mover = Mover(self)
        self._faults = Faults(self, described, seed)
        self._policy: Policy | None = None
        self._heap: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self._pushed = 0
        self._arrivals: Sequence[Arrival] = ()

    @property
    def policy(self) -> Policy:
        """Return who decides."""
        assert self._policy is not None, "run() sets it"
        return self._policy

    def push(self, at: float, act: Callable[..., None], *what: Any) -> None:
        """Have `act` called at a time to come."""
        self._pushed += 1
        heapq.heappush(self._heap, (at, self._pushed, act, what))

    def run(self, policy: Policy, arrivals: Sequence[Arrival]) -> None:
        """Let all requests arrive and wait until the last one is over."""
        self._policy, self._arrivals = policy, arrivals
        if not arrivals:
            return
        self.push(arrivals[0].at_s, self._arrive, 0)
        self.push(0.0, self._tick)
        self._faults.plan(arrivals[-1].at_s)
        while len(self.journal.over) < len(arrivals):
            self.now, _, act, what = heapq.heappop(self._heap)
            act(*what)

    def _arrive(self, number: int) -> None:
        came = self._arrivals[number]
        if number + 1 < len(self._arrivals):
            self.push(self._arrivals[number + 1].at_s, self._arrive, number + 1)
        model = self.models[came.model]
        session = Session(number, model, came.at_s, came.tokens_in, came.tokens_out)
        self.journal.note(self.now, "arrive", number, model.id)
        self.push(self.now + self.limits.wait_s, self._give_up, session)
        self.place(session)

    def _tick(self) -> None:
        self.policy.on_tick()
        self.retry()
        self.push(self.now + self.limits.publish_s, self._tick)

    def place(self, session: Session) -> None:
        """Do with a session what the policy says, or keep it."""
        choice = None if session.model.number in self.pending else self.policy.place(session)
        if choice is None:
            self.journal.note(self.now, "keep", session.number)
            self.pending.setdefault(session.model.number, deque()).append(session)
            return
        self._carry_out(session, choice)

    def _carry_out(self, session: Session, choice: Choice) -> None:
        match choice:
            case Join(replica):
                self.join(session, replica)
            case Queue(replica, expected_s):
                self.journal.note(self.now, "queue", session.number, replica.name)
                session.replica = replica
                replica.waiting.append(session)
                times, more_s = _PATIENCE
                at = self.now + times * expected_s + more_s
                self.push(at, self._decide_again, session, replica)
            case Load():
                self.loading.start(session, choice)
            case None:
                raise AssertionError("handled by place()")

    def join(self, session: Session, replica: Replica) -> None:
        """Give a session a place of a replica."""
        assert replica.free_slots > 0
        assert not replica.is_gone
        assert not replica.is_leaving
        session.replica = replica
        replica.sessions[session.number] = session
        self.changed(replica.node)
        if replica.is_ready:
            self.begin(session)

    def begin(self, session: Session) -> None:
        """Let a session compute its prompt and decode, in a replica that is ready."""
        assert session.replica is not None
        model = session.model
        session.decode_from = self.now + model.resume_s(session.tokens_in + session.done)
        if session.loaded_s is None:
            session.loaded_s = self.now - session.arrival_s
        elif session.first_s is not None:
            self.journal.pauses_s.append(session.decode_from - session.ends_at)
        if session.first_s is None:
            session.first_s = session.decode_from - session.arrival_s
        left = session.tokens_out - session.done
        self.end_at(session, session.decode_from + max(0, left - 1) * model.token_s)
        self.journal.note(self.now, "begin", session.number, session.replica.name)

    def end_at(self, session: Session, at: float) -> None:
        """Note when a session will end; what was noted before is void."""
        session.ends_at = at
        session.life += 1
        self.push(at, self._finish, session, session.life)

    def _finish(self, session: Session, life: int) -> None:
        if session.is_over or session.life != life:
            return
        replica = session.replica
        assert replica is not None
        self.over(session, "finish")
        del replica.sessions[session.number]
        self.loading.learn(session)
        self.left(replica)

    def over(self, session: Session, how: str) -> None:
        """Close a session."""
        session.is_over = True
        session.life += 1
        self.journal.note(self.now, how, session.number)
        self.journal.over.append(session)

    def left(self, replica: Replica) -> None:
        """Give a place that has come free to the next session."""
        self.changed(replica.node)
        if replica.is_leaving or replica.is_gone:
            return
        while replica.free_slots > 0 and replica.waiting:
            self.join(replica.waiting.popleft(), replica)
        queue = self.pending.get(replica.model.number)
        while queue and replica.free_slots > 0:
            self.join(queue.popleft(), replica)
        if queue is not None and not queue:
            self.pending.pop(replica.model.number, None)
        if replica.is_idle:
            self.loading.rest(replica)
            self.retry()

    def retry(self) -> None:
        """Place again what could not be placed: the first of each model that waits longest."""
        for number in list(self.pending)[:_RETRIES]:
            queue = self.pending.get(number)
            while queue:
                choice = self.policy.place(queue[0])
                if choice is None:
                    break
                session = queue.popleft()
                if not queue:
                    self.pending.pop(number, None)
                self._carry_out(session, choice)

    def _decide_again(self, session: Session, replica: Replica) -> None:
        if session in replica.waiting:
            replica.waiting.remove(session)
            self.place(session)

    def _give_up(self, session: Session) -> None:
        """End a request that has waited too long for its model."""
        if session.is_over or session.loaded_s is not None:
            return
        session.loaded_s = session.first_s = self.limits.wait_s
        self.over(session, "timeout")
        replica = session.replica
        queue = self.pending.get(session.model.number)
        if queue is not None and session in queue:
            queue.remove(session)
            if not queue:
                del self.pending[session.model.number]
        elif replica is not None and session in replica.waiting:
            replica.waiting.remove(session)
        elif replica is not None and session.number in replica.sessions:
            del replica.sessions[session.number]
            self.changed(replica.node)

    def interrupt(self, session: Session, *, keeps_tokens: bool = True) -> None:
        """Stop a session and place it again; it goes on from its tokens or begins anew."""
        replica = session.replica
        assert replica is not None
        replica.sessions.pop(session.number, None)
        if session.first_s is not None and self.now < session.arrival_s + session.first_s:
            session.first_s = None
        if replica.is_ready and session.loaded_s is not None:
            session.done = session.out_at(self.now) if keeps_tokens else 0
            session.preempted += 1
            session.ends_at = self.now
        session.life += 1
        session.replica = None
        self.journal.note(self.now, "interrupt", session.number, session.done)

    def changed(self, node: Node) -> None:
        """Note that a node is not as it was."""
        node.version += 1
        self.policy.on_changed(node)
