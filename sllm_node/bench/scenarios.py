"""The two scenarios of the field, every contestant in both, round by round in a shuffled order.

`cached`: the same model again and again; its bytes are in the page cache, or in our pinned pool.
`random`: one of the copies, drawn anew for each load, with the page cache and our pool emptied
before. The first round warms up, is compared byte for byte and does not count. The clock stops when
the last byte is usable on the device; freeing is outside.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Final, Literal, Protocol

import numpy as np

from sllm_node.bench.contestants import Contestant, Loaded
from sllm_node.bench.devices import release_cached, settle
from sllm_node.bench.files import ModelFiles, PageCache
from sllm_node.bench.reference import Reference
from sllm_node.core.clock import Clock

Scenario = Literal["cached", "random"]
SCENARIOS: Final[tuple[Scenario, ...]] = ("cached", "random")


class Ceiling(Protocol):
    """A plain measurement that takes its turn among the contestants."""

    @property
    def name(self) -> str: ...

    @property
    def scenarios(self) -> tuple[Scenario, ...]:
        """Where it says something."""

    def measure(self, files: ModelFiles, clock: Clock) -> float:
        """Return bytes per second."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One load, or one measurement of a ceiling."""

    scenario: str
    round: int
    """0 is the round that warms up and does not count."""
    name: str
    model: str
    seconds: float
    """Of the model's size, for ceilings too."""


@dataclass(slots=True)
class ScenarioResult:
    """What one scenario gave."""

    scenario: Scenario
    size: int
    """Bytes of one load."""
    samples: list[Sample] = field(default_factory=list)
    problems: dict[str, str] = field(default_factory=dict)
    """Contestant -> why it has no or no more samples."""
    compared: dict[str, str] = field(default_factory=dict)
    """Contestant -> how its tensors compared with the reference."""
    page_cache: str = ""

    def seconds(self, name: str) -> list[float]:
        """Return the samples of `name` that count."""
        return [s.seconds for s in self.samples if s.name == name and s.round > 0]


@dataclass(frozen=True, slots=True)
class Field:
    """Who runs, on what, and by which clock."""

    contestants: Sequence[Contestant]
    ceilings: Sequence[Ceiling]
    files: Sequence[ModelFiles]
    reference: Reference
    device: str
    clock: Clock
    page_cache: PageCache
    seed: int = 0
    tell: Callable[[str], None] = lambda text: None


class Race:
    """Runs scenarios on one field."""

    def __init__(self, field_: Field) -> None:
        self._field = field_
        self._numbers = np.random.default_rng(field_.seed)

    def run(self, scenario: Scenario, rounds: int, deadline: float | None = None) -> ScenarioResult:
        """Run a round to warm up and `rounds` that count; none begins after `deadline`, but one."""
        result = ScenarioResult(scenario, self._field.files[0].size)
        longest = 0.0
        for number in range(rounds + 1):
            start = self._field.clock.now()
            if number > 1 and deadline is not None and start + longest > deadline:
                break
            self._round(result, number)
            took = self._field.clock.now() - start
            longest = max(longest, took)
            self._field.tell(f"{scenario} round {number} of {rounds}: {took:.1f} s")
        result.page_cache = self._field.page_cache.way if scenario == "random" else "kept"
        return result

    def _round(self, result: ScenarioResult, number: int) -> None:
        """Let everybody take a turn, in an order drawn anew."""
        turns: list[Callable[[ModelFiles], Sample | None]] = [
            partial(self._attempt, result, number, one) for one in self._field.contestants
        ]
        turns += [
            partial(self._measure, result, number, ceiling)
            for ceiling in self._field.ceilings
            if result.scenario in ceiling.scenarios
        ]
        for place in self._numbers.permutation(len(turns)):
            sample = turns[place](self._draw(result.scenario))
            if sample is not None:
                result.samples.append(sample)

    def _draw(self, scenario: Scenario) -> ModelFiles:
        files = self._field.files
        return files[0 if scenario == "cached" else int(self._numbers.integers(len(files)))]

    def _measure(
        self, result: ScenarioResult, number: int, ceiling: Ceiling, files: ModelFiles
    ) -> Sample:
        seconds = result.size / ceiling.measure(files, self._field.clock)
        return Sample(result.scenario, number, ceiling.name, files.model, seconds)

    def _attempt(
        self, result: ScenarioResult, number: int, contestant: Contestant, files: ModelFiles
    ) -> Sample | None:
        """Time one load; what fails is told in the result and does not run again."""
        name = contestant.name
        if name in result.problems:
            return None
        try:
            if result.scenario == "random":
                self._field.page_cache.drop(files.all())
            seconds, loaded = self._timed(contestant, files, warm=result.scenario == "cached")
            try:
                if number == 0:
                    self._compare(result, contestant, loaded)
            finally:
                loaded.free()
        except Exception as error:  # noqa: BLE001 - whatever a peer raises is its result
            result.problems[name] = f"{type(error).__name__}: {error}".partition("\n")[0][:300]
            return None
        finally:
            release_cached(self._field.device)
        return Sample(result.scenario, number, name, files.model, seconds)

    def _timed(
        self, contestant: Contestant, files: ModelFiles, *, warm: bool
    ) -> tuple[float, Loaded]:
        device, clock = self._field.device, self._field.clock
        settle({}, device)
        start = clock.now()
        loaded = contestant.load(files, device, warm=warm)
        settle(loaded.tensors, device)
        return clock.now() - start, loaded

    def _compare(self, result: ScenarioResult, contestant: Contestant, loaded: Loaded) -> None:
        found = self._field.reference.compare(loaded.tensors)
        missing_counts = found.missing and not (contestant.in_module_layout and found.same)
        if found.different or missing_counts:
            names = ", ".join((*found.different, *found.missing)[:3])
            result.problems[contestant.name] = (
                f"{len(found.different)} tensors differ from the files, "
                f"{len(found.missing)} are missing: {names}"
            )
        result.compared[contestant.name] = f"{found.same} tensors equal" + (
            f", {len(found.missing)} of other names" if found.missing else ""
        )
