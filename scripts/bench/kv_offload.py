r"""Sessions that are preempted: their blocks in the pinned pool beside computing them again.

    python -m scripts.bench.kv_offload --store DIR [--device cpu|cuda:0] [--shape small|8b]
        [--sessions 12] [--tokens-in 512] [--tokens-out 256] [--room 0.5] [--rounds 3] [--out F]

One model with random weights and KV memory for a part (`--room`) of the tokens of all sessions, which come at
once. Rounds with and without `engine.kv_offload` alternate in one process; each has an engine of its own, warmed by
one session. Measured: seconds until the last token, preemptions, decisions, and bytes out and in. Prompts differ and
the prefix cache is on, as it is by default.
"""

import argparse
import asyncio
import json
import statistics
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from prometheus_client import Counter

from scripts.bench import interleave
from scripts.bench.figures import commit, describe_machine
from sllm_node.bench.devices import open_device
from sllm_node.checkpoint.catalog import Catalog
from sllm_node.core.clock import MonotonicClock
from sllm_node.core.config import ByteSize, EngineConfig, StoreConfig
from sllm_node.core.metrics import Metrics
from sllm_node.core.types import GenerationRequest, ModelId, SessionId, TokenIds
from sllm_node.core.units import GIB, MIB
from sllm_node.engine.engines import Engines
from sllm_node.engine.kv import token_bytes_from_config
from sllm_node.engine.skeleton import read_config
from sllm_node.store.store import Store

MODEL = ModelId(interleave.NAMES[0])
CHUNK = 16 * MIB


class Bench:
    """A store, and an engine a round."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        catalog = Catalog(arguments.store)
        catalog.scan()
        self.checkpoint = catalog.get(MODEL)
        self.vocabulary = self.checkpoint.index.tensors[0].shape[0]
        token_bytes = token_bytes_from_config(read_config(self.checkpoint.path))
        tokens = arguments.sessions * (arguments.tokens_in + arguments.tokens_out)
        self.kv = ByteSize(int(arguments.room * tokens) * token_bytes)
        self.pool = (tokens * token_bytes // CHUNK + 2 * arguments.sessions + 4) * CHUNK
        size = self.checkpoint.index.size
        self.device = open_device(arguments.device, size + self.kv + GIB)
        config = StoreConfig(
            path=str(arguments.store), relay=False, chunk_bytes=ByteSize(CHUNK),
            pool_bytes=ByteSize(self.pool),
        )  # fmt: skip
        self.store = Store(catalog, [self.device], config, MonotonicClock(), Metrics())

    async def round(self, *, is_on: bool, seed: int) -> dict[str, Any]:
        """Return what one crowd of sessions took."""
        metrics, limit = Metrics(), ByteSize(self.pool - 2 * CHUNK)
        config = EngineConfig(kv_cache_bytes=self.kv, kv_offload=is_on, kv_offload_bytes=limit)
        engines = Engines([self.device], self.store, config, MonotonicClock(), metrics)
        codec = await engines.load_codec(self.checkpoint.path)
        skeleton = await engines.skeleton(self.checkpoint)
        lease = await self.store.acquire(MODEL)
        engine = await engines.open(lease, skeleton, codec)
        numbers = torch.Generator().manual_seed(seed)

        async def ask(number: int) -> TokenIds:
            count = self.arguments.tokens_in
            drawn = torch.randint(0, min(self.vocabulary, 300), (count,), generator=numbers)
            prompt, out = tuple(drawn.tolist()), self.arguments.tokens_out
            name = SessionId(f"s{number}")
            request = GenerationRequest(
                name, MODEL, prompt, interleave.GREEDY, out, ignore_eos=True
            )
            generation = engine.submit(request)
            async for _ in generation:
                pass
            return generation.tokens

        await ask(0)
        began = time.perf_counter()
        said = await asyncio.gather(*(ask(1 + n) for n in range(self.arguments.sessions)))
        took_s = time.perf_counter() - began
        await engine.close()
        lease.release()
        engines.close()
        return {
            "took_s": round(took_s, 3),
            "preemptions": sum(values(metrics.preemptions).values()),
            "decisions": values(metrics.kv_offload_decisions),
            "bytes": values(metrics.kv_offload_bytes),
            "said": said,
        }


def values(counter: Counter) -> dict[str, float]:
    """Return what a counter has, by its last label."""
    return {
        list(sample.labels.values())[-1]: sample.value
        for metric in counter.collect()
        for sample in metric.samples
        if sample.name.endswith("_total")
    }


async def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Run all rounds."""
    bench = Bench(arguments)
    await bench.store.start()
    await bench.round(is_on=True, seed=0)  # warm
    rounds: dict[bool, list[dict[str, Any]]] = {False: [], True: []}
    for number in range(arguments.rounds):
        for is_on in (False, True) if number % 2 else (True, False):
            rounds[is_on].append(await bench.round(is_on=is_on, seed=1 + number))
    await bench.store.close()
    return summary(rounds[False], rounds[True])


def summary(off: Sequence[dict[str, Any]], on: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return both, and the ratio of each pair of rounds."""
    pairs = list(zip(on, off, strict=True))
    same = [one.pop("said") == other.pop("said") for one, other in pairs]
    ratios = [round(one["took_s"] / other["took_s"], 3) for one, other in pairs]
    return {
        "computed": off, "offloaded": on, "time_of_computed": ratios,
        "time_of_computed_median": statistics.median(ratios), "same_tokens": same,
    }  # fmt: skip


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--store", type=Path, required=True)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--shape", default="small")
    parser.add_argument("--sessions", type=int, default=12)
    parser.add_argument("--tokens-in", type=int, default=512)
    parser.add_argument("--tokens-out", type=int, default=256)
    parser.add_argument("--room", type=float, default=0.5)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    interleave.prepare(arguments)
    options = {key: value for key, value in vars(arguments).items() if key not in ("store", "out")}
    found = {
        "date": datetime.now(UTC).isoformat(), "commit": commit(), "machine": describe_machine(),
        **options, **asyncio.run(measure(arguments)),
    }  # fmt: skip
    print(json.dumps(found, indent=1))
    if arguments.out:
        arguments.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
