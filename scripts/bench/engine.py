r"""What users wait for: tokens at batch 1, 32 and 128, and the first token of a model that is away.

    python -m scripts.bench.engine --shape 8b --store /dev/shm/s --device cuda:0 --out F
        [--parts ceiling,decode,batch,beside,first,generate,continuous] [--limit-s 400]

Store, loader and engine as in the node, without HTTP; random weights of the shape. `decode`: seconds
between tokens of one session, 64 tokens in, 256 out, without the first 16. `batch`: N sessions at
once, 256 tokens in, 128 out; all generated tokens over the time from the first submit to the last
token. `beside`: seconds between the tokens of 32 sessions, 256 in, 384 out, without and with a prompt of
32,768 tokens that comes when each has 32. `first`: 512 tokens in, model in DRAM and not on the device,
from acquire to the first token, raw and encoded, with the parts of that time; and resident. `overlap`,
of the same part: the engine computes while the model loads; each round loads it once more with no engine
beside, and `ratio` is the first token's time less 25 ms over that bare load's (goal: 1.05). `generate`
and `continuous` are
transformers' own in the same process, with its SDPA attention. The ceiling is a copy within the device,
counted as bytes read and written; `limit_ms` are the bytes of the weights at that rate.
"""

import argparse
import asyncio
import json
import statistics
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

import torch
from transformers import AutoModelForCausalLM

from scripts.bench import random_checkpoint
from sllm_node.bench.devices import open_device
from sllm_node.checkpoint.catalog import Catalog, open_checkpoint
from sllm_node.checkpoint.recode import recode
from sllm_node.codec.names import EXPONENT
from sllm_node.core.allocator import keep_freed_memory
from sllm_node.core.clock import MonotonicClock
from sllm_node.core.config import ByteSize, EngineConfig, StoreConfig
from sllm_node.core.metrics import Metrics
from sllm_node.core.types import (
    GenerationRequest,
    ModelId,
    Part,
    SamplingParameters,
    SessionId,
    Tier,
)
from sllm_node.core.units import GIB, MIB
from sllm_node.device.base import Device
from sllm_node.engine.engine import Engine
from sllm_node.engine.engines import Engines
from sllm_node.store.lease import Lease
from sllm_node.store.store import Store

PARTS: Final = ("ceiling", "decode", "batch", "beside", "first", "generate", "continuous")
ROUNDS: Final = 5
WARM_TOKENS: Final = 16
PREFILL_S: Final = 0.025
"""What the first token of a model that loads may take besides the load."""


