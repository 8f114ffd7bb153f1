"""One node: what it is made of, in which order it starts, and how it drains.

Start: device, store (takes the pinned pool), service, server; then preloads, beside serving.
Stop: no new requests, running sessions finish within `node.drain_s`, then everything is closed in
the reverse order. A second signal ends the wait. The exit status after a drain is 0, also when
sessions had to be ended.
"""

import asyncio
import gc
import logging
import signal
from collections.abc import Coroutine, Mapping, Sequence
from contextlib import AsyncExitStack, nullcontext, suppress
from functools import partial
from pathlib import Path
from typing import Any

import uvloop

from sllm_node import __version__
from sllm_node.checkpoint.cards import CARDS_FOLDER
from sllm_node.checkpoint.catalog import Catalog
from sllm_node.checkpoint.temporary import sweep
from sllm_node.cluster.cluster import Cluster, Disk
from sllm_node.cluster.journal import Journal
from sllm_node.cluster.router import Router
from sllm_node.cluster.wishes import Reach, Wishes
from sllm_node.core import log as logs
from sllm_node.core.clock import Clock, MonotonicClock
from sllm_node.core.config import Config
from sllm_node.core.errors import ModelNotFoundError, SllmError, StoreFolderError
from sllm_node.core.metrics import Metrics
from sllm_node.core.types import ModelId, ModelState, Tier
from sllm_node.core.units import format_size
from sllm_node.device.base import Device
from sllm_node.engine.engines import Engines
from sllm_node.node.devices import open_devices
from sllm_node.node.kept import KeptPins, journal_path
from sllm_node.node.monitor import Monitor
from sllm_node.node.systemd import Notifier
from sllm_node.schedule.driver import Service
from sllm_node.server.app import Edge, Server
from sllm_node.store.remote import RemoteTier
from sllm_node.store.store import Store

log = logging.getLogger(__name__)

STOP_SLACK_S = 15.0
"""Seconds beyond the drain limit that systemd is asked for, to close what is open."""


