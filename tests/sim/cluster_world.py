"""Nodes with their real peers, routers and services, over a network in memory on virtual time.

Only store, engines and sockets are replaced: a load takes seconds of virtual time, a token a tenth. A
crash cuts the connections of a node at once; a cut link says nothing at all.
"""

import asyncio
import contextlib
import functools
import shutil
from pathlib import Path
from typing import Any

from sllm_node.cluster.file import parse_cluster
from sllm_node.cluster.hints import HINT
from sllm_node.cluster.peers import Peers, Place
from sllm_node.cluster.rebalancing import Rebalancing
from sllm_node.cluster.router import Router
from sllm_node.cluster.scaling import Scaling
from sllm_node.cluster.serving import Serving
from sllm_node.cluster.snapshot import Snapshot
from sllm_node.cluster.state import BootId
from sllm_node.core.errors import PeerUnreachableError, RemoteUnreachableError
from sllm_node.core.types import (
    GenerationRequest,
    ModelId,
    NodeId,
    SamplingParameters,
    SessionId,
    Tier,
)
from tests.sim.loop import LoopClock, run
from tests.unit.schedule.fakes import make_node

DELAY_S = 0.001
TIMING = "[timing]\nheartbeat_s = 1.0\nsuspect_s = 3.0\ndead_s = 6.0\npublish_gap_s = 0.05\n"


class Connection:
    """One request on its way between two nodes."""

    def __init__(self, world, source, target):
        self.world, self.source, self.target = world, source, target
        self.frames: asyncio.Queue = asyncio.Queue()
        self.task: Any = None
        self.delayed: list = []
        self.is_left = False
        """By its source, of which a cut link does not tell."""

    async def send(self, payload):
        await asyncio.sleep(DELAY_S)
        self.deliver(payload)

    def deliver(self, *items):
        """Let items arrive: now, or when the link is there again."""
        self.delayed += items
        if self.world.is_open(self.target, self.source):
            for item in self.delayed:
                self.frames.put_nowait(item)
            self.delayed.clear()

    async def serve(self, handler, payload):
        try:
            await handler(self.source, payload, self)
            self.deliver(None)
        except (TimeoutError, ConnectionResetError):  # as the listener: it drops the connection
            self.deliver(PeerUnreachableError(self.target, "it dropped the connection"))
        except Exception as error:
            self.deliver(error)

    def reset(self, node):
        if self.task is not None:
            self.task.cancel()
        self.frames.put_nowait(PeerUnreachableError(node, "reset"))


class MemoryClient:
    """What `transport.Client` is to a node."""

    def __init__(self, world, me):
        self.world, self.me = world, me

    async def ask(self, peer, what, payload, silence_s):
        async with self.stream(peer, what, payload, silence_s) as frames:
            (frame,) = [frame async for frame in frames]
            return frame

    @contextlib.asynccontextmanager
    async def stream(self, peer, what, payload, silence_s):
        world = self.world
        if not world.is_open(self.me, peer):
            await asyncio.sleep(silence_s)
            raise PeerUnreachableError(peer, "nothing comes")
        await asyncio.sleep(DELAY_S)
        node = world.nodes.get(peer)
        if node is None or not node.is_up:
            raise PeerUnreachableError(peer, "refused")
        connection = Connection(world, self.me, peer)
        handler = node.handlers[what]
        connection.task = asyncio.create_task(connection.serve(handler, payload))
        world.connections[connection] = None
        try:
            yield self._frames(connection, silence_s)
        finally:
            connection.is_left = True
            if world.is_open(self.me, peer):
                world.connections.pop(connection, None)
                connection.task.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await connection.task

    async def _frames(self, connection, silence_s):
        while True:
            try:
                async with asyncio.timeout(silence_s):
                    item = await connection.frames.get()
            except TimeoutError:
                raise PeerUnreachableError(connection.target, "silent") from None
            if isinstance(item, Exception):
                raise item
            if item is None:
                return
            yield item


class NoTrust:
    def set_peers(self, peers):
        pass

    def renew(self, changed):
        return frozenset()


class NoTexts:
    """No tokenizer is fetched."""

    def get_now(self, held):
        return None


class Copying:
    """What `fetching.Fetching` is to a node: a peer's model is known once its folder is copied."""

    COPY_S = 0.3

    def __init__(self, node):
        self.node = node
        self.ensured: list[str] = []

    def is_here(self, model):
        return (self.node.root / model).is_dir()

    async def ensure(self, model):
        if self.is_here(model):
            return
        self.ensured.append(model)
        await asyncio.sleep(self.COPY_S)
        for other in self.node.world.nodes.values():
            if other.is_up and other is not self.node and (other.root / model).is_dir():
                if not self.is_here(model):
                    shutil.copytree(other.root / model, self.node.root / model)
                self.node.rig.store.catalog.scan()
                return
        raise RemoteUnreachableError(":peers", model, "no node that lives has all of it")