class Bench:
    """A store and engines over one device, and what was measured."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        self.raw, self.encoded = (
            ModelId(f"{arguments.shape}-served{kind}") for kind in ("", "-codec")
        )
        self.deadline = time.perf_counter() + arguments.limit_s
        self.found: dict[str, Any] = {"shape": arguments.shape, "device": arguments.device}
        self.numbers = torch.Generator().manual_seed(0)
        self.asked = 0

    def late(self) -> bool:
        """Whether no further round may begin."""
        return bool(time.perf_counter() > self.deadline)

    async def start(self) -> None:
        """Open device, store and engines."""
        catalog = Catalog(self.arguments.store)
        catalog.scan()
        size = catalog.get(self.raw).index.size
        self.context = catalog.get(self.raw).index.context_tokens
        self.vocabulary = catalog.get(self.raw).index.tensors[0].shape[0]
        chunk = 16 * MIB
        settings = StoreConfig(
            path=str(self.arguments.store), chunk_bytes=ByteSize(chunk), relay=False,
            pool_bytes=ByteSize(int(1.8 * size) // chunk * chunk + 32 * chunk),
        )  # fmt: skip
        kv = ByteSize(self.arguments.kv_mib * MIB)
        self.device: Device = open_device(self.arguments.device, size + kv + 6 * GIB)
        metrics = Metrics()
        self.store = Store(catalog, [self.device], settings, MonotonicClock(), metrics)
        await self.store.start()
        config = EngineConfig(kv_cache_bytes=kv, prefix_cache=False, max_sessions=128)
        self.engines = Engines([self.device], self.store, config, MonotonicClock(), metrics)

    async def open(
        self, model: ModelId, *, early: bool = False
    ) -> tuple[Lease, Engine, dict[str, float]]:
        """Bring a model onto the device, or begin to; return seconds of each part too."""
        began = time.perf_counter()
        checkpoint = self.store.checkpoint(model) if hasattr(self.store, "checkpoint") else None
        checkpoint = checkpoint or open_checkpoint(Path(self.arguments.store) / model)
        codec = await self.engines.load_codec(checkpoint.path)
        skeleton = await self.engines.skeleton(checkpoint)
        prepared = time.perf_counter()
        whole = (Part(self.device.name, 0, checkpoint.index.size),)
        lease = await self.store.acquire(model, whole, early=early)
        loaded = time.perf_counter()
        engine = await self.engines.open(lease, skeleton, codec)
        attached = time.perf_counter()
        report = lease.report
        spent = {
            "prepare": prepared - began, "load": loaded - prepared, "attach": attached - loaded,
            "first_copy": report.first_copy_s if report else 0.0,
        }  # fmt: skip
        return lease, engine, spent

    async def bare_load(self, model: ModelId) -> float:
        """Return the seconds in which a model comes onto the device, with no engine beside it."""
        began = time.perf_counter()
        lease = await self.store.acquire(model)
        elapsed_s = time.perf_counter() - began
        lease.release()
        self.store.evict(model, Tier.DEVICE, "operator")
        await asyncio.sleep(0.1)  # the memory thread unmaps
        return elapsed_s

    async def leave(self, model: ModelId, lease: Lease, engine: Engine) -> None:
        """Take it off the device again; it stays in DRAM."""
        await engine.close()
        lease.release()
        self.store.evict(model, Tier.DEVICE, "operator")
        await asyncio.sleep(0.1)  # the memory thread unmaps

    async def say(
        self,
        engine: Engine,
        tokens_in: int,
        tokens_out: int,
        started: asyncio.Event | None = None,
    ) -> list[float]:
        """Return when each token of one session came; `started` is set at twice `WARM_TOKENS`."""
        self.asked += 1
        drawn = torch.randint(0, self.vocabulary, (tokens_in,), generator=self.numbers)
        prompt = tuple(drawn.tolist())
        request = GenerationRequest(
            SessionId(f"s{self.asked}"), self.raw, prompt, SamplingParameters(temperature=0.0),
            tokens_out, ignore_eos=True,
        )  # fmt: skip
        times: list[float] = []
        async for chunk in engine.submit(request):
            times += [time.perf_counter()] * len(chunk.tokens)
            if started is not None and len(times) >= 2 * WARM_TOKENS:
                started.set()
        assert len(times) == tokens_out, f"{len(times)} tokens of {tokens_out}"
        return times

    def show(self, name: str, value: Any) -> None:
        """Keep and print a result."""
        self.found[name] = value
        print(f"{name:14} {json.dumps(value)}", flush=True)


# --- parts ------------------------------------------------------------------------------------


async def ceiling(bench: Bench) -> None:
    """How fast the device copies within itself."""
    if not bench.arguments.device.startswith("cuda"):
        return
    source = torch.empty(2 * GIB, dtype=torch.uint8, device=bench.arguments.device)
    target = torch.empty_like(source)
    make: Any = torch.cuda.Event
    begin, end = make(enable_timing=True), make(enable_timing=True)
    rates = []
    for _ in range(12):
        begin.record()
        target.copy_(source)
        end.record()
        end.synchronize()
        rates.append(2 * source.numel() / begin.elapsed_time(end) / 1e6)
    del source, target
    torch.cuda.empty_cache()
    rate = statistics.median(rates[2:])
    size = open_checkpoint(Path(bench.arguments.store) / bench.raw).index.size
    bench.show("ceiling", {"copy_gbps": rate, "limit_ms": size / rate / 1e6})


async def decode(bench: Bench) -> None:
    """Milliseconds a token of one session."""
    lease, engine, _ = await bench.open(bench.raw)
    medians, gaps = [], []
    for _ in range(ROUNDS):
        times = await bench.say(engine, 64, 256)
        waits = [
            1e3 * (later - earlier)
            for earlier, later in zip(times[WARM_TOKENS:], times[WARM_TOKENS + 1 :], strict=False)
        ]
        mean = 1e3 * (times[-1] - times[WARM_TOKENS]) / (len(times) - 1 - WARM_TOKENS)
        medians.append(mean)
        gaps += waits
        if bench.late():
            break
    made = engine._parts.decode  # noqa: SLF001 - a benchmark tells what ran
    bench.show(
        "decode",
        {
            "ms_per_token": statistics.median(medians[1:] or medians), "rounds_ms": medians,
            "p99_gap_ms": sorted(gaps)[int(0.99 * (len(gaps) - 1))],
            "graphs": made.graphs if made is not None else None,
        },
    )  # fmt: skip
    await bench.leave(bench.raw, lease, engine)


async def batch(bench: Bench) -> None:
    """Tokens a second of many sessions."""
    lease, engine, _ = await bench.open(bench.raw)
    for count in (32, 128):
        rates = []
        for _ in range(3):
            start = time.perf_counter()
            ends = await asyncio.gather(*(bench.say(engine, 256, 128) for _ in range(count)))
            rates.append(count * 128 / (max(times[-1] for times in ends) - start))
            if bench.late():
                break
        rate = statistics.median(rates[1:] or rates)
        bench.show(f"batch_{count}", {"tokens_per_s": rate, "rounds": rates})
        if bench.late():
            break
    await bench.leave(bench.raw, lease, engine)


async def beside(bench: Bench) -> None:
    """What a long prompt does to the streams beside it."""
    lease, engine, _ = await bench.open(bench.raw)
    found: dict[str, Any] = {}
    for name, length in (("warm", 32768), ("alone", 0), ("beside", 32768)):
        started = asyncio.Event()
        streams = [bench.say(engine, 256, 384, started) for _ in range(32)]
        other = asyncio.create_task(_after(bench, engine, min(length, bench.context - 8), started))
        times = await asyncio.gather(*streams)
        first = await other
        gaps = sorted(
            1e3 * (later - earlier)
            for one in times
            for earlier, later in zip(one[WARM_TOKENS:], one[WARM_TOKENS + 1 :], strict=False)
        )
        found[name] = {
            "p50_ms": gaps[len(gaps) // 2], "p99_ms": gaps[int(0.99 * (len(gaps) - 1))],
            "most_ms": gaps[-1], "first_token_s": first,
        }  # fmt: skip
    bench.show("beside", found)
    await bench.leave(bench.raw, lease, engine)


async def _after(bench: Bench, engine: Engine, tokens: int, started: asyncio.Event) -> float | None:
    """Wait for `started`; return the seconds to the first token of so many, None if these are none."""
    if tokens <= 0:
        return None
    await started.wait()
    began = time.perf_counter()
    (came,) = await bench.say(engine, tokens, 1)
    return came - began


async def first(bench: Bench) -> None:
    """Seconds to the first token of 512, from DRAM and resident."""
    for name, model in (("raw", bench.raw), ("codec", bench.encoded)):
        await bench.store.prefetch(model)
        rows: list[dict[str, float]] = []
        resident: list[float] = []
        for _ in range(ROUNDS + 1):
            start = time.perf_counter()
            lease, engine, spent = await bench.open(model)
            submitted = time.perf_counter()
            times = await bench.say(engine, 512, 4)
            spent["prefill"] = times[0] - submitted
            spent["total"] = times[0] - start
            rows.append(spent)
            for _ in range(3):
                submitted = time.perf_counter()
                resident.append((await bench.say(engine, 512, 4))[0] - submitted)
            await bench.leave(model, lease, engine)
            if bench.late():
                break
        rows = rows[1:] or rows
        middle = {key: statistics.median(row[key] for row in rows) for key in rows[0]}
        bench.show(f"first_{name}", {**middle, "totals": [row["total"] for row in rows]})
        bench.show(f"resident_{name}", {"s": statistics.median(resident[3:] or resident)})
        await overlap(bench, name, model)


async def overlap(bench: Bench, name: str, model: ModelId) -> None:
    """Seconds to the first token of 512 that is computed while the model comes from DRAM."""
    rows: list[dict[str, float]] = []
    for _ in range(ROUNDS + 1):
        bare = await bench.bare_load(model)
        began = time.perf_counter()
        lease, engine, spent = await bench.open(model, early=True)
        acquired = began + spent["prepare"]
        loading = asyncio.create_task(_loaded(lease, engine))
        first_token = (await bench.say(engine, 512, 4))[0] - acquired
        row = {"bare_s": bare, "opened_s": spent["load"] + spent["attach"]}
        row |= {"loaded_s": await loading - acquired, "first_s": first_token}
        rows.append({**row, "ratio": (first_token - PREFILL_S) / bare})
        await bench.leave(model, lease, engine)
        if bench.late():
            break
    rows = rows[1:] or rows
    middle = {key: statistics.median(row[key] for row in rows) for key in rows[0]}
    rounds = [{key: row[key] for key in ("bare_s", "first_s", "ratio")} for row in rows]
    bench.show(f"overlap_{name}", {**middle, "rounds": rounds})


async def _loaded(lease: Lease, engine: Engine) -> float:
    """Tell the engine when its weights are all there; return when that was."""
    await lease.loaded()
    engine.loaded()
    return time.perf_counter()


async def generate(bench: Bench) -> None:
    """Transformers' generate, one session."""
    model = _theirs(bench)
    ids = torch.randint(0, bench.vocabulary, (1, 64), device=model.device)
    waits = []
    for count in (8, 64, 64):
        _settle(bench)
        start = time.perf_counter()
        with torch.inference_mode():
            model.generate(ids, max_new_tokens=count, min_new_tokens=count, do_sample=False)
        _settle(bench)
        waits.append(1e3 * (time.perf_counter() - start) / count)
    bench.show("generate", {"ms_per_token": statistics.median(waits[1:])})


