"""Tensors over device memory of their own, which goes back when the last of them dies.

A load's memory belongs to a `Held`. Every tensor made of it has a storage of its own, which refers
to the `Held` for as long as torch keeps the storage: a view, a detached tensor or a parameter that
outlives its module keep all of the memory, whoever holds them. When the last storage is gone, the
finalizer of the `Held` hands the memory to a `Releaser`.

A finalizer runs wherever the garbage collector happens to be called, perhaps in a thread that holds
one of our locks at that moment. So it only puts the memory into a queue; a thread takes it from
there, waits until the device has done what was enqueued (a kernel may still read the weights of a
tensor that Python has forgotten) and closes it.
"""

import logging
import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any, Final

import numpy as np
import torch

from sllm_node.core.errors import SllmError
from sllm_node.core.types import Part
from sllm_node.device.base import Device, DeviceBuffer
from sllm_node.engine.weights import torch_name

log = logging.getLogger(__name__)

_ON_DEVICE: Final = "__cuda_array_interface__"
_ON_HOST: Final = "__array_interface__"
_EXECUTOR_ENDED: Final = "cannot schedule new futures after"
"""What a device's executor says as the interpreter goes down; the memory goes with the process."""


class Held:
    """The device memory of one part of a checkpoint, for as long as anybody refers to this object."""

    def __init__(
        self, part: Part, buffer: DeviceBuffer, give_back: Callable[[DeviceBuffer], None]
    ) -> None:
        self.part = part
        array = buffer.array
        self._kind = _ON_DEVICE if hasattr(array, _ON_DEVICE) else _ON_HOST
        self._address = int(getattr(array, self._kind)["data"][0])
        finalizer = weakref.finalize(self, give_back, buffer)
        finalizer.atexit = False  # the memory goes with the process

    def has(self, start: int, end: int) -> bool:
        """Tell whether bytes [start, end) of the checkpoint are here."""
        return self.part.start <= start and end <= self.part.end

    def tensor(self, start: int, end: int) -> torch.Tensor:
        """Return bytes [start, end) of the checkpoint as a tensor with a storage of its own."""
        device = torch_name(self.part.device)
        if start == end:
            return torch.empty(0, dtype=torch.uint8, device=device)
        place = _Slice(self, self._kind, self._address + start - self.part.start, end - start)
        return torch.as_tensor(
            place if self._kind == _ON_DEVICE else np.asarray(place), device=device
        )


class _Slice:
    """What a storage refers to: an address, described as torch or numpy read it, and its owner."""

    def __init__(self, owner: Held, kind: str, address: int, size: int) -> None:
        self._owner = owner
        described = {"shape": (size,), "typestr": "|u1", "data": (address, False), "version": 3}
        setattr(self, kind, described)


@dataclass(frozen=True, slots=True)
class _Given:
    device: Device
    buffer: DeviceBuffer


class Releaser:
    """A thread that closes device memory nobody refers to any more."""

    def __init__(self) -> None:
        self._queue: SimpleQueue[_Given | threading.Event | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="sllm-release", daemon=True)
        self._thread.start()

    def take(self, device: Device) -> Callable[[DeviceBuffer], None]:
        """Return what gives memory of `device` back, from any thread and any finalizer."""
        put = self._queue.put

        def give_back(buffer: DeviceBuffer) -> None:
            put(_Given(device, buffer))

        return give_back

    def settle(self) -> None:
        """Return when all memory that was given back so far is free."""
        reached = threading.Event()
        self._queue.put(reached)
        reached.wait()

    def close(self) -> None:
        """Release what was given back, then stop."""
        self._queue.put(None)
        self._thread.join()

    def _run(self) -> None:
        given: Any
        while (given := self._queue.get()) is not None:
            if isinstance(given, threading.Event):
                given.set()
                continue
            try:
                given.device.check()
                given.buffer.close()
            except (SllmError, RuntimeError) as error:
                if not str(error).startswith(_EXECUTOR_ENDED):
                    log.warning("device memory not given back", extra={"error": str(error)})
            del given
