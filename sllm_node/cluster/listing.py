"""This node's part in the directory: registered under a lease, peers taken from it, all of it remembered.

`DirectoryLink` speaks to etcd; this carries its news on. Listed peers go to `Peers`, whose heartbeats say
who is alive. What the directory has goes to the journal, too, so a node that starts while etcd is gone
begins with the last known peers and desired replicas. Nothing that serves waits for etcd or the journal.
"""

import asyncio
import logging
import secrets
import ssl
from collections.abc import Iterable, Iterator
from contextlib import AsyncExitStack, suppress
from pathlib import Path
from typing import Any, Final

from sllm_node.cluster.directory import (
    BackAgain,
    BadRecord,
    CutOff,
    Directory,
    Farewell,
    IdTaken,
    News,
    NodeListed,
    NodeUnlisted,
    Standing,
)
from sllm_node.cluster.directory_keys import NodeRecord, SharedRecord
from sllm_node.cluster.directory_link import DirectoryLink, LinkOptions
from sllm_node.cluster.etcd import EtcdClient, EtcdOptions
from sllm_node.cluster.file import DirectoryConfig
from sllm_node.cluster.journal import Journal
from sllm_node.cluster.named_files import used_path
from sllm_node.cluster.peers import Peers, Place
from sllm_node.cluster.records import Change, Desired, Drop, KnownPeer, Put, Record, Registration
from sllm_node.cluster.registered import Registered
from sllm_node.core.clock import Clock
from sllm_node.core.errors import ConfigError, JournalError
from sllm_node.core.hosts import address_problem
from sllm_node.core.metrics import Metrics
from sllm_node.core.types import ModelId, NodeId

log = logging.getLogger(__name__)

_GRACE_LEASES: Final = 2
"""In leases: how long a peer is kept that a directory lacks which was lost and is back."""


