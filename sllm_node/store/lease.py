"""The right that a checkpoint stays on the device: what `Store.acquire` gives."""

from collections.abc import Callable
from types import TracebackType
from typing import Self

from sllm_node.checkpoint.catalog import Checkpoint
from sllm_node.core.types import LoadReport
from sllm_node.device.base import DeviceBuffer


class Lease:
    """The right that a checkpoint stays on the device; give it back with `release` or `with`."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        buffer: DeviceBuffer,
        report: LoadReport | None,
        release: Callable[[], None],
    ) -> None:
        self.checkpoint = checkpoint
        self.buffer = buffer
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
    """A checkpoint on the device and how many hold it there."""

    def __init__(self, checkpoint: Checkpoint, buffer: DeviceBuffer, leases: int) -> None:
        self.checkpoint = checkpoint
        self.buffer = buffer
        self.leases = leases

    def lease(self, report: LoadReport | None) -> Lease:
        """Return a lease that has been counted."""
        return Lease(self.checkpoint, self.buffer, report, self.give_back)

    def give_back(self) -> None:
        """One holder less."""
        assert self.leases > 0
        self.leases -= 1
