"""The replicas' weights that lie on devices, each with those who hold it."""

from collections.abc import Mapping

from sllm_node.core.errors import ModelBusyError
from sllm_node.core.types import ModelId, Placement
from sllm_node.store.lease import Lease, Resident
from sllm_node.store.loader import Load
from sllm_node.store.pipeline import Source
from sllm_node.store.tiers import DeviceTiers


class Residents:
    """By model and placement."""

    def __init__(self, tiers: DeviceTiers) -> None:
        self._tiers = tiers
        self._by_model: dict[ModelId, dict[Placement, Resident]] = {}

    def of(self, model: ModelId) -> Mapping[Placement, Resident]:
        """Return those of `model`."""
        return self._by_model.get(model, {})

    def all(self) -> list[tuple[ModelId, Placement, Resident]]:
        """Return all as they are now."""
        return [(model, *one) for model, found in self._by_model.items() for one in found.items()]

    def made_by(self, load: Load) -> Resident | None:
        """Return what `load` made, if it is still there."""
        resident = self.of(load.model).get(load.placement)
        return resident if resident is not None and resident.load is load else None

    def leases(self, model: ModelId) -> int:
        """Return how many hold `model`."""
        return sum(resident.leases for resident in self.of(model).values())

    def add(self, load: Load, leases: int) -> None:
        """Keep what `load` has made; so many hold it already."""
        self._by_model.setdefault(load.model, {})[load.placement] = Resident(load, leases)

    def remove(self, model: ModelId, placement: Placement) -> None:
        """Forget one; its memory is the caller's."""
        residents = self._by_model[model]
        del residents[placement]
        if not residents:
            del self._by_model[model]

    def hand_over(self, lease: Lease) -> None:
        """Forget what `lease` holds alone; its device memory is the holder's.

        Raises:
            ModelBusyError: somebody else holds it as well.
        """
        model, placement = lease.checkpoint.model, tuple(part.part for part in lease.parts)
        if self.of(model)[placement].leases > 1:
            raise ModelBusyError(model, "is in use by others")
        lease.release()
        self.remove(model, placement)
        for part in placement:
            self._tiers[part.device].hand_over(model)

    def source(self, model: ModelId, placement: Placement) -> Source | None:
        """Borrow a replica on one device from which all of `placement` can be cloned."""
        wanted = [self._tiers[part.device].device for part in placement]
        for there, resident in self._by_model.get(model, {}).items():
            origin = self._tiers[there[0].device]
            reachable = all(device.can_reach(origin.device) for device in wanted)
            if wanted and reachable and len(there) == 1:
                resident.leases += 1
                return Source(origin.buffer(model), resident.give_back)
        return None
