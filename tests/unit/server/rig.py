"""A server on loopback before a fake service."""

import contextlib
from pathlib import Path

import aiohttp

from sllm_node.checkpoint.catalog import Catalog
from sllm_node.core.clock import ManualClock
from sllm_node.core.config import ServerConfig
from sllm_node.core.metrics import Metrics
from sllm_node.server.app import Edge, Server
from tests.unit.server.fake_service import FakeService


class Rig:
    """What a test holds."""

    def __init__(self, http, store=None, **config):
        self.http = http
        self.url = ""
        self.service = FakeService()
        self.metrics = Metrics()
        self.stall = None
        self.pulled = []
        self.server = Server(
            Edge(
                service=self.service,
                config=ServerConfig(**{"port": 0, "progress_interval_s": 0.01, **config}),
                clock=ManualClock(1000.0),
                metrics=self.metrics,
                stalled=lambda: self.stall,
                overview=lambda: {"node": {"id": "n"}},
                wishes=self.service.wishes,
                catalog=Catalog(store or Path("/nonexistent")),
                pull=self._pull,
            )
        )

    async def _pull(self, model):
        self.pulled.append(model)

    async def post(self, path, body, **headers):
        """Return status, JSON and headers."""
        data = body if isinstance(body, bytes) else None
        given = None if data is not None else body
        async with self.http.post(self.url + path, json=given, data=data, headers=headers) as r:
            return r.status, await r.json(content_type=None), r.headers

    async def get(self, path, **headers):
        async with self.http.get(self.url + path, headers=headers) as r:
            return r.status, await r.json(content_type=None), r.headers

    async def events(self, path, body):
        """Return comments and data of a stream."""
        async with self.http.post(self.url + path, json=body) as response:
            lines = (await response.read()).decode().splitlines()
        comments = [line[2:] for line in lines if line.startswith(": ")]
        return comments, [line[6:] for line in lines if line.startswith("data: ")]


@contextlib.asynccontextmanager
async def serving(*, store=None, **config):
    async with aiohttp.ClientSession() as http:
        made = Rig(http, store, **config)
        made.url = await made.server.start()
        try:
            yield made
        finally:
            await made.server.close()