class Node:
    """The parts of one node. `start`, then `stop` once."""

    def __init__(self, config: Config, notifier: Notifier, clock: Clock) -> None:
        self._config = config
        self._notifier = notifier
        self._clock = clock
        self._started = clock.now()
        self._metrics = Metrics()
        self._remote = _remote_tier(config, self._metrics)
        self._catalog = Catalog(
            Path(config.store.path), None if self._remote is None else self._remote.cards
        )
        self._devices: tuple[Device, ...] = ()
        self._store: Store
        self._engines: Engines
        self._closing = AsyncExitStack()
        self._journal: Journal
        self._pins: KeptPins
        self._service: Service[Any]
        self._cluster: Cluster[Any] | None = None
        self.url = ""

    async def start(self) -> None:
        """Take memory, listen, tell systemd.

        Raises:
            SllmError: the store folder, the journal, the pool or the address can't be had.
        """
        self._open_store_folder()
        await self._open_journal()
        self._open_devices()
        if self._remote is not None:
            self._closing.push_async_callback(self._remote.close)
        await self._store.start()
        self._closing.push_async_callback(self._store.close)
        self._service = Service(
            self._config, self._catalog, self._store, self._engines, self._clock, self._metrics
        )
        self._closing.push_async_callback(self._service.close)
        self._service.pins = self._pins
        limit = self._config.store.relay_max_sessions
        self._store.lend_links(lambda device: self._service.running_on(device) > limit)
        await self._warm()
        await self._join_cluster()
        server = Server(
            Edge(
                service=self._front,
                config=self._config.server,
                clock=self._clock,
                metrics=self._metrics,
                stalled=self._engines.stalled,
                overview=self._overview,
                wishes=self._wishes,
                catalog=self._catalog,
                pull=self._pull,
                explain=None if self._cluster is None else self._cluster.router.explain,
            )
        )
        self.url = await server.start()
        self._closing.push_async_callback(server.close)
        self._watch()
        self._freeze_heap()
        self._metrics.ready.set(1)
        self._notifier.ready(f"{self.url}, {self._describe()}")
        log.info("serving", extra={"url": self.url, **self._sizes()})
        self._preload()

    async def stop(self, hurry: asyncio.Event) -> None:
        """Drain within the limit, or until `hurry` is set; then close everything."""
        limit_s = self._config.node.drain_s
        self._metrics.ready.set(0)
        self._notifier.stopping("draining", limit_s + STOP_SLACK_S)
        self._service.begin_stop()  # before anything else has its turn
        self._front.drain()
        hurrying = asyncio.create_task(hurry.wait())
        draining = asyncio.create_task(self._front.drained(limit_s))
        hurrying.add_done_callback(lambda _: draining.cancel())
        try:
            ended = await draining
        except asyncio.CancelledError:
            ended = 0  # told to hurry: closing the service ends the sessions
        hurrying.cancel()
        log.info("drained", extra={"sessions_ended": ended})
        await self._closing.aclose()
        log.info("stopped")

    def is_on_device(self, model: ModelId) -> bool:
        """Tell whether `model` is on the device or coming there."""
        return self._service.status(model).state is not ModelState.IDLE

    def reload(self) -> None:
        """Read the cluster file again."""
        if self._cluster is not None:
            self._cluster.peers.reload()

    async def close(self) -> None:
        """Close what a start that failed has opened."""
        await self._closing.aclose()

    def _freeze_heap(self) -> None:
        """Take what is there out of the collector's sight: its full turns would hold all streams up."""
        gc.collect()
        gc.freeze()
        self._closing.callback(gc.unfreeze)

    def _open_store_folder(self) -> None:
        folder = Path(self._config.store.path)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if swept := sweep(folder) + sweep(folder / CARDS_FOLDER):
                log.info("swept what writers left", extra={"folders": swept})
            self._catalog.scan()
        except OSError as error:
            raise StoreFolderError(str(folder), error.strerror or str(error)) from error
        for name, problem in self._catalog.problems.items():
            log.warning("checkpoint not usable", extra={"model": name, "problem": str(problem)})

    async def _open_journal(self) -> None:
        self._journal = await Journal.open(journal_path(self._config))
        self._closing.push_async_callback(self._journal.close)
        self._pins = KeptPins(self._journal)
        if self._journal.damage is not None:
            self._metrics.journals_set_aside.inc()

    def _open_devices(self) -> None:
        config, clock, metrics = self._config, self._clock, self._metrics
        self._devices = open_devices(config.device, self._notifier)
        for device in self._devices:
            self._closing.callback(device.close)
        self._store = Store(
            self._catalog, self._devices, config.store, clock, metrics, remote=self._remote
        )
        self._engines = Engines(self._devices, self._store, config.engine, clock, metrics)
        self._closing.callback(self._engines.close)

    @property
    def _front(self) -> "Service[Any] | Router[Any]":
        """What the server talks to."""
        return self._service if self._cluster is None else self._cluster.router

    @property
    def _wishes(self) -> Wishes:
        if self._cluster is not None:
            return self._cluster.wishes
        reach = Reach(me=self._config.node.id)
        return Wishes(self._journal, self._service.status, reach, self._clock.wall)

    async def _join_cluster(self) -> None:
        if self._config.cluster.file:
            assert self._remote is not None
            self._cluster = Cluster(
                self._config,
                self._service,
                self._engines.load_codec,
                Disk(self._catalog, self._remote, self._journal),
                self._clock,
                self._metrics,
            )
            self._closing.push_async_callback(self._cluster.close)
            await self._cluster.start()

    async def _warm(self) -> None:
        """Import what the models of the store need, so that no first request pays for it."""
        checkpoints = []
        for model in self._catalog.models():
            with suppress(SllmError):  # gone since the scan
                checkpoints.append(self._catalog.get(model))
        await self._engines.warm(checkpoints)

    def _preload(self) -> None:
        """Ask for the config's models and pinned ones; after a look at the remotes if one is there."""
        pins = self._pins.models()
        wanted = {*pins, *(name for name, model in self._config.models.items() if model.preload)}
        is_here = wanted.issubset(self._catalog.models())
        preload = partial(self._service.preload, pins)
        if is_here or self._remote is None:
            preload()
        if self._remote is not None:
            then = (lambda: None) if is_here else preload
            self._run_beside(self._remote.keep_fresh(then), "remotes")

    def _watch(self) -> None:
        monitor = Monitor(
            self._clock, self._metrics, self._notifier, self._engines.stalled, self._describe
        )
        self._run_beside(monitor.run(), "monitor")

    def _run_beside(self, work: Coroutine[None, None, None], name: str) -> None:
        """Run `work` from now until the node closes."""
        task = asyncio.create_task(work, name=name)

        async def end() -> None:
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task

        self._closing.push_async_callback(end)

    async def _pull(self, model: str) -> None:
        if self._cluster is not None and not self._cluster.fetching.is_here(model):
            with suppress(ModelNotFoundError):  # a remote may have it since
                await self._cluster.fetching.ensure(model)
        acts = None if self._cluster is None else self._cluster.router.acts
        with nullcontext() if acts is None else acts.telling(model, is_wanted=True):
            if self._remote is not None:
                await self._remote.pull(model)

    # --- what is shown ------------------------------------------------------------------------

    def _describe(self) -> str:
        """Return one line for `systemctl status`."""
        health = self._service.health()
        state = "draining" if self._service.is_draining else "serving"
        devices = describe_devices([self._device_overview(device) for device in self._devices])
        return (
            f"{state} {len(self._catalog.models())} models, {health['running']} sessions run, "
            f"{health['waiting']} wait, {devices}"
        )

    def _overview(self) -> dict[str, Any]:
        """Return the node's own part of /admin/status."""
        store = self._store
        tiers = (Tier.REMOTE, Tier.NVME, Tier.DRAM)
        bandwidth = {tier.value: store.bandwidth(tier) for tier in tiers}
        return {
            "node": {
                "id": self._config.node.id,
                "version": __version__,
                "state": "draining" if self._service.is_draining else "serving",
                "uptime_s": self._clock.now() - self._started,
            },
            "devices": [self._device_overview(device) for device in self._devices],
            "pool": {
                "chunks": store.pool_chunks,
                "used": store.pool_chunks_used,
                "lent": store.pool_chunks_lent,
                "chunk_bytes": self._config.store.chunk_bytes,
            },
            "bandwidth": bandwidth,
            "unusable": {name: str(error) for name, error in self._catalog.problems.items()},
            "failures": self._service.failures(),
            "remotes": self._remotes(),
            "cluster": None if self._cluster is None else self._cluster.status(),
        }

    def _remotes(self) -> list[dict[str, Any]]:
        """Return how the remotes stand, and the peers if models of theirs are known."""
        found = [] if self._remote is None else self._remote.status()
        peers = None if self._cluster is None else self._cluster.fetching.status()
        return [*found, peers] if peers is not None and peers["models"] else found

    def _device_overview(self, device: Device) -> dict[str, Any]:
        cached = self._store.cached_bytes(device.name)
        return {
            "name": device.name,
            "used": device.memory_used - cached,
            "cached": cached,
            "total": device.memory_total,
            "sessions": self._service.running_on(device.name),
        }

    def _sizes(self) -> dict[str, Any]:
        return {
            "node": self._config.node.id,
            "version": __version__,
            "models": len(self._catalog.models()),
            "devices": [device.name for device in self._devices],
            "device_bytes": sum(device.memory_total for device in self._devices),
            "pool_bytes": self._store.pool_chunks * self._config.store.chunk_bytes,
        }


