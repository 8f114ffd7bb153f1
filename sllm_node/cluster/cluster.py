"""This node's part in a cluster, put together: file, trust, peers, listener, router; start, drain, close."""

import logging
import secrets
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Generic

from sllm_node.checkpoint.catalog import Catalog
from sllm_node.checkpoint.given import Given
from sllm_node.cluster.fetching import Fetching
from sllm_node.cluster.file import ClusterFile
from sllm_node.cluster.files import PeerFiles
from sllm_node.cluster.giving import Giving
from sllm_node.cluster.hints import HINT
from sllm_node.cluster.journal import Journal
from sllm_node.cluster.listing import Listing
from sllm_node.cluster.messages import make_boot
from sllm_node.cluster.named_files import load_cluster
from sllm_node.cluster.peers import Peers, Place
from sllm_node.cluster.rebalancing import Rebalancing
from sllm_node.cluster.records import Desired
from sllm_node.cluster.registered import Registered
from sllm_node.cluster.resumes import Resumes
from sllm_node.cluster.router import Router
from sllm_node.cluster.scaling import Scaling
from sllm_node.cluster.serving import Serving
from sllm_node.cluster.shown import differing, served
from sllm_node.cluster.snapshot import Snapshot
from sllm_node.cluster.state import BootId
from sllm_node.cluster.texts import Texts
from sllm_node.cluster.transport import Client, Listener
from sllm_node.cluster.trust import open_trust
from sllm_node.cluster.wish_messages import WISH
from sllm_node.cluster.wishes import Reach, Wishes
from sllm_node.core.clock import Clock
from sllm_node.core.config import Config
from sllm_node.core.errors import ConfigError, MessageError
from sllm_node.core.metrics import Metrics
from sllm_node.core.types import ModelId, NodeId
from sllm_node.schedule.driver import Service
from sllm_node.schedule.ports import CodecT
from sllm_node.store.remote import RemoteTier

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Disk:
    """What the cluster uses of this node's disk."""

    catalog: Catalog
    tier: RemoteTier
    journal: Journal


