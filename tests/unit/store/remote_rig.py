"""A remote on loopback that fails on demand, and a store that loads from it."""

import contextlib
from pathlib import Path

from aiohttp import web

from sllm_node.checkpoint.cards import TEXT_FILES
from sllm_node.checkpoint.catalog import Catalog
from sllm_node.core.clock import MonotonicClock
from sllm_node.core.config import ByteSize, RemoteConfig, StoreConfig
from sllm_node.core.metrics import Metrics
from sllm_node.core.types import ModelId, Tier
from sllm_node.device.cpu import CpuDevice
from sllm_node.store.remote import RemoteTier
from sllm_node.store.store import Store
from tests.unit.store.handmade import Rig, delivered_by, pool_chunk, write_checkpoint


class Remote:
    """Files of a folder over HTTP with ranges; `before` may answer in its place."""

    def __init__(self, root: Path, contents: dict[str, bytes]):
        self.root = root
        self.bytes = contents
        self.stored = {name: _stored(root / name) for name in contents}
        self.config: dict = {}
        self.asked: list[tuple[str, int, int]] = []
        self.headers: list[dict[str, str]] = []
        self.before = self._nothing
        self.spoil = lambda name, start, data: data
        self.cut: dict[tuple[str, int], int] = {}
        """(file, start of a range) -> bytes after which the connection is cut, once."""

    async def _nothing(self, request):
        return None

    @property
    def shard_bytes(self) -> int:
        return sum(end - start for name, start, end in self.asked if name.startswith("shard-"))

    async def list(self, request):
        names = sorted(path.name for path in self.root.iterdir())
        return web.json_response({"checkpoints": [{"name": name} for name in names]})

    async def file(self, request):
        self.headers.append(dict(request.headers))
        if (answer := await self.before(request)) is not None:
            return answer
        name = request.match_info["file"]
        path = self.root / request.match_info["model"] / name
        if not path.is_file():
            raise web.HTTPNotFound
        data = path.read_bytes()
        asked = request.http_range
        start, end = asked.start or 0, min(asked.stop or len(data), len(data))
        self.asked.append((name, start, end))
        body = self.spoil(name, start, data[start:end])
        headers = {"Content-Range": f"bytes {start}-{end - 1}/{len(data)}"}
        response = web.StreamResponse(status=206 if asked.stop else 200, headers=headers)
        response.content_length = len(body)
        await response.prepare(request)
        if (kept := self.cut.pop((name, start), None)) is not None:
            await response.write(body[:kept])
            request.transport.abort()
            return response
        await response.write(body)
        return response

    @contextlib.asynccontextmanager
    async def serving(self):
        app = web.Application()
        app.router.add_get("/peer/v1/checkpoints", self.list)
        app.router.add_get("/peer/v1/checkpoints/{model}/{file}", self.file)
        runner = web.AppRunner(app, shutdown_timeout=0.1, handler_cancellation=True)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        self.url = f"http://127.0.0.1:{runner.addresses[0][1]}/peer/v1/checkpoints"
        try:
            yield self
        finally:
            await runner.cleanup()


class Node:
    """A store without checkpoints of its own, before remotes."""

    def __init__(
        self,
        root: Path,
        remotes: dict,
        *,
        unit=None,
        open_disk=None,
        flush_bytes=1 << 28,
        **settings,
    ):
        self.root = root
        root.mkdir(exist_ok=True)
        unit = unit or pool_chunk(Rig.codec)
        config = StoreConfig(
            path=str(root), pool_bytes=ByteSize(16 * unit), chunk_bytes=ByteSize(unit),
            huge_pages=False, reader_threads=2, max_concurrent_loads=4,
        )  # fmt: skip
        defaults = {"timeout_s": 5.0, "retries": 1, "fetch_threads": 4, **settings}
        self.metrics = Metrics()
        self.tier = RemoteTier(
            {name: RemoteConfig(**{**defaults, **given}) for name, given in remotes.items()},
            config,
            self.metrics,
            open_disk=open_disk,
            flush_bytes=flush_bytes,
        )
        self.catalog = Catalog(root, self.tier.cards)
        self.device = CpuDevice(1 << 20)
        self.store = Store(
            self.catalog, [self.device], config, MonotonicClock(), self.metrics, remote=self.tier
        )
        self.reports = []
        self.store.on_load = self.reports.append

    async def __aenter__(self):
        await self.store.start()
        await self.tier.refresh()
        self.catalog.scan()
        return self

    async def __aexit__(self, *_):
        await self.store.close()
        await self.tier.close()
        assert self.device.memory_used == 0

    async def load(self, model: str) -> bytes:
        lease = await self.store.acquire(ModelId(model))
        delivered = delivered_by(lease)
        lease.release()
        return delivered

    def unload(self, model: str) -> None:
        """Take it off the device and out of DRAM."""
        self.store.evict(ModelId(model), Tier.DEVICE, "test")
        self.store.evict(ModelId(model), Tier.DRAM, "test")

    def sample(self, name: str, **labels) -> float:
        return self.metrics.registry.get_sample_value(name, labels) or 0.0


def _stored(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("shard-*.bin"))


def make_remote(root: Path, names="a", **options) -> Remote:
    """A remote that has checkpoints of random bytes, each with two texts."""
    contents = {name: write_checkpoint(root, name, **options) for name in names}
    for name in names:
        (root / name / "config.json").write_text('{"model_type": "handmade"}')
        (root / name / "tokenizer.json").write_text("{}")
        (root / name / "secret.txt").write_text("not for anybody")
    assert "config.json" in TEXT_FILES
    return Remote(root, contents)