def describe_devices(devices: Sequence[Mapping[str, Any]]) -> str:
    """Return in words what is used and cached of `devices`, as the status has them, together."""
    used, cached, total = (
        format_size(sum(device[key] for device in devices)) for key in ("used", "cached", "total")
    )
    return f"device {used} of {total} used, {cached} cached"


def _remote_tier(config: Config, metrics: Metrics) -> RemoteTier | None:
    if not config.remotes and not config.cluster.file:
        return None
    return RemoteTier(config.remotes, config.store, metrics)


async def _serve(config: Config) -> None:
    loop = asyncio.get_running_loop()
    stop, hurry = asyncio.Event(), asyncio.Event()

    def on_signal() -> None:
        if stop.is_set():
            hurry.set()
        stop.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal)
    node = Node(config, Notifier(), MonotonicClock())
    loop.add_signal_handler(signal.SIGHUP, node.reload)
    try:
        await node.start()
    except BaseException:
        await node.close()
        raise
    await stop.wait()
    await node.stop(hurry)


def run(config: Config) -> None:
    """Serve until SIGTERM or SIGINT; the caller's thread becomes the event loop's.

    Raises:
        SllmError: the node can't start.
    """
    logs.configure(config.log.level, config.log.format)
    uvloop.run(_serve(config))
