"""The loader of a program: our store behind synchronous, thread-safe calls.

One thread runs an event loop, and with it a store for each kind of device: the CPU's, and that of
all GPUs used. A store, with its pinned pool, is opened by the first load that needs it, a device by
the first load onto it. What a load brought is handed over to its caller at once, so each load has
memory of its own, and nothing that the caller does to it is ever seen by another load. The pool
keeps what fits of the checkpoints loaded, so a second load may not have to read at all.
"""

import asyncio
import atexit
import os
import threading
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final, Generic, TypeVar

import uvloop

from sllm_node.checkpoint.catalog import Checkpoint
from sllm_node.checkpoint.index import TensorIndex
from sllm_node.core.clock import MonotonicClock
from sllm_node.core.config import ByteSize, StoreConfig
from sllm_node.core.errors import ArgumentError, LoadFailedError, ModelNotFoundError, SllmError
from sllm_node.core.metrics import Metrics
from sllm_node.core.types import LoadProgress, ModelId, Placement, Tier
from sllm_node.core.units import GIB
from sllm_node.device.base import Device
from sllm_node.library.devices import gpu_names, open_device, physical_memory
from sllm_node.library.memory import Held, Releaser
from sllm_node.store.store import Store

POOL_BYTES_MAX: Final = GIB
"""Of the pool, unless another size is asked for."""
_POOL_SHARE: Final = 16
"""The pool takes at most this part of the machine's memory by itself."""
_POOL_CHUNKS: Final = 8
"""A pool has at least so many chunks if it can, so that reads and copies overlap."""
_TICK_S: Final = 0.1
"""Between two looks at the progress of a load."""

ResultT = TypeVar("ResultT")
MadeT = TypeVar("MadeT")
Watch = Callable[[LoadProgress], None]


@dataclass(frozen=True, slots=True)
class Loaded(Generic[MadeT]):
    """What a load brought, and what its caller made meanwhile."""

    parts: tuple[Held, ...]
    made: MadeT


@dataclass(slots=True)
class _Checkpoints:
    """The checkpoints that loads are about; a store looks them up by their folders."""

    known: dict[ModelId, Checkpoint] = field(default_factory=dict)

    def get(self, model: ModelId) -> Checkpoint:
        if model not in self.known:
            raise ModelNotFoundError(model)
        return self.known[model]


@dataclass(frozen=True, slots=True)
class _Open:
    """A store, and how its pool is cut."""

    store: Store
    pool_bytes: int
    chunk_bytes: int


