"""What leaves the tiers, and what may not: evictions, pins, checkpoints that are gone or replaced."""

from sllm_node.checkpoint.catalog import Checkpoint
from sllm_node.core.errors import ModelBusyError
from sllm_node.core.types import ModelId, Placement, Tier
from sllm_node.store.flights import Flights
from sllm_node.store.observed import Observed
from sllm_node.store.residency import Residency, units_of
from sllm_node.store.residents import Residents
from sllm_node.store.tiers import DeviceTiers
from sllm_node.store.waiting import Waiting


class Evictions:
    """From the devices and the pinned pool of one store."""

    def __init__(
        self,
        ledger: Residency,
        tiers: DeviceTiers,
        residents: Residents,
        flights: Flights,
        waiting: Waiting,
        observed: Observed,
    ) -> None:
        self._ledger = ledger
        self._tiers = tiers
        self._residents = residents
        self._flights = flights
        self._waiting = waiting
        self._observed = observed
        self.opened: dict[ModelId, Checkpoint] = {}
        """What the ledgers' rows were made of."""
        self._pins: dict[Tier, set[ModelId]] = {Tier.DEVICE: set(), Tier.DRAM: set()}

    def from_devices(self, model: ModelId, reason: str, placement: Placement | None) -> None:
        """Give up replicas of `model`: that of `placement`, or all.

        Raises:
            ModelBusyError: one is leased or pinned.
        """
        residents = self._residents.of(model)
        chosen = [one for one in residents if placement in (None, one)]
        leases = sum(residents[one].leases for one in chosen)
        if leases:
            raise ModelBusyError(model, f"is in use on the device ({leases} leases)")
        if chosen and model in self._pins[Tier.DEVICE] and reason != "shutdown":
            raise ModelBusyError(model, "is pinned on the device")
        for one in chosen:
            self._residents.remove(model, one)
            self._tiers.release(model, one)
            self._observed.evicted(Tier.DEVICE, reason)
        if model not in self.opened:
            self._tiers.forget(model)
        elif reason != "room":
            self._tiers.drop_caches(model)

    def from_dram(self, model: ModelId, reason: str) -> None:
        """Give up what DRAM has of `model`.

        Raises:
            ModelBusyError: it is pinned or loading.
        """
        if not self._ledger.knows(model):
            return
        if model in self._flights.loads:
            raise ModelBusyError(model, "is being loaded")
        if self._ledger.is_pinned(model):
            raise ModelBusyError(model, "is pinned in DRAM")
        if self._ledger.evict(model):
            self._observed.evicted(Tier.DRAM, reason)
        self._waiting.wake_one()

    # --- pins ---------------------------------------------------------------------------------

    def pin(self, model: ModelId, tier: Tier) -> None:
        """Never evict `model` from `tier` until it is unpinned."""
        self._pins[tier].add(model)
        self._apply_pins(model)

    def unpin(self, model: ModelId, tier: Tier) -> None:
        """Let `model` be evicted from `tier` again."""
        self._pins[tier].discard(model)
        self._apply_pins(model)

    def unpin_devices(self) -> None:
        """Let all models leave the devices."""
        self._pins[Tier.DEVICE].clear()

    def _apply_pins(self, model: ModelId) -> None:
        if self._ledger.knows(model):
            self._ledger.pin(model, pinned=model in self._pins[Tier.DRAM])
            self._waiting.wake_one()

    # --- checkpoints --------------------------------------------------------------------------

    def know(self, checkpoint: Checkpoint, chunk_bytes: int) -> None:
        """Open the ledger's row of `checkpoint`; another checkpoint of that name is forgotten.

        Raises:
            CheckpointFormatError: its file chunks are larger than `chunk_bytes`.
        """
        model = checkpoint.model
        if self.opened.get(model) is checkpoint:
            return
        if self.opened.get(model) != checkpoint:
            units = units_of(checkpoint.index, chunk_bytes)
            for tier in self._tiers:
                tier.forget(model)
            if self._ledger.knows(model):
                self._ledger.close(model)
            self._ledger.open(model, units)
            self._ledger.pin(model, pinned=model in self._pins[Tier.DRAM])
        self.opened[model] = checkpoint

    def forget(self, model: ModelId) -> None:
        """Drop what is known of a checkpoint that was removed. See `Store.forget`."""
        if model in self._flights.loads or not self._ledger.knows(model):
            return
        self._ledger.close(model)
        del self.opened[model]
        self._tiers.forget(model)
        self._waiting.wake_one()
