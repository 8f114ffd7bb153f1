"""A node's scheduler on a heap of events: loads, evictions and sessions take simulated time."""

import heapq
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from itertools import count

from sllm_node.core.config import ModelConfig, ScheduleConfig
from sllm_node.core.types import ModelId, Share
from sllm_node.schedule.actions import (
    AbortLoad,
    Action,
    Evict,
    Grant,
    Refuse,
    StartLoad,
    Stop,
    Ticket,
    TicketId,
)
from sllm_node.schedule.scheduler import Scheduler

EVICTION_S = 0.05


@dataclass(frozen=True, slots=True)
class Arrival:
    """A request of the trace."""

    at: float
    model: ModelId
    service_s: float
    priority: int = 0


@dataclass(slots=True)
class Outcome:
    """What became of a simulated run."""

    loads: int = 0
    waits: dict[TicketId, float] = field(default_factory=dict)
    """Seconds from arrival to grant."""
    finished: set[TicketId] = field(default_factory=set)
    refused: set[TicketId] = field(default_factory=set)
    end: float = 0.0
    log: list[str] = field(default_factory=list)


class World:
    """Plays arrivals against one scheduler and checks it at every step."""

    def __init__(
        self,
        config: ScheduleConfig,
        sizes: dict[ModelId, int],
        *,
        capacity: int,
        load_s: float,
        models: dict[str, ModelConfig] | None = None,
        max_sessions: int = 8,
    ) -> None:
        self.scheduler = Scheduler(
            config,
            models or {},
            capacities={"cpu": capacity},
            max_sessions=max_sessions,
            drain_s=1.0,
        )
        self.sizes = sizes
        self.capacity = capacity
        self.load_s = load_s
        self.now = 0.0
        self.outcome = Outcome()
        self._heap: list[tuple[float, int, Callable[[float], list[Action]]]] = []
        self._order = count()
        self._arrivals: dict[TicketId, Arrival] = {}
        self._on_device: set[ModelId] = set()

    def play(self, arrivals: Iterable[Arrival]) -> Outcome:
        """Run to the end, when no session runs or waits."""
        for number, arrival in enumerate(arrivals, 1):
            ticket = TicketId(number)
            self._arrivals[ticket] = arrival
            self._at(arrival.at, partial(self._request, ticket))
        while self._heap:
            timer = self.scheduler.next_timer()
            if timer is not None and timer <= self._heap[0][0]:
                self.now = max(self.now, timer)
                self._carry_out(self.scheduler.on_timer(self.now))
                continue
            self.now, _, event = heapq.heappop(self._heap)
            self._carry_out(event(self.now))
            self._check()
        self.outcome.end = self.now
        return self.outcome

    def _at(self, time: float, event: Callable[[float], list[Action]]) -> None:
        heapq.heappush(self._heap, (time, next(self._order), event))

    def _request(self, ticket: TicketId, now: float) -> list[Action]:
        arrival = self._arrivals[ticket]
        size = self.sizes[arrival.model]
        wish = Ticket(
            ticket, arrival.model, (Share(None, 0, size, size),), self.load_s, arrival.priority
        )
        return self.scheduler.on_request(wish, now)

    def _carry_out(self, actions: list[Action]) -> None:
        for action in actions:
            self.outcome.log.append(f"{self.now:.6f} {action}")
            match action:
                case StartLoad(model, _):
                    self.outcome.loads += 1
                    self._on_device.add(model)
                    self._at(self.now + self.load_s, partial(self.scheduler.on_loaded, model))
                case Evict(model, _):
                    self._at(self.now + EVICTION_S, partial(self._evicted, model))
                case Grant(ticket, _):
                    arrival = self._arrivals[ticket]
                    self.outcome.waits[ticket] = self.now - arrival.at
                    self._at(self.now + arrival.service_s, partial(self._finished, ticket))
                case Refuse(ticket, _):
                    self.outcome.refused.add(ticket)
                case AbortLoad(_) | Stop(_, _):
                    raise AssertionError(f"nobody cancels here: {action}")
                case _:
                    raise AssertionError(action)

    def _finished(self, ticket: TicketId, now: float) -> list[Action]:
        self.outcome.finished.add(ticket)
        return self.scheduler.on_finished(ticket, now)

    def _evicted(self, model: ModelId, now: float) -> list[Action]:
        self._on_device.remove(model)
        return self.scheduler.on_evicted(model, now)

    def _check(self) -> None:
        used = sum(self.sizes[model] for model in self._on_device)
        assert used <= self.capacity
        assert used == self.scheduler.device_bytes
