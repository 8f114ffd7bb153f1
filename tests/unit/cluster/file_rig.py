"""Nodes on loopback that give files of handmade checkpoints, and one whose store loads from them."""

import contextlib
from types import SimpleNamespace
from typing import Any

from sllm_node.checkpoint.catalog import Catalog
from sllm_node.checkpoint.given import Given
from sllm_node.cluster.fetching import Fetching
from sllm_node.cluster.file import LimitsConfig
from sllm_node.cluster.file_messages import AskFile, unpack_ask
from sllm_node.cluster.files import PeerFiles
from sllm_node.cluster.giving import Giving
from sllm_node.cluster.state import Bandwidths, BootId, HeldModel, NodeState
from sllm_node.cluster.transport import Listener
from sllm_node.cluster.view import ClusterView
from sllm_node.core.clock import MonotonicClock
from sllm_node.core.metrics import Metrics
from sllm_node.core.types import ModelId, NodeId
from tests.ports import free_port
from tests.unit.store.remote_rig import Node

RATES = Bandwidths(0, 1e9, 5e9, 1e9)


class Sender:
    """A node that has checkpoints in its folder; `before` each request, a test may act."""

    def __init__(self, name, root, trust, at_once=2):
        self.name = NodeId(name)
        self.root = root
        self.catalog = Catalog(root)
        self.metrics = Metrics()
        self.giving = Giving(Given(self.catalog), at_once, self.metrics)
        self.asked = 0
        self.refused: list[Any] = []
        self.asks: list[AskFile] = []
        self.before = lambda: None
        self.instead: Any = None
        """Answers in its place."""
        self.address = f"127.0.0.1:{free_port()}"
        self.trust = trust
        self.listener: Listener

    async def file(self, sender, payload, reply):
        self.asked += 1
        self.asks.append(unpack_ask(payload))
        self.before()
        await (self.instead or self.giving.file)(sender, payload, reply)

    async def start(self):
        self.listener = Listener(self.trust, {"file": self.file}, 5.0, self.refused.append)
        await self.listener.start(self.address)

    def state(self, version=1, **changes):
        self.catalog.scan()
        held = tuple(
            HeldModel(model, index.size, index.file_size, 0, index.file_size, created=index.created)
            for model in self.catalog.models()
            for index in [self.catalog.get(model).index]
        )
        return NodeState(self.name, BootId("1"), version, (), RATES, held, **changes)

    async def close(self):
        await self.listener.close()
        self.giving.close()


class Receiver(Node):
    """A node without checkpoints that sees the senders."""

    def __init__(self, root, trust, senders, **settings):
        super().__init__(root, {}, **settings)
        self.view = ClusterView()
        self.senders = {sender.name: sender for sender in senders}
        self.hosted: set[ModelId] = set()
        peers: Any = SimpleNamespace(
            me=NodeId("b"), view=self.view, address=self._address, look=lambda: None,
            cluster=SimpleNamespace(
                timing=SimpleNamespace(dead_s=5.0), limits=LimitsConfig(files_at_once=2)
            ),
        )  # fmt: skip
        clock = MonotonicClock()
        self.files = PeerFiles(self.tier.cards, peers, trust, clock, self.metrics)
        self.fetching = Fetching(
            self.catalog, self.tier, self.files, peers, clock, self.hosted.__contains__
        )
        self.look()

    def _address(self, peer):
        return self.senders[peer].address

    def look(self):
        """See the senders as they are."""
        for sender in self.senders.values():
            self.view.refresh(sender.state(), 0.0)

    async def __aenter__(self):
        await super().__aenter__()
        self.fetching.start()
        return self

    async def __aexit__(self, *args):
        await self.fetching.close()
        await super().__aexit__(*args)

    async def load(self, model):
        await self.fetching.ensure(model)
        return await super().load(model)


@contextlib.asynccontextmanager
async def serving(*senders):
    for sender in senders:
        await sender.start()
    try:
        yield
    finally:
        for sender in senders:
            await sender.close()