class WorldNode:
    """One machine: what is on its disk stays, everything else goes with a crash."""

    def __init__(self, world, name, root, models, pages):
        self.world, self.name, self.root = world, NodeId(name), root
        self.models, self.pages = models, pages
        self.is_up = False
        self.lives = 0

    def start(self):
        self.lives += 1
        self.rig = made = make_node(self.root, self.models, self.pages)
        store = made.store
        store.residency = lambda model: {
            Tier.NVME: store.catalog.get(model).index.file_size,
            **({Tier.DEVICE: 4096} if model in store.on_device else {}),
        }
        self.service = made.service
        clock = LoopClock()
        made.service.outlook._catalog.scan()
        rates = (1e9, 0.1) if self.world.peer_loads else (0.0, 0.0)
        boot = BootId(str(self.lives))
        snapshot = Snapshot(self.name, boot, made.service.outlook, lambda: rates)
        place = Place(self.name, self.lives, self.world.path, self.world.file)
        self.peers = Peers(place, NoTrust(), snapshot, clock, made.metrics)  # type: ignore[arg-type]
        client = MemoryClient(self.world, self.name)
        self.fetching = self._fetching()
        texts = NoTexts()
        self.router = Router(made.service, self.peers, client, texts, clock, made.metrics)  # type: ignore[arg-type]
        self.router.fetching = self.fetching
        self.vacating = self.router.vacating
        self.serving = Serving(made.service, self.peers, self.vacating, clock, 1.0, self.fetching)
        self.router.movers.entry_of = self.serving.entry_of
        desired = self.peers.desired
        self.scaling = Scaling(
            made.service, self.peers, desired, clock, made.metrics, self.fetching
        )
        self.rebalancing = Rebalancing(
            made.service, self.peers, self.vacating.under_way, clock, made.metrics
        )
        self.handlers = {
            **self.serving.handlers(), **self.scaling.handlers(), **self.vacating.handlers(),
            HINT: self.router.hints.take,
        }  # fmt: skip
        self.is_up = True
        self.peers.start(client)  # type: ignore[arg-type]
        self.scaling.start(client)  # type: ignore[arg-type]
        self.rebalancing.start()

    def _fetching(self) -> Any:
        return Copying(self) if self.world.peer_loads else None

    async def crash(self):
        """End at once: whoever is connected hears it, nobody is told anything."""
        self.is_up = False
        for connection in list(self.world.connections):
            if self.name in (connection.source, connection.target):
                connection.reset(self.name)
        await self.stop(is_told=False)

    async def stop(self, *, is_told=True):
        await self.scaling.close()
        self.rebalancing.close()
        if is_told:
            await self.router.close()
            await self.peers.close()
        else:
            self.service.on_change = lambda: None
            self.peers._alarm.set(None)
            self.peers._news.set(None)
            await self.peers._heartbeats.drop()
            await self.router.close()
        await self.service.close()
        self.is_up = False


class World:
    """All nodes and the network between them."""

    def __init__(self, root: Path, nodes, pages=2, more="", *, peer_loads=False):
        """`nodes`: the models of each, by its name; `more`: of the cluster file."""
        self.peer_loads = peer_loads
        entries = "".join(
            f'[[nodes]]\nid = "{name}"\naddress = "10.0.0.{i + 1}:8100"\n'
            for i, name in enumerate(nodes)
        )
        text = f'{entries}[trust]\nkey_file = "k"\n{TIMING}{more}'
        self.path = root / "cluster.toml"
        self.path.write_text(text)
        self.file = parse_cluster(text)
        self.cut: set[tuple[str, str]] = set()
        self.connections: dict[Connection, None] = {}
        self.nodes = {
            NodeId(name): WorldNode(self, name, root / name, models, pages)
            for name, models in nodes.items()
        }
        self.sessions = 0
        for name in nodes:
            (root / name).mkdir()
            self[name].start()

    def __getitem__(self, name) -> WorldNode:
        return self.nodes[NodeId(name)]

    def is_open(self, source, target):
        return (source, target) not in self.cut

    def part(self, *names):
        """Cut these nodes off from all others, both ways."""
        for a in names:
            for b in self.nodes:
                if b not in names:
                    self.cut |= {(a, b), (b, a)}

    def heal(self):
        """Open all links; who was left meanwhile is told."""
        self.cut.clear()
        for connection in list(self.connections):
            connection.deliver()
            if connection.is_left:
                del self.connections[connection]
                connection.task.cancel()

    def open(self, entry, model, tokens=20, *, open_ended=False, **options):
        self.sessions += 1
        request = GenerationRequest(
            SessionId(f"{entry}-{self.sessions}-0"), ModelId(model), (1, 2), SamplingParameters(),
            tokens, open_ended=open_ended,
        )  # fmt: skip
        return self[entry].router.open(request, **options)

    async def close(self):
        for node in self.nodes.values():
            if node.is_up:
                await node.stop()


async def read(stream):
    """Return the tokens of a session; the text must be as long."""
    chunks = [chunk async for chunk in stream]
    tokens = [token for chunk in chunks for token in chunk.tokens]
    assert len("".join(chunk.text for chunk in chunks)) == len(tokens)
    assert chunks[-1].finish == "length"
    return tokens


def in_world(pages=2, more="", *, peer_loads=False, **nodes):
    """Run an async test in a world; at its end no session, load, lease or promise is left."""

    def decorate(test):
        @functools.wraps(test)
        def wrapper(tmp_path):
            async def play():
                world = World(tmp_path, nodes, pages, more, peer_loads=peer_loads)
                await asyncio.sleep(3.0)
                await test(world)
                await asyncio.sleep(5.0)
                see_nothing_left(world)
                await world.close()
                for node in world.nodes.values():
                    assert node.rig.store.leased == set()
                assert len(asyncio.all_tasks()) == 1

            run(play())

        del wrapper.__wrapped__  # pytest would ask for its parameters
        return wrapper

    return decorate


def see_nothing_left(world):
    for node in world.nodes.values():
        if node.is_up:
            assert node.router.sessions() == []
            assert node.vacating._vacates.active == ()
            assert node.vacating._wishes == {}