class Loader:
    """Loads checkpoints from any thread; open until `close`."""

    def __init__(
        self,
        open_one: Callable[[str], Device] = open_device,
        gpus: Callable[[], Sequence[str]] = gpu_names,
    ) -> None:
        self.gpus = gpus
        self._open_one = open_one
        self._opening = threading.Lock()
        self._devices: dict[str, Device] = {}
        self._releaser = Releaser()
        self._checkpoints = _Checkpoints()
        self._stores: dict[str, _Open] = {}
        """By kind of device."""
        self._stores_lock = asyncio.Lock()
        self._turns: dict[ModelId, asyncio.Lock] = {}
        self._loop = uvloop.new_event_loop()
        self._thread = threading.Thread(
            target=self._loop.run_forever, name="sllm-load", daemon=True
        )
        self._thread.start()

    # --- devices ------------------------------------------------------------------------------

    def device(self, name: str) -> Device:
        """Return the device `name`, opening it the first time.

        Raises:
            DeviceError: there is no such device.
        """
        with self._opening:
            if name not in self._devices:
                self._devices[name] = self._open_one(name)
            return self._devices[name]

    def free_bytes(self, name: str) -> int:
        """Return the memory that a load onto device `name` can have now."""
        device = self.device(name)
        self._releaser.settle()
        return device.free_bytes()

    def memory_used(self, name: str) -> int:
        """Return the memory of device `name` that loads have taken and not given back."""
        device = self.device(name)
        self._releaser.settle()
        return device.memory_used

    # --- loads --------------------------------------------------------------------------------

    def load(
        self,
        checkpoint: Checkpoint,
        placement: Placement,
        *,
        pool_bytes: int | None = None,
        watch: Watch | None = None,
        meanwhile: Callable[[], MadeT],
    ) -> Loaded[MadeT]:
        """Bring `checkpoint` where `placement` says, and call `meanwhile` while it comes.

        An exception in this thread (KeyboardInterrupt) cancels the load and waits until its memory
        is free again.

        Raises:
            ArgumentError: a pool of another size is open.
            CheckpointError: its files are damaged, changed or unreadable.
            DeviceMemoryError: no room on a device.
        """
        for part in placement:
            self.device(part.device)
        self._releaser.settle()  # what was let go of before this call is room for it
        work = self._load(checkpoint, placement, pool_bytes)

        def tick() -> None:
            if watch is not None:
                self._show(checkpoint.model, placement, watch)

        made: list[MadeT] = []
        parts = self._run(work, lambda: made.append(meanwhile()), None if watch is None else tick)
        return Loaded(parts, made[0])

    def close_pools(self) -> None:
        """Give the pinned memory back. Loads under way fail; models and tensors stay."""
        self._run(self._close_stores())

    def close(self) -> None:
        """Give everything back but the memory of tensors that are still alive."""
        if self._loop.is_closed():
            return
        with suppress(SllmError, RuntimeError):  # the interpreter may be going down
            self._run(self._close_stores())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
        self._releaser.close()
        for device in self._devices.values():
            if not device.memory_used:
                device.close()

    # --- on the loop --------------------------------------------------------------------------

    async def _load(
        self, checkpoint: Checkpoint, placement: Placement, pool_bytes: int | None
    ) -> tuple[Held, ...]:
        model = checkpoint.model
        async with self._stores_lock:
            store = await self._store_for(checkpoint, placement, pool_bytes)
        async with self._turns.setdefault(model, asyncio.Lock()):
            self._checkpoints.known[model] = checkpoint
            try:
                parts = store.hand_over(await store.acquire(model, placement))
            except BaseException:
                await store.settled(model)
                # A load that ended just before it was cancelled has left a replica of nobody.
                store.evict(model, Tier.DEVICE, "failed")
                store.forget(model)
                raise
        return tuple(
            Held(one.part, one.buffer, self._releaser.take(self._devices[one.part.device]))
            for one in parts
        )

    async def _store_for(
        self, checkpoint: Checkpoint, placement: Placement, pool_bytes: int | None
    ) -> Store:
        devices = [self._devices[part.device] for part in placement]
        kind = kind_of(placement[0].device)
        if kind not in self._stores:
            size = default_pool_bytes() if pool_bytes is None else pool_bytes
            config = _store_config(size, checkpoint.index.chunk_bytes)
            store = Store(self._checkpoints, devices, config, MonotonicClock(), Metrics())
            await store.start()
            self._stores[kind] = _Open(store, size, config.chunk_bytes)
        found = self._stores[kind]
        _check_pool(found, pool_bytes, checkpoint)
        for device in devices:
            if device.name not in found.store.capacities():
                found.store.add_device(device)
        return found.store

    async def _close_stores(self) -> None:
        async with self._stores_lock:
            stores, self._stores = self._stores, {}
            for one in stores.values():
                await one.store.close()

    def _show(self, model: ModelId, placement: Placement, watch: Watch) -> None:
        found = self._stores.get(kind_of(placement[0].device))
        progress = None if found is None else found.store.progress(model)
        if progress is not None:
            watch(progress)

    # --- from other threads -------------------------------------------------------------------

    def _run(
        self,
        work: Coroutine[Any, Any, ResultT],
        meanwhile: Callable[[], None] = lambda: None,
        tick: Callable[[], None] | None = None,
    ) -> ResultT:
        """Carry `work` out on the loop while this thread does `meanwhile`, then waits."""
        done: Future[ResultT] = Future()
        tasks: list[asyncio.Task[ResultT]] = []

        def begin() -> None:
            tasks.append(self._loop.create_task(work))
            tasks[0].add_done_callback(partial(_pass_on, done))

        def cancel() -> None:
            tasks[0].cancel()

        try:
            self._loop.call_soon_threadsafe(begin)
            meanwhile()
            return _wait(done, tick)
        except BaseException:
            if not done.done():
                self._loop.call_soon_threadsafe(cancel)
                done.exception()
            raise


