"""One comparison from files to report: who can take part, both scenarios, ceilings, ablation."""

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import msgspec

from sllm_node.bench.ablation import Ablation, AblationPlan, run_ablation
from sllm_node.bench.ceilings import CopyCeiling, DiskCeiling
from sllm_node.bench.contestants import (
    CONTESTANT_NAMES,
    OF_OURS,
    Contestant,
    Ours,
    OursEncoded,
    find_peer,
)
from sllm_node.bench.devices import check_device, is_cuda, release_cached
from sllm_node.bench.files import ModelFiles, PageCache, prepare_shape, prepare_source
from sllm_node.bench.machine import describe_machine
from sllm_node.bench.probe import probe
from sllm_node.bench.reference import Reference, read_reference
from sllm_node.bench.report import Report
from sllm_node.bench.scenarios import SCENARIOS, Field, Race, Scenario
from sllm_node.bench.shapes import find_shape
from sllm_node.core.clock import Clock
from sllm_node.core.config import ByteSize, StoreConfig
from sllm_node.core.units import align_up

_THREADS_MAX = 16
_TINY = "tiny"


@dataclass(frozen=True, slots=True)
class ComparisonPlan:
    """What to compare."""

    store: Path
    """Where synthesised and converted files lie, and stay."""
    shape: str | None = "8b"
    source: Path | None = None
    """A Hugging Face folder, instead of a shape."""
    scenarios: tuple[Scenario, ...] = SCENARIOS
    device: str = "cpu"
    rounds: int = 7
    copies: int = 1
    contestants: tuple[str, ...] = CONTESTANT_NAMES
    with_ablation: bool = False
    ablation_rounds: int = 3
    with_probe: bool = True
    seed: int = 0
    budget_s: float | None = None
    """No round but the first of each part begins when this many seconds would be passed."""
    page_cache: PageCache = field(default_factory=PageCache)
    out: Path | None = None
    command: str | None = None


_SHARES = {"cached": 0.35, "random": 0.75, "ablation": 1.0}
"""How much of the time that is left a part may take, if others follow."""


def compare(
    plan: ComparisonPlan, config: StoreConfig, clock: Clock, tell: Callable[[str], None]
) -> Report:
    """Carry `plan` out and return the report; `plan.out` has it after each part.

    Raises:
        BenchError: there is no such shape or contestant.
        DeviceError: there is no such device.
        StoreFullError: the files do not fit on the disk.
    """
    began = clock.now()
    check_device(plan.device)
    peers = [find_peer(name) for name in plan.contestants if name not in OF_OURS]
    files = _prepare(plan)
    tell(f"files ready after {clock.now() - began:.1f} s: {files[0].size / 1e9:.2f} GB a copy")
    config = _config_for(config, files[0], plan.device)
    ours = Ours(config)
    both: tuple[Contestant, ...] = (ours, OursEncoded(ours))
    of_ours = [one for one in both if one.name in plan.contestants]
    contestants: list[Contestant] = [*of_ours, *peers]
    report = Report(
        title=f"Loading {_title(plan)} onto {plan.device}",
        machine=describe_machine(plan.store, plan.command),
        device=plan.device,
        versions={contestant.name: contestant.version() for contestant in contestants},
        seed=plan.seed,
        store=msgspec.structs.asdict(config),
    )
    barred = _barred(plan, peers, tell)
    run = _Run(plan, files, report, clock, tell, began)
    if of_ours:
        with goes_on(report, "our store", tell):
            names = [one.name for one in of_ours]
            barred |= dict.fromkeys(names, "did not start; see below")
            ours.start(files[0].checkpoint, plan.device)
            for name in names:
                del barred[name]
    able = [contestant for contestant in contestants if contestant.name not in barred]
    try:
        run.scenarios(able, barred, config)
    finally:
        with goes_on(report, "closing our store", tell):
            ours.close()
        release_cached(plan.device)
    if plan.with_ablation:
        with goes_on(report, "the ablation", tell):
            run.ablation(config)
    if plan.out is not None:
        report.write(plan.out)
        report.plot(plan.out)
    return report


@contextmanager
def goes_on(report: Report, what: str, tell: Callable[[str], None]) -> Iterator[None]:
    """Let a failure of `what` be a remark of the report: it must not lose the rest."""
    try:
        yield
    except Exception as error:  # noqa: BLE001 - told in the report
        report.remarks.append(f"{what} failed: {type(error).__name__}: {error}")
        tell(report.remarks[-1])


