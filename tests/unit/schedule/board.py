"""A scheduler with a hand on the clock, for tests that read like a game record."""

from sllm_node.core.config import ModelConfig, ScheduleConfig
from sllm_node.core.errors import SllmError
from sllm_node.core.types import ModelId, ModelState, Share
from sllm_node.schedule.actions import Action, Grant, Refuse, StartLoad, Stop, Ticket, TicketId
from sllm_node.schedule.scheduler import Scheduler

A, B, C = ModelId("a"), ModelId("b"), ModelId("c")


class Board:
    """Room for `capacity` bytes; a model takes 4 unless a request says otherwise."""

    def __init__(self, capacity=4, max_sessions=2, models=None, **config):
        self.scheduler = Scheduler(
            ScheduleConfig(**config),
            models or {},
            capacities=capacity if isinstance(capacity, dict) else {"cpu": capacity},
            max_sessions=max_sessions,
            drain_s=30.0,
        )
        self.now = 0.0
        self.tickets = 0

    def request(
        self,
        model,
        size=4,
        priority=0,
        keep_alive_s=None,
        *,
        session=True,
        load_s=1.0,
        hint=False,
        waited_s=0.0,
    ):
        """Ask for `model`; returns the actions. The ticket is `self.tickets`."""
        self.tickets += 1
        ticket = Ticket(
            TicketId(self.tickets), model, shares(size), load_s, priority, keep_alive_s, session,
            is_hint=hint, waited_s=waited_s,
        )  # fmt: skip
        return self.scheduler.on_request(ticket, self.now)

    def hint(self, model, size=4):
        """Ask for `model` though nobody waits for it, if that can begin; None: it can't."""
        ticket = Ticket(TicketId(0), model, shares(size), 1.0, is_session=False, is_hint=True)
        if not self.scheduler.can_begin(ticket, self.now):
            return None
        return self.request(model, size, session=False, hint=True)

    def wait(self, seconds):
        """Let time pass, up to timers and on."""
        end = self.now + seconds
        actions: list[Action] = []
        while (timer := self.scheduler.next_timer()) is not None and timer <= end:
            self.now = max(self.now, timer)
            actions += self.scheduler.on_timer(self.now)
        self.now = end
        return actions

    def loaded(self, model):
        return self.scheduler.on_loaded(model, self.now)

    def load_failed(self, model, error: SllmError):
        return self.scheduler.on_load_failed(model, error, self.now)

    def evicted(self, model):
        return self.scheduler.on_evicted(model, self.now)

    def finish(self, ticket):
        return self.scheduler.on_finished(TicketId(ticket), self.now)

    def cancel(self, ticket):
        return self.scheduler.on_cancel(TicketId(ticket), self.now)

    def state(self, model) -> ModelState:
        return self.scheduler.roster.view(model).state

    def serve(self, model, **wish):
        """Bring `model` to the device with one session running; returns its ticket."""
        self.request(model, **wish)
        ticket = self.tickets
        assert granted(self.loaded(model)) == [ticket]
        return ticket

    def serve_again(self, model, **wish):
        """Let a session run on a model that is ready; returns its ticket."""
        assert granted(self.request(model, **wish)) == [self.tickets]
        return self.tickets

    def rest(self, model, **wish):
        """Bring `model` to the device and leave it idle."""
        return self.finish(self.serve(model, **wish))


def shares(size) -> tuple[Share, ...]:
    """Return one share of `size` bytes for any device; a dict gives each device its share."""
    if isinstance(size, dict):
        return tuple(Share(name, 0, part, part) for name, part in size.items())
    return (Share(None, 0, size, size),)


def start(model, *devices) -> StartLoad:
    """Return the action that brings `model` to `devices`, the only one there is by default."""
    return StartLoad(model, devices or ("cpu",))


def grant(ticket: int, model):
    return Grant(TicketId(ticket), model)


def refuse(ticket: int, error):
    return Refuse(TicketId(ticket), error)


def stop(ticket: int, error):
    return Stop(TicketId(ticket), error)


def granted(actions):
    return [action.ticket for action in actions if isinstance(action, Grant)]


def refused(actions):
    return {action.ticket: action.error for action in actions if isinstance(action, Refuse)}


__all__ = ["Board", "ModelConfig", "grant", "granted", "refuse", "refused", "stop"]