async def continuous(bench: Bench) -> None:
    """Transformers' continuous batching, 32 sessions."""
    model = _theirs(bench)
    ids = torch.randint(0, bench.vocabulary, (32, 256)).tolist()
    from transformers import GenerationConfig

    config = GenerationConfig(max_new_tokens=128, do_sample=False, eos_token_id=-1)
    start = time.perf_counter()
    with torch.no_grad():
        made = model.generate_batch(inputs=ids, generation_config=config, progress_bar=False)
    count = sum(len(one.generated_tokens) for one in made.values())
    bench.show("continuous_32", {"tokens_per_s": count / (time.perf_counter() - start)})


def _theirs(bench: Bench) -> Any:
    from sllm_node.bench.shapes import find_shape

    if getattr(bench, "theirs", None) is None:
        config = find_shape(bench.arguments.shape).config
        with torch.device(bench.arguments.device):
            model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        model.set_attn_implementation("sdpa")
        bench.theirs = model.eval()  # type: ignore[attr-defined]
    return bench.theirs  # type: ignore[attr-defined]


def _settle(bench: Bench) -> None:
    if bench.arguments.device.startswith("cuda"):
        torch.cuda.synchronize()


RUN: dict[str, Callable[[Bench], Awaitable[None]]] = {
    "ceiling": ceiling, "decode": decode, "batch": batch, "beside": beside, "first": first,
    "generate": generate, "continuous": continuous,
}  # fmt: skip