class Cluster(Generic[CodecT]):
    """Make it inside a running event loop; `start`, then `close` once."""

    def __init__(
        self,
        config: Config,
        service: Service[CodecT],
        load_codec: Callable[[Path], Awaitable[CodecT]],
        disk: Disk,
        clock: Clock,
        metrics: Metrics,
    ) -> None:
        """Read the cluster file and what it names.

        Raises:
            ConfigError: it is wrong, or does not have this node.
            ClusterKeyError: the shared key is none.
        """
        me, path = NodeId(config.node.id), Path(config.cluster.file)
        file = load_cluster(path, me)
        boot = make_boot(int(clock.wall() * 1000), secrets.randbits(20))
        self._metrics = metrics
        address = own_address(config, file)
        self._listen = config.cluster.listen or address
        trust = open_trust(file, path, me, address, lambda: self.peers.boot)
        self._expected = int(file.limits.peer_bandwidth)
        self._outlook = service.outlook
        self._outlook.expect_from_peers(self._expected)
        snapshot = Snapshot(me, BootId(str(boot)), self._outlook, self._from_peers)
        resumes = Resumes(partial(_tell_prefill, metrics))
        snapshot.fit_of = resumes.fit
        service.on_session_end = resumes.observe
        place = Place(me, boot, path, file)
        self.peers = Peers(place, trust, snapshot, clock, metrics)
        self._listing: Listing | None = None
        if file.has_directory:
            self._listing = Listing(place, address, self.peers, disk.journal, clock, metrics)
            self._listing.registered = Registered(
                disk.tier, disk.catalog, self._outlook, self.peers.look
            )
        self._client = Client(trust, self.peers.address)
        silence_s = file.timing.dead_s
        folder = Path(config.store.path) / ".cluster" / me
        self._texts = Texts(
            folder, self._client, load_codec, silence_s, int(config.cluster.texts_bytes)
        )
        files = PeerFiles(disk.tier.cards, self.peers, trust, clock, metrics)
        self.fetching = fetching = Fetching(
            disk.catalog, disk.tier, files, self.peers, clock, self._outlook.is_hosted
        )
        self._giving = Giving(Given(disk.catalog), file.limits.files_at_once, metrics)
        self.router = Router(service, self.peers, self._client, self._texts, clock, metrics)
        self.router.fetching = fetching
        vacating = self.router.vacating
        serving = Serving(service, self.peers, vacating, clock, file.timing.heartbeat_s, fetching)
        self.router.movers.entry_of = serving.entry_of
        self.scaling = Scaling(service, self.peers, self._desired, clock, metrics, fetching)
        self._rebalancing = Rebalancing(service, self.peers, vacating.under_way, clock, metrics)
        reach = Reach(self.peers, self._listing, me)
        self.wishes = Wishes(disk.journal, self.router.status, reach, clock.wall)
        handlers = {
            **serving.handlers(), **self.scaling.handlers(), **vacating.handlers(),
            **self._giving.handlers(),
            HINT: self.router.hints.take, WISH: self.wishes.take,
        }  # fmt: skip
        self._listener = Listener(trust, handlers, silence_s, self._refused)
        self._closing = AsyncExitStack()

    async def start(self) -> None:
        """Listen for peers and begin to speak to them.

        Raises:
            ListenError: the address can't be had.
        """
        self._closing.push_async_callback(self._client.close)
        self._closing.push_async_callback(self._texts.close)
        self._closing.callback(self._giving.close)
        await self._listener.start(self._listen)
        self._closing.push_async_callback(self._listener.close)
        self.fetching.start()
        self._closing.push_async_callback(self.fetching.close)
        self.peers.start(self._client)
        self._closing.push_async_callback(self.peers.close)
        if self._listing is not None:
            await self._listing.start()
            self._closing.push_async_callback(self._listing.close)
        self._closing.push_async_callback(self.wishes.close)
        self._closing.push_async_callback(self.router.close)
        self.scaling.start(self._client)
        self._closing.push_async_callback(self.scaling.close)
        self._rebalancing.start()
        self._closing.callback(self._rebalancing.close)

    async def close(self) -> None:
        """Leave the cluster."""
        await self._closing.aclose()

    def status(self) -> dict[str, Any]:
        """Return who is there, what each has, and what runs where."""
        state = self.peers.refresh()
        nodes = [
            {
                "id": view.node,
                "draining": view.state.is_draining,
                "devices": [
                    {"name": d.name, "free": d.bytes_free, "total": d.bytes_total}
                    for d in view.state.devices
                ],
                "models": [
                    {
                        "id": held.model, "bytes": held.bytes_stored, "dram": held.bytes_dram,
                        "nvme": held.bytes_nvme, "device": held.model in view.by_model,
                        "created": held.created, "weights": held.digest,
                    }
                    for held in view.state.models
                ],
                "sessions": sum(len(replica.sessions) for replica in view.state.replicas),
                "served": served(view.state),
            }
            for _, view in sorted(self.peers.view.nodes.items())
        ]  # fmt: skip
        errors = self.router.placing.errors
        return {
            "me": self.peers.me,
            "version": state.version,
            "problem": self.peers.problem(),
            "peers": self.peers.status(),
            "migrations": self.router.moves(),
            "vacates": self.router.vacating.recent(),
            "nodes": nodes,
            "differing": differing(self.peers.view),
            "scaling": self.scaling.status(),
            "directory": None if self._listing is None else self._listing.status(),
            "estimates": {
                "count": errors.count, "mean_error_s": errors.mean_s, "bias_s": errors.bias_s,
                "worst_s": errors.worst_s,
            },
        }  # fmt: skip

    def _from_peers(self) -> tuple[float, float]:
        """Return the rate of loads from peers, and the seconds before their first byte."""
        if not self._expected:
            return 0.0, 0.0
        return self._outlook.bandwidth_from_peers(), self.fetching.setup_s

    def _desired(self) -> tuple[Desired, ...]:
        """Return the replicas that are desired: the file counts before operators, the directory before it."""
        wishes = {wish.model: wish for wish in self.peers.desired()}
        told = {wish.model: wish for wish in self.wishes.desired()}
        wishes = {**told, **wishes} if self._listing is None else {**wishes, **told}
        return tuple(wish for _, wish in sorted(wishes.items()))

    def _refused(self, error: MessageError) -> None:
        self._metrics.messages_refused.labels(error.code).inc()
        self.peers.refused(error)


def own_address(config: Config, file: ClusterFile) -> str:
    """Return where peers reach this node.

    Raises:
        ConfigError: nothing says it, or two say different things.
    """
    named, own = file.address(NodeId(config.node.id)), config.cluster.address
    if named and own not in ("", named):
        problem = f"cluster.address = {own!r}: [[nodes]] has {named!r}, and that counts; remove one"
        raise ConfigError(config.cluster.file, (problem,))
    if not (named or own):
        problem = (
            f"[[nodes]] does not have {config.node.id!r}: set cluster.address in this node's config "
            "to the host:port by which peers reach it"
        )
        raise ConfigError(config.cluster.file, (problem,))
    return named or own


def _tell_prefill(metrics: Metrics, model: ModelId, expected_s: float, actual_s: float) -> None:
    """Compare what a session was to take from its grant to its first token with what it took."""
    off_s = actual_s - expected_s
    metrics.estimate_part_error_seconds.labels("here", "prefill").observe(abs(off_s))
    log.debug("first token given", extra={
        "model": model, "expected_s": round(expected_s, 4), "prefill_s": round(actual_s, 4),
    })  # fmt: skip
