"""The nodes of `scripts.bench.cluster_gpu`: one a GPU, on one host, with the files of one checkpoint."""

import argparse
import contextlib
import secrets
import time
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final

from scripts.bench import random_checkpoint
from scripts.bench.cluster_logs import Logs
from sllm_node.cluster.auth import KEY_BYTES
from sllm_node.core.units import GIB, MIB
from tests.e2e import cluster_nodes
from tests.e2e.process import NodeProcess
from tests.ports import free_port

NAMES: Final = ("a", "b", "c", "d", "e", "f", "g", "h")
ROOM: Final = 2
"""Replicas on a device, and models in a pool."""
CHUNK_BYTES: Final = 16 * MIB
KV_BYTES: Final = {"8b": 24 * GIB, "32b": 24 * GIB, "tiny": 8 * MIB}
CONFIG: Final = """
[node]
id = "{id}"
drain_s = 5.0
[store]
path = "{store}"
pool_bytes = {pool}
chunk_bytes = "16MiB"
reader_threads = {readers}
[device]
names = ["{device}"]
memory_bytes = {memory}
[engine]
kv_cache_bytes = {kv}
torch_threads = {threads}
[schedule]
max_wait_s = 0.5
[server]
port = 0
progress_interval_s = 0.5
[log]
level = "debug"
format = "json"
[cluster]
file = "{cluster}"
"""


class GpuNode(NodeProcess):
    """A node with a config of its own."""

    def __init__(self, folder: Path, config: str, environment: dict[str, str]) -> None:
        folder.mkdir(exist_ok=True)
        super().__init__(folder, folder)
        self.config.write_text(config)
        self.environment = environment


class Rig:
    """The models, the nodes, and what came of the parts."""

    def __init__(self, place: Path, asked: argparse.Namespace) -> None:
        self.place, self.asked = place, asked
        self.names = NAMES[: asked.nodes]
        self.models = [f"{asked.shape}-{number}" for number in range(asked.models)]
        self.size = random_checkpoint.write_served(asked.store, asked.shape, self.models)
        self.file = self._cluster_file()
        self.nodes = {name: self._node(number) for number, name in enumerate(self.names)}
        self.logs = Logs()
        self.failed: list[str] = []

    def _cluster_file(self) -> Path:
        """Write what `sllm-node cluster init` and `join` make, which want a package that may not be there."""
        folder = self.place / "shared"
        folder.mkdir()
        key = folder / "cluster.key"
        key.touch(mode=0o600)
        key.write_text(secrets.token_hex(KEY_BYTES) + "\n")
        nodes = [
            f'\n[[nodes]]\nid = "{name}"\naddress = "127.0.0.1:{free_port()}"\n'
            for name in self.names
        ]
        file = folder / "cluster.toml"
        trust = '[trust]\nmode = "key"\nkey_file = "cluster.key"\n'
        file.write_text(trust + "".join(nodes) + cluster_nodes.QUICK)
        return file

    def _node(self, number: int) -> GpuNode:
        name, asked = self.names[number], self.asked
        store = self.place / f"store-{name}"
        store.mkdir()
        for model in self.models:
            if not (name == "b" and model == self.models[-1]):
                (store / model).symlink_to((asked.store / model).resolve())
        is_cpu = asked.device == "cpu"
        kv, spare = KV_BYTES[asked.shape], 16 * MIB if is_cpu else 4 * GIB
        device = "cpu" if is_cpu else f"cuda:{number if asked.by_name else 0}"
        # A chunk of the pool is of one shard.
        chunks = self.size // CHUNK_BYTES + self.size // random_checkpoint.SHARD_BYTES + 2
        config = CONFIG.format(
            id=name, store=store, device=device, cluster=self.file, kv=kv,
            pool=ROOM * chunks * CHUNK_BYTES,
            memory=ROOM * (self.size + kv) + spare,
            readers=2 if is_cpu else 8, threads=1 if is_cpu else 0,
        )  # fmt: skip
        environment = {} if is_cpu or asked.by_name else {"CUDA_VISIBLE_DEVICES": str(number)}
        return GpuNode(self.place / name, config, environment)

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Start all nodes, wait until they see each other, stop them at the end."""
        begun = time.perf_counter()
        started: list[GpuNode] = []
        try:
            with ThreadPoolExecutor(len(self.nodes)) as threads:
                jobs = [threads.submit(node.__enter__) for node in self.nodes.values()]
                for node, job in zip(self.nodes.values(), jobs, strict=True):
                    job.result()
                    started.append(node)
            for node in started:
                await cluster_nodes.sees(node, *self.names)
            print(f"nodes ready after {time.perf_counter() - begun:.0f} s", flush=True)
            yield
        finally:
            with ThreadPoolExecutor(len(self.nodes)) as threads:
                list(threads.map(lambda node: node.__exit__(None, None, None), started))

    def read_logs(self) -> Logs:
        """Return what the nodes have logged so far."""
        logs = Logs()
        for name, node in self.nodes.items():
            logs.read(name, node.log)
        logs.lines.sort(key=lambda line: line["at"])
        return logs

    def fail(self, what: str) -> None:
        """Keep what may not happen."""
        self.failed.append(what[:400])
