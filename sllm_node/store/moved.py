"""What one load has moved so far, and what is told of it."""

from dataclasses import dataclass

from sllm_node.checkpoint.catalog import Checkpoint
from sllm_node.core.types import LoadProgress, LoadReport, Tier


@dataclass(slots=True)
class Moved:
    """Bytes, by where they came from, and the time of their decoding."""

    wanted: int = 0
    done: int = 0
    nvme: int = 0
    dram: int = 0
    sibling: int = 0
    remote: int = 0
    """Of those from NVMe: fetched first."""
    relayed: int = 0
    verified: int = 0
    stored: int = 0
    """As stored; all others count what is delivered."""
    decode_s: float = 0.0

    def progress(
        self, checkpoint: Checkpoint, kept: int, times: tuple[float, float], *, is_cloned: bool
    ) -> LoadProgress:
        """Return how far a load is of which the devices had `kept` bytes; `times`: waited for, and running."""
        waited_s, running_s = times
        eta_s = None
        if self.done and running_s > 0:
            eta_s = (self.wanted - self.done) * running_s / self.done
        slowest = Tier.DEVICE if is_cloned else self._slowest(checkpoint)
        return LoadProgress(kept + self.done, checkpoint.index.size, waited_s, eta_s, slowest)

    def _slowest(self, checkpoint: Checkpoint) -> Tier:
        if not self.wanted:
            return Tier.DEVICE
        if self.dram == self.wanted:
            return Tier.DRAM
        return Tier.NVME if checkpoint.remote is None else Tier.REMOTE

    def report(
        self, checkpoint: Checkpoint, kept: int, elapsed_s: float, first_copy_s: float
    ) -> LoadReport:
        """Return what a load that ended well did."""
        return LoadReport(
            model=checkpoint.model,
            bytes_total=checkpoint.index.size,
            bytes_from_nvme=self.nvme,
            bytes_from_dram=self.dram,
            bytes_from_sibling=self.sibling,
            bytes_kept=kept,
            bytes_relayed=self.relayed,
            elapsed_s=elapsed_s,
            first_copy_s=first_copy_s,
            verified_bytes=self.verified,
            bytes_from_remote=self.remote,
            bytes_stored=self.stored,
            decode_s=self.decode_s,
            is_encoded=checkpoint.index.is_encoded,
        )
