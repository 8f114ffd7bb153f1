"""The right that a checkpoint stays on devices: what `Store.acquire` gives."""

from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from sllm_node.checkpoint.catalog import Checkpoint
from sllm_node.core.types import LoadReport, Part
from sllm_node.device.base import DeviceBuffer
from sllm_node.store.loader import Load


@dataclass(frozen=True, slots=True)
class LeasedPart:
    """Bytes of a checkpoint and the device memory that they lie in."""

    part: Part
    buffer: DeviceBuffer


class Lease:
    """The right that a checkpoint stays on devices; give it back with `release` or `with`."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        parts: tuple[LeasedPart, ...],
        report: LoadReport | None,
        release: Callable[[], None],
    ) -> None:
        self.checkpoint = checkpoint
        self.parts = parts
        self.report = report
        """What the load did; None: the model was on the device already."""
        self._release: Callable[[], None] | None = release

    def release(self) -> None:
        """Give the right back; a second call does nothing."""
        release, self._release = self._release, None
        if release is not None:
            release()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.release()


class Resident:
    """A checkpoint on devices and how many hold it there."""

    def __init__(self, load: Load, leases: int) -> None:
        self.load = load
        self.leases = leases
        self._parts = tuple(LeasedPart(target.part, target.buffer) for target in load.targets)

    def lease(self, report: LoadReport | None) -> Lease:
        """Return a lease that has been counted."""
        return Lease(self.load.checkpoint, self._parts, report, self.give_back)

    def give_back(self) -> None:
        """One holder less."""
        assert self.leases > 0
        self.leases -= 1