def prepare(arguments: argparse.Namespace) -> None:
    """Write the model, raw and encoded, if it is not there."""
    import os
    import shutil

    raw, encoded = f"{arguments.shape}-served", f"{arguments.shape}-served-codec"
    store = arguments.store
    if not (store / raw).exists():
        random_checkpoint.write(store, arguments.shape, raw, kind=random_checkpoint.GAUSSIAN)
        random_checkpoint.make_servable(store / raw, arguments.shape)
    if "first" in arguments.parts and not (store / encoded).exists():
        copy = store / f"{encoded}-new"
        shutil.copytree(store / raw, copy, copy_function=os.link)
        recode(open_checkpoint(copy), EXPONENT)
        copy.rename(store / encoded)


async def measure(bench: Bench) -> None:
    """Run the parts asked for; one that fails does not end the rest."""
    await bench.start()
    for part in bench.arguments.parts.split(","):
        if bench.late():
            bench.show(part, "no time left")
            continue
        try:
            await RUN[part](bench)
        except Exception as error:  # noqa: BLE001 - told, and the next part is measured
            bench.show(part, f"failed: {type(error).__name__}: {error}")
    bench.theirs = None  # type: ignore[attr-defined]
    with suppress(Exception):
        bench.engines.close()
        await bench.store.close()


def main() -> None:
    """Measure and print."""
    keep_freed_memory()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--shape", default="8b")
    parser.add_argument("--store", type=Path, required=True)
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--kv-mib", type=int, default=12288)
    parser.add_argument("--limit-s", type=float, default=400)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    prepare(arguments)
    bench = Bench(arguments)
    asyncio.run(measure(bench))
    if arguments.out:
        arguments.out.write_text(json.dumps(bench.found, indent=1))


if __name__ == "__main__":
    main()
