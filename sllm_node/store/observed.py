"""What the store has seen of its loads: metrics, and the bandwidth of each tier for the status."""

from sllm_node.core.errors import ChecksumError
from sllm_node.core.metrics import Metrics
from sllm_node.core.types import LoadReport, ModelId, Tier
from sllm_node.store.loader import Load
from sllm_node.store.pipeline import LoadCancelledError
from sllm_node.store.residency import Residency
from sllm_node.store.tier import DeviceTier

_NEWEST_WEIGHT = 0.3
"""Of the newest observation in the moving average of a bandwidth."""


class Observed:
    """Counts for one store."""

    def __init__(self, metrics: Metrics, ledger: Residency) -> None:
        self.bandwidth: dict[Tier, float] = {}
        """Decoded bytes/s of a tier on the way to the device, from loads that it held up most.

        Of raw and encoded checkpoints together: the scheduler's estimator tells them apart.
        """
        self._metrics = metrics
        self._ledger = ledger
        self._tiers: tuple[DeviceTier, ...] = ()

    def watch(self, tiers: tuple[DeviceTier, ...]) -> None:
        """Show these devices from now on."""
        self._tiers = tiers

    def succeeded(self, load: Load, report: LoadReport) -> None:
        """Take note of a load that ended well."""
        source = _source_of(report)
        self._metrics.loads.labels(source.value, "ok").inc()
        if not load.is_onto_device:
            return
        self._metrics.load_seconds.labels(source.value).observe(report.elapsed_s)
        self._metrics.first_copy_seconds.observe(report.first_copy_s)
        for tier, size in (
            (Tier.NVME, report.bytes_from_nvme - report.bytes_from_remote),
            (Tier.DRAM, report.bytes_from_dram),
            (Tier.DEVICE, report.bytes_from_sibling),
            (Tier.REMOTE, report.bytes_from_remote),
        ):  # fmt: skip
            self._metrics.load_bytes.labels(tier.value).inc(size)
        self._metrics.load_stored_bytes.inc(report.bytes_stored)
        self._metrics.decode_seconds.inc(report.decode_s)
        self._learn(source, report)

    def failed(self, load: Load, error: BaseException) -> None:
        """Take note of a load that failed or was cancelled."""
        outcome = "cancelled" if isinstance(error, LoadCancelledError) else "failed"
        self._metrics.loads.labels(load.progress().source.value, outcome).inc()
        if isinstance(error, ChecksumError):
            self._metrics.checksum_failures.inc()

    def evicted(self, tier: Tier, reason: str) -> None:
        """Take note that a model left `tier`."""
        self._metrics.evictions.labels(tier.value, reason).inc()

    def gave_way(self, victim: ModelId) -> None:
        """Take note that a chunk was taken from `victim`; its last one makes an eviction."""
        if not self._ledger.bytes_of(victim):
            self.evicted(Tier.DRAM, "room")

    def show(self) -> None:
        """Set the gauges of pool and device."""
        ledger = self._ledger
        self._metrics.pool_chunks.labels("free").set(ledger.free)
        self._metrics.pool_chunks.labels("used").set(ledger.chunks - ledger.free - ledger.lent)
        self._metrics.pool_chunks.labels("lent").set(ledger.lent)
        for tier in self._tiers:
            device, cached = tier.device, tier.arena.cached_bytes
            for state, size in (
                ("used", device.memory_used - cached), ("cached", cached),
                ("free", device.memory_total - device.memory_used),
            ):  # fmt: skip
                self._metrics.device_bytes.labels(device.name, state).set(size)

    def _learn(self, source: Tier, report: LoadReport) -> None:
        moved = report.bytes_total - report.bytes_kept
        sizes = {Tier.NVME: report.bytes_from_nvme, Tier.REMOTE: report.bytes_from_remote}
        size = sizes.get(source, moved)
        if report.elapsed_s <= 0 or 2 * size < report.bytes_total:
            return  # one that came from both tiers, mostly from DRAM, tells of neither
        rate = size / report.elapsed_s
        known = self.bandwidth.get(source)
        mixed = rate if known is None else known + _NEWEST_WEIGHT * (rate - known)
        self.bandwidth[source] = mixed
        self._metrics.tier_bandwidth.labels(source.value).set(mixed)


def _source_of(report: LoadReport) -> Tier:
    if report.bytes_from_remote:
        return Tier.REMOTE
    if report.bytes_from_nvme:
        return Tier.NVME
    return Tier.DRAM if report.bytes_from_dram else Tier.DEVICE