class Listing:
    """Begun by `start`, ended by `close`; asked in between."""

    def __init__(
        self, place: Place, address: str, peers: Peers, journal: Journal, clock: Clock,
        metrics: Metrics,
    ) -> None:  # fmt: skip
        """Read the files of [directory].

        Raises:
            ConfigError: a password or certificate can't be used.
        """
        config = place.cluster.directory
        self._options = etcd_options(config, place.path, place.me)
        me = NodeRecord(place.me, address, place.boot)
        known = (peer for _, peer in sorted(journal.records.peers.items()))
        self._directory = Directory(me, known, float(_GRACE_LEASES * config.lease_s))
        self._client = EtcdClient(self._options)
        draw = secrets.SystemRandom().random
        self._link = DirectoryLink(
            self._client, self._directory, LinkOptions(config.lease_s), clock, draw, self._on_news
        )
        self._peers = peers
        self._journal = journal
        self._metrics = metrics
        self.registered: Registered | None = None
        """Who makes registered models known here, if anybody."""
        self._models: dict[ModelId, str] = {}
        """Those that are registered, each with its address, as was told last."""
        self._problem = ""
        self._has_read = False
        self._is_dirty = False
        self._writing: asyncio.Task[None] | None = None
        self._closing = AsyncExitStack()

    # --- life ---------------------------------------------------------------------------------

    async def start(self) -> None:
        """Begin with the last known peers; follow the directory from now on."""
        for peer in self._directory.peers():
            self._list(peer.node, peer.address)
        self._tell_models(self._journal.records.registrations.values())
        await self._closing.enter_async_context(self._client)
        task = asyncio.create_task(self._link.run(), name="directory")
        task.add_done_callback(_log_end)

        async def end() -> None:
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task
            with suppress(TimeoutError):
                async with asyncio.timeout(self._options.timeout_s):
                    await self._link.leave()

        self._closing.push_async_callback(end)

    async def close(self) -> None:
        """Leave the directory, if it answers; finish what is being remembered."""
        await self._closing.aclose()
        if self.registered is not None:
            await self.registered.close()
        if self._writing is not None:
            await self._writing

    # --- what can be asked --------------------------------------------------------------------

    def desired(self) -> tuple[Desired, ...]:
        """Return the replicas that the directory wishes for; the last known ones until it was read."""
        if self._has_read:
            return self._directory.desired()
        return tuple(self._journal.records.desired.values())

    def registrations(self) -> tuple[Registration, ...]:
        """Return the models that the directory registers."""
        return self._directory.registrations()

    async def put(self, record: SharedRecord) -> None:
        """Register a model or desire replicas of it, on all nodes.

        Raises:
            EtcdError: it is not done.
        """
        await self._link.put(record)

    async def drop(self, record: SharedRecord) -> None:
        """Do that no more.

        Raises:
            EtcdError: it is not done.
        """
        await self._link.drop(record)

    def status(self) -> dict[str, Any]:
        """Return how this node stands with the directory, for `status --cluster`."""
        return {
            "endpoint": self._client.endpoint,
            "state": self._directory.standing.value,
            "registered": not self._directory.needs_registration,
            "problem": self._problem,
            "nodes": [
                {"id": peer.node, "address": peer.address, "stale": peer.is_stale}
                for peer in self._directory.peers()
            ],
            "models": [
                {"id": one.model, "url": one.url} for one in self._directory.registrations()
            ],
        }

    # --- news ---------------------------------------------------------------------------------

    def _on_news(self, news: News) -> None:
        match news:
            case NodeListed(record):
                self._list(record.node, record.address)
            case NodeUnlisted(node, why):
                log.info("peer not listed any more", extra={"peer": node, "why": why.value})
                self._peers.unlist(node, has_left=why is Farewell.LEFT)
            case BackAgain():
                self._has_read, self._problem = True, ""
                log.info("directory followed", extra={"endpoint": self._client.endpoint})
            case CutOff(problem):
                self._problem = problem
                log.warning("directory gone, what is known stays", extra={"problem": problem})
            case BadRecord(key, problem):
                log.warning("directory record passed over", extra={"key": key, "problem": problem})
            case IdTaken(boot):
                log.error("another node has this node's id", extra={"boot": boot})
            case _:
                log.info("directory record changed", extra={"record": str(news)})
        self._metrics.directory_followed.set(self._directory.standing is Standing.FOLLOWING)
        self._metrics.directory_nodes.set(len(self._directory.peers()))
        if self._has_read:
            self._tell_models(self._directory.registrations())
        self._remember()

    def _tell_models(self, found: Iterable[Registration]) -> None:
        models = {one.model: one.url for one in found}
        if models != self._models:
            self._models = models
            if self.registered is not None:
                self.registered.set(models)

    def _list(self, node: NodeId, address: str) -> None:
        if (problem := address_problem(address)) is not None:
            fields = {"peer": node, "address": address, "problem": problem}
            log.warning("listed peer passed over", extra=fields)
            return
        log.info("peer listed", extra={"peer": node, "address": address})
        self._peers.list_peer(node, address)

    # --- remembering --------------------------------------------------------------------------

    def _remember(self) -> None:
        """Bring the journal to what the directory has, soon."""
        self._is_dirty = True
        if self._writing is None or self._writing.done():
            self._writing = asyncio.create_task(self._write(), name="directory journal")

    async def _write(self) -> None:
        while self._is_dirty:
            self._is_dirty = False
            try:
                if changes := tuple(self._changes()):
                    await self._journal.write(*changes)
            except JournalError as error:
                log.warning("directory not remembered", extra={"problem": str(error)})

    def _changes(self) -> Iterator[Change]:
        """Yield what the journal lacks; nothing is taken out of it by a directory that was not read."""
        peers = (KnownPeer(peer.node, peer.address) for peer in self._directory.peers())
        yield from self._of(KnownPeer, {peer.node: peer for peer in peers})
        yield from self._of(Desired, {wish.model: wish for wish in self._directory.desired()})
        models = {model.model: model for model in self._directory.registrations()}
        yield from self._of(Registration, models)

    def _of(
        self, kind: type[Record], found: dict[NodeId, KnownPeer] | dict[ModelId, Any]
    ) -> Iterator[Change]:
        kept = self._journal.records.of(kind)
        for key, record in sorted(found.items()):
            if kept.get(key) != record:
                yield Put(record)
        if self._has_read:
            yield from (Drop(kind, key) for key in sorted(kept.keys() - found.keys()))


def etcd_options(config: DirectoryConfig, file: Path, me: NodeId) -> EtcdOptions:
    """Read what [directory] names.

    Raises:
        ConfigError: a password or certificate can't be used.
    """
    try:
        password = ""
        if config.password_file is not None:
            path = used_path(file, me, "directory.password_file", config.password_file)
            password = path.read_text(encoding="utf-8").removesuffix("\n")
        tls = _tls(config, file, me)
    except (OSError, ValueError) as error:
        raise ConfigError(str(file), (f"directory: {error}",)) from error
    return EtcdOptions(
        config.endpoints, config.prefix, config.user, password, tls, config.timeout_s
    )


def _tls(config: DirectoryConfig, file: Path, me: NodeId) -> ssl.SSLContext | None:
    if not all(endpoint.startswith("https:") for endpoint in config.endpoints):
        return None
    ca = None
    if config.ca_file is not None:
        ca = used_path(file, me, "directory.ca_file", config.ca_file)
    context = ssl.create_default_context(ssl.Purpose.SERVER_AUTH, cafile=ca)
    if config.certificate_file is not None and config.private_key_file is not None:
        context.load_cert_chain(
            used_path(file, me, "directory.certificate_file", config.certificate_file),
            used_path(file, me, "directory.private_key_file", config.private_key_file),
        )
    return context


def _log_end(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and (error := task.exception()) is not None:
        log.error("directory not followed any more", exc_info=error)