def _pass_on(done: "Future[ResultT]", task: "asyncio.Task[ResultT]") -> None:
    if task.cancelled():
        done.set_exception(LoadFailedError("", "the load was cancelled"))
    elif (error := task.exception()) is not None:
        done.set_exception(error)
    else:
        done.set_result(task.result())


def _wait(done: "Future[ResultT]", tick: Callable[[], None] | None) -> ResultT:
    while tick is not None and not done.done():
        with suppress(TimeoutError):
            done.exception(_TICK_S)
        tick()
    return done.result()


def kind_of(device: str) -> str:
    """Return the kind of a device: all devices of a store are of one."""
    return device.partition(":")[0]


def default_pool_bytes() -> int:
    """Return the size of a pool that nobody has asked another size of."""
    return min(POOL_BYTES_MAX, physical_memory() // _POOL_SHARE)


def _check_pool(found: _Open, pool_bytes: int | None, checkpoint: Checkpoint) -> None:
    """Refuse what the pool that is open can't do."""
    problem = None
    if pool_bytes not in (None, found.pool_bytes):
        problem = f"{pool_bytes} bytes asked for, and one of {found.pool_bytes} is open"
    elif not _fits(checkpoint.index, found.chunk_bytes):
        problem = (
            f"{checkpoint.path} has chunks of {checkpoint.index.chunk_bytes} bytes, which don't "
            f"fill those of the pool that is open ({found.chunk_bytes})"
        )
    if problem is not None:
        raise ArgumentError("pool_bytes", f"{problem}; call release_pool() before this load")


def _fits(index: TensorIndex, chunk_bytes: int) -> bool:
    """Tell whether chunks of the pool hold file chunks, and raw ones without a gap."""
    if index.is_encoded:
        return index.chunk_bytes <= chunk_bytes
    return chunk_bytes % index.chunk_bytes == 0


def _store_config(pool_bytes: int, file_chunk_bytes: int) -> StoreConfig:
    """Return the config of a store whose pool chunks hold whole file chunks."""
    wanted = min(StoreConfig().chunk_bytes, pool_bytes // _POOL_CHUNKS)
    chunk = max(1, wanted // file_chunk_bytes) * file_chunk_bytes
    if pool_bytes < 2 * chunk:
        raise ArgumentError(
            "pool_bytes",
            f"{pool_bytes} bytes are too few for this checkpoint: {2 * chunk} at least",
        )
    # No relays: they would take staging memory of GPUs that belong to other work.
    return StoreConfig(pool_bytes=ByteSize(pool_bytes), chunk_bytes=ByteSize(chunk), relay=False)


# --- the one of this process --------------------------------------------------------------------


class _Process:
    """The loader that all calls of this process share; a forked child gets one of its own."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._loader: Loader | None = None
        self._of_parent: list[Loader] = []
        """Never touched in a child, where their threads are missing, but for being kept."""
        os.register_at_fork(after_in_child=self._on_forked)

    def loader(self) -> Loader:
        """Return the loader, opening it the first time."""
        with self._lock:
            if self._loader is None:
                self._loader = Loader()
                atexit.register(self._loader.close)
            return self._loader

    def release_pool(self) -> None:
        """Give the pinned memory back, if there is any."""
        if self._loader is not None:
            self._loader.close_pools()

    def _on_forked(self) -> None:
        self._lock = threading.Lock()
        if self._loader is not None:
            atexit.unregister(self._loader.close)
            self._of_parent.append(self._loader)
            self._loader = None


PROCESS: Final = _Process()
