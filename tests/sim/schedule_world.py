"""A node's scheduler on a heap of events: loads, evictions and sessions take simulated time."""

import heapq
from collections.abc import Callable, Iterable, Mapping
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
        sizes: Mapping[ModelId, int | Mapping[str, int]],
        *,
        capacity: int | Mapping[str, int],
        load_s: float,
        models: dict[str, ModelConfig] | None = None,
        max_sessions: int = 8,
    ) -> None:
        self.capacities = {"cpu": capacity} if isinstance(capacity, int) else capacity
        self.scheduler = Scheduler(
            config,
            models or {},
            capacities=self.capacities,
            max_sessions=max_sessions,
            drain_s=1.0,
        )
        self.sizes = sizes
        self.load_s = load_s
        self.now = 0.0
        self.outcome = Outcome()
        self._heap: list[tuple[float, int, Callable[[float], list[Action]]]] = []
        self._order = count()
        self._arrivals: dict[TicketId, Arrival] = {}
        self._on_device: dict[ModelId, dict[str, int]] = {}

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
        shares = self._shares(arrival.model)
        wish = Ticket(ticket, arrival.model, shares, self.load_s, arrival.priority)
        return self.scheduler.on_request(wish, now)

    def _shares(self, model: ModelId) -> tuple[Share, ...]:
        size = self.sizes[model]
        if isinstance(size, int):
            return (Share(None, 0, size, size),)
        return tuple(Share(device, 0, part, part) for device, part in size.items())

    def _carry_out(self, actions: list[Action]) -> None:
        for action in actions:
            self.outcome.log.append(f"{self.now:.6f} {action}")
            match action:
                case StartLoad(model, devices):
                    self.outcome.loads += 1
                    sizes = (share.size for share in self._shares(model))
                    self._on_device[model] = dict(zip(devices, sizes, strict=True))
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
        del self._on_device[model]
        return self.scheduler.on_evicted(model, now)

    def _check(self) -> None:
        places = self._on_device.values()
        for device, capacity in self.capacities.items():
            assert sum(place.get(device, 0) for place in places) <= capacity
        assert sum(sum(place.values()) for place in places) == self.scheduler.roster.device_bytes
