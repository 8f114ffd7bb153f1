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
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from concurrent.futures import Future
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final, Generic, TypeVar

import uvloop

from sllm_node.checkpoint.catalog import Checkpoint
from sllm_node.core.clock import MonotonicClock
from sllm_node.core.errors import LoadFailedError, ModelNotFoundError, SllmError
from sllm_node.core.metrics import Metrics
from sllm_node.core.types import LoadProgress, ModelId, Placement, Tier
from sllm_node.device.base import Device
from sllm_node.library.devices import gpu_names, open_device
from sllm_node.library.memory import Held, Releaser
from sllm_node.library.opened import OpenStore, default_pool_bytes, store_config
from sllm_node.store.store import Store

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


@dataclass(slots=True)
class _Turn:
    """Of loads of one folder, one after another."""

    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    users: int = 0


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
        self._stores: dict[str, OpenStore] = {}
        """By kind of device."""
        self._stores_lock = asyncio.Lock()
        self._turns: dict[ModelId, _Turn] = {}
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
        async with self._turn(checkpoint.model):
            async with self._stores_lock:
                found = await self._store_for(checkpoint, placement, pool_bytes)
            # From here to the load's begin nothing waits: the store is open until then.
            self._checkpoints.known[checkpoint.model] = checkpoint
            parts = await found.bring(checkpoint.model, placement)
        return tuple(
            Held(one.part, one.buffer, self._releaser.take(self._devices[one.part.device]))
            for one in parts
        )

    @asynccontextmanager
    async def _turn(self, model: ModelId) -> AsyncIterator[None]:
        """Wait for other loads of `model`; what nobody needs behind them is forgotten."""
        turn = self._turns.setdefault(model, _Turn())
        turn.users += 1
        try:
            async with turn.lock:
                yield
        finally:
            turn.users -= 1
            if not turn.users:
                del self._turns[model]
            self._forget_unused()

    def _forget_unused(self) -> None:
        """Forget checkpoints that nobody loads, and of which no pool has anything."""
        stores = [one.store for one in self._stores.values()]
        for model in [one for one in self._checkpoints.known if one not in self._turns]:
            if not any(store.residency(model)[Tier.DRAM] for store in stores):
                for store in stores:
                    store.forget(model)
                del self._checkpoints.known[model]

    async def _store_for(
        self, checkpoint: Checkpoint, placement: Placement, pool_bytes: int | None
    ) -> OpenStore:
        devices = [self._devices[part.device] for part in placement]
        kind = kind_of(placement[0].device)
        if kind not in self._stores:
            size = default_pool_bytes() if pool_bytes is None else pool_bytes
            config = store_config(size, checkpoint.index.chunk_bytes)
            store = Store(self._checkpoints, devices, config, MonotonicClock(), Metrics())
            await store.start()
            self._stores[kind] = OpenStore(store, size, config.chunk_bytes)
        found = self._stores[kind]
        found.check(pool_bytes, checkpoint)
        for device in devices:
            if device.name not in found.store.capacities():
                found.store.add_device(device)
        return found

    async def _close_stores(self) -> None:
        """End loads under way, each with its own error, and close all stores.

        Raises:
            SllmError: that of the first store that could not be closed.
        """
        failures: list[SllmError] = []
        async with self._stores_lock:
            for kind, found in list(self._stores.items()):
                try:
                    await found.close()
                except SllmError as error:
                    failures.append(error)
                del self._stores[kind]
            self._forget_unused()
        if failures:
            raise failures[0]

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