class _Run:
    """The parts of one comparison, one after another, into one report."""

    def __init__(
        self,
        plan: ComparisonPlan,
        files: list[ModelFiles],
        report: Report,
        clock: Clock,
        tell: Callable[[str], None],
        began: float,
    ) -> None:
        self._plan = plan
        self._files = files
        self._report = report
        self._clock = clock
        self._tell = tell
        self._began = began
        self._reference: Reference = read_reference(files[0], plan.device)

    def scenarios(
        self, contestants: list[Contestant], barred: dict[str, str], config: StoreConfig
    ) -> None:
        """Run the scenarios."""
        plan = self._plan
        ceilings = (DiskCeiling(config), CopyCeiling(plan.device))
        race = Race(
            Field(
                contestants, ceilings, self._files, self._reference, plan.device, self._clock,
                plan.page_cache, plan.seed, self._tell,
            )
        )  # fmt: skip
        for scenario in plan.scenarios:
            result = race.run(scenario, plan.rounds, self._deadline(scenario))
            result.problems |= barred
            self._report.scenarios.append(result)
            self._write()

    def ablation(self, config: StoreConfig) -> None:
        """Run the ablation."""
        files = self._files[0]
        track = Ablation(files, self._plan.device, config)
        rounds = AblationPlan(
            self._plan.ablation_rounds,
            self._plan.seed,
            self._deadline("ablation"),
            self._plan.page_cache,
        )
        self._report.ablation = run_ablation(track, files, self._reference, self._clock, rounds)
        self._tell("ablation done")
        self._write()

    def _deadline(self, part: str) -> float | None:
        if self._plan.budget_s is None:
            return None
        now, end = self._clock.now(), self._began + self._plan.budget_s
        is_last = part == "ablation" or not (
            self._plan.with_ablation or part != self._plan.scenarios[-1]
        )
        return end if is_last else now + _SHARES[part] * (end - now)

    def _write(self) -> None:
        if self._plan.out is not None:
            self._report.write(self._plan.out)


def _prepare(plan: ComparisonPlan) -> list[ModelFiles]:
    if plan.source is not None:
        return prepare_source(plan.source, plan.store, plan.copies)
    shape = find_shape(plan.shape or _TINY)
    return prepare_shape(shape, plan.store, plan.copies, seed=plan.seed, device=plan.device)


def _title(plan: ComparisonPlan) -> str:
    if plan.source is not None:
        return plan.source.name
    return f"{find_shape(plan.shape or _TINY).title} (synthesised)"


def _config_for(config: StoreConfig, files: ModelFiles, device: str) -> StoreConfig:
    """Return `config` with a pool that holds the model, threads as the machine has, warm blocks."""
    pool = 0
    for checkpoint in (files.checkpoint, files.encoded):
        if checkpoint is not None:
            index, chunk = checkpoint.index, config.chunk_bytes
            size = index.file_size + (index.file_size // 16 if index.is_encoded else 0)
            pool += align_up(size, chunk) + len(index.shards) * chunk
    threads = max(config.reader_threads, min(_THREADS_MAX, len(os.sched_getaffinity(0))))
    return msgspec.structs.replace(
        config,
        pool_bytes=ByteSize(max(pool, 2 * config.chunk_bytes)),
        reader_threads=threads,
        read_block_bytes=ByteSize(config.chunk_bytes if is_cuda(device) else 0),
    )


def _barred(
    plan: ComparisonPlan, peers: list[Contestant], tell: Callable[[str], None]
) -> dict[str, str]:
    """Return the peers that can't take part, with the reason; the others are tried, if wished."""
    barred: dict[str, str] = {}
    for peer in peers:
        if peer.version() is None:
            barred[peer.name] = "not installed"
        elif (reason := peer.refusal(plan.device)) is not None:
            barred[peer.name] = reason
    if not plan.with_probe:
        return barred
    prepare_shape(find_shape(_TINY), plan.store, 1, seed=0, device="cpu")
    names = [peer.name for peer in peers if peer.name not in barred]
    with ThreadPoolExecutor(max(1, len(names)), "bench-probe") as threads:
        found = threads.map(partial(probe, store=plan.store, device=plan.device), names)
        for name, reason in zip(names, found, strict=True):
            if reason is not None:
                barred[name] = reason
                tell(f"{name} is left out: {reason}")
    return barred
