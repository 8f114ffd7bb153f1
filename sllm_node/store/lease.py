"""The right that a checkpoint stays on devices: what `Store.acquire` gives.

An *early* lease is given before the load has ended. Its memory is there, its bytes come: `arrival`
says how far. It is one of those who wait for the load, so that the last one who gives up ends it,
and the memory of a load that failed stays until the last early lease is given back.
"""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from sllm_node.checkpoint.catalog import Checkpoint
from sllm_node.core.types import LoadReport, ModelId, Part
from sllm_node.device.base import DeviceBuffer
from sllm_node.store.arrival import Arrival
from sllm_node.store.loader import Load
from sllm_node.store.pipeline import failure_of


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
        early: Load | None = None,
    ) -> None:
        self.checkpoint = checkpoint
        self.parts = parts
        self.report: LoadReport | None = report
        """What the load did; None: the model was on the device already, or the load goes on."""
        self.arrival: Arrival | None = None if early is None else early.deliveries.arrival()
        """How far the bytes are, of an early lease; of any other one they are all there."""
        self._early = early
        self._release: Callable[[], None] | None = release

    def release(self) -> None:
        """Give the right back; a second call does nothing."""
        release, self._release = self._release, None
        if release is not None:
            if self.arrival is not None:
                self.arrival.stop()
            release()

    async def loaded(self) -> None:
        """Wait until all bytes are there; a caller that is cancelled leaves the load alone.

        Raises:
            SllmError: the load has failed; give the lease back.
        """
        if self._early is not None:
            result = await asyncio.shield(self._early.ended)
            self.report = report_of(self.checkpoint.model, result)

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
        self._parts = parts_of(load)

    def lease(self, report: LoadReport | None) -> Lease:
        """Return a lease that has been counted."""
        return Lease(self.load.checkpoint, self._parts, report, self.give_back)

    def give_back(self) -> None:
        """One holder less."""
        assert self.leases > 0
        self.leases -= 1


def parts_of(load: Load) -> tuple[LeasedPart, ...]:
    """Return the device memory that `load` fills."""
    return tuple(LeasedPart(target.part, target.buffer) for target in load.targets)


def report_of(model: ModelId, result: LoadReport | BaseException) -> LoadReport:
    """Return the report of a load that ended well, or raise why it did not."""
    if isinstance(result, BaseException):
        raise failure_of(model, result)
    return result
