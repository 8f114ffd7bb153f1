"""Live migration as in the paper: tokens go in rounds while the source decodes, then it hands over.

The destination computes the KV of all tokens so far; meanwhile more come, for which it needs another,
shorter round. Once a round leaves at most `LAST_TOKENS` new tokens the source stops, and the client sees a
pause of one more round. Victims of one placement go one after another, and their sessions too; the
loads at their destinations all start at once.
"""

from typing import TYPE_CHECKING, Final

from sllm_node.sim.hardware import Moving, Replica, Session
from sllm_node.sim.policy import Go

if TYPE_CHECKING:
    from sllm_node.sim.simulation import Simulation

LAST_TOKENS: Final = 20
_ROUNDS_MAX: Final = 20


class Mover:
    """The migrations of a simulation."""

    def __init__(self, simulation: "Simulation") -> None:
        self._simulation = simulation

    def prepare(self, target: Replica, moves: tuple[Go, ...]) -> None:
        """Promise every destination and let the first sessions go."""
        loading = self._simulation.loading
        target.leaving = []
        for go in moves:
            loading.leave(go.victim)
        waiting: list[Session] = []
        for go in moves:
            waiting += go.victim.waiting
            go.victim.waiting.clear()
            to = loading.destination(go)
            target.leaving.append(Moving(go.victim, to, len(go.victim.sessions)))
        ends_s = sum(self._least_s(moving) for moving in target.leaving)
        target.expected_at = self._simulation.now + ends_s
        self.go_on(target)
        for session in waiting:
            self._simulation.place(session)

    def _least_s(self, moving: Moving) -> float:
        """Return the seconds that moving a victim's sessions should take."""
        now = self._simulation.now
        load_s = 0.0 if moving.to.is_ready else max(0.0, moving.to.expected_at - now)
        sessions = moving.victim.sessions.values()
        return load_s + sum(s.model.resume_s(s.tokens_in + s.out_at(now)) for s in sessions)

    def go_on(self, target: Replica) -> None:
        """Move the next session that stands in the way of a load; without one, begin to load."""
        if target.is_gone or target.is_ready:
            return
        for moving in target.leaving:
            if not moving.victim.sessions:
                self.return_places(moving)
                continue
            if moving.to.is_gone:
                self._stop(moving)
                continue
            if moving.to.is_ready:
                self._ship(target, moving)
            elif target not in moving.to.followers:
                moving.to.followers.append(target)
            return
        self._simulation.loading.begin(target)

    def return_places(self, moving: Moving) -> None:
        """Give back promised places that nobody needs any more."""
        left, moving.promised = moving.promised, 0
        moving.to.incoming -= left
        if left and not moving.to.is_gone:
            self._simulation.left(moving.to)

    def _ship(self, target: Replica, moving: Moving) -> None:
        """Send the tokens of the next session in rounds."""
        simulation = self._simulation
        session = next(iter(moving.victim.sessions.values()))
        model, at = session.model, simulation.now
        tokens = float(session.tokens_in + session.out_at(at))
        for _ in range(_ROUNDS_MAX):
            round_s = model.resume_s(tokens)
            tokens = round_s / model.token_s
            at += round_s
            if tokens <= LAST_TOKENS:
                break
        pause_s = model.resume_s(tokens)
        if session.ends_at <= at:
            simulation.push(session.ends_at, self.go_on, target)
            return
        simulation.push(at, self._hand_over, target, moving, session, session.life, pause_s)

    def _hand_over(
        self, target: Replica, moving: Moving, session: Session, life: int, pause_s: float
    ) -> None:
        simulation = self._simulation
        is_current = session.life == life and not (session.is_over or moving.victim.is_gone)
        if is_current and not moving.to.is_gone:
            del moving.victim.sessions[session.number]
            moving.to.incoming -= 1
            moving.promised -= 1
            moving.to.sessions[session.number] = session
            session.replica = moving.to
            session.decode_from += pause_s
            simulation.end_at(session, session.ends_at + pause_s)
            simulation.journal.pauses_s.append(pause_s)
            simulation.journal.note(simulation.now, "migrate", session.number, moving.to.name)
            simulation.changed(moving.to.node)
        self.go_on(target)

    def _stop(self, moving: Moving) -> None:
        """Stop sessions whose destination is gone and place them again."""
        stopped = list(moving.victim.sessions.values())
        for session in stopped:
            self._simulation.interrupt(session)
        for session in stopped:
            self._simulation.place(session)
