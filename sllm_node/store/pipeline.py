"""What a load is made of: what all loads share, where bytes go, where they come from."""

import asyncio
from bisect import bisect_left
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Literal

from sllm_node.core.clock import Clock
from sllm_node.core.errors import LoadFailedError, SllmError
from sllm_node.core.types import LoadReport, ModelId, Part
from sllm_node.core.units import MIB
from sllm_node.device.base import DeviceBuffer, Event
from sllm_node.store.pool import PinnedPool
from sllm_node.store.reader import FileSystem
from sllm_node.store.residency import Residency, Unit
from sllm_node.store.tier import DeviceTier

if TYPE_CHECKING:
    from sllm_node.store.loader import Load

Verify = Literal["first", "always", "never"]

MAX_ISSUED: Final = 64
"""Units from DRAM that are issued and not done, of one load."""
LINK_BYTES: Final = 192 * MIB
"""Of one load and for each of its links, under way at most: 3.5 ms at 55 GB/s. Whoever issues is
back in time, and links of several GPUs, one slower than the others, end together."""
CLONE_BYTES: Final = 256 * MIB
"""One copy between devices."""


@dataclass(frozen=True, slots=True)
class Machinery:
    """What all loads of a store share."""

    loop: asyncio.AbstractEventLoop
    clock: Clock
    pool: PinnedPool
    ledger: Residency
    readers: ThreadPoolExecutor
    checkers: ThreadPoolExecutor
    files: FileSystem
    verify: Verify
    verify_on_device: bool
    """What is checked again goes to devices unchecked, where these can check it."""
    max_reads: int
    wait_for_chunk: "Callable[[Load], bool]"
    """Call `pump` of the load when a chunk may have become free; False: none ever will."""
    chunk_given_back: Callable[[], None]
    on_eviction: Callable[[ModelId], None]
    on_ended: "Callable[[Load, LoadReport | BaseException], None]"
    """Called once for each load, before those who wait for it go on."""


class LoadCancelledError(Exception):
    """Nobody waits for the load any more. Never leaves the store."""


@dataclass(slots=True)
class Target:
    """A device that the load fills, and what it wants there."""

    number: int
    """Of its part in the placement."""
    tier: DeviceTier
    part: Part
    wants: tuple[tuple[int, int], ...]
    """Bytes [start, end) of the checkpoint, in order."""
    buffer: DeviceBuffer
    ready_to: int
    """Memory is mapped for all bytes of the checkpoint before this one."""
    mappings: tuple[tuple[int, Event], ...]
    """(ready_to, when)."""


@dataclass(frozen=True, slots=True)
class Source:
    """A replica to clone from: all of the checkpoint on one device."""

    buffer: DeviceBuffer
    done: Callable[[], None]
    """To be called when nothing is read from it any more."""


@dataclass(frozen=True, slots=True)
class Slice:
    """Bytes [start, end) of the checkpoint, of one unit, for one target."""

    target: Target
    start: int
    end: int


def failure_of(model: ModelId, error: BaseException) -> SllmError:
    """Return what those who wait for a load are told of its error."""
    if isinstance(error, SllmError):
        return error
    failure = LoadFailedError(model, str(error) or type(error).__name__)
    failure.__cause__ = error
    return failure


def within(units: Sequence[Unit], ranges: Sequence[tuple[int, int]]) -> list[Unit]:
    """Return the units that have a byte in one of `ranges`, which are sorted and apart."""
    starts = [start for start, _ in ranges]
    found = []
    for unit in units:
        at = bisect_left(starts, unit.device_end) - 1
        if at >= 0 and ranges[at][1] > unit.device_offset:
            found.append(unit)
    return found


def attempt(job: "Callable[[], object]") -> tuple[BaseException | None, object]:
    """Run `job` and return its error, or its result; in a thread."""
    try:
        return None, job()
    except BaseException as error:  # noqa: BLE001 - the root of a thread's work: handed to the loop
        return error, None


def call_on(loop: asyncio.AbstractEventLoop, tell: "Callable[..., None]", *values: object) -> None:
    """Call `tell` on the loop, from any thread; a loop that is gone has nobody to tell."""
    if not loop.is_closed():
        loop.call_soon_threadsafe(tell, *values)


def run_in(
    threads: ThreadPoolExecutor,
    loop: asyncio.AbstractEventLoop,
    job: Callable[[], object],
    tell: Callable[..., None],
) -> None:
    """Run `job` in one of `threads`; `tell(error, result)` on the loop when it has ended."""
    future = threads.submit(attempt, job)
    future.add_done_callback(lambda done: call_on(loop, tell, *done.result()))
