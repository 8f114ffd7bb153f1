r"""What long prompts of other models do to a model's readers: turns by deadline beside first come, first served.

    python -m scripts.bench.interleave --store DIR [--device cpu|cuda:0] [--shape small|8b]
        [--prompt-tokens 8192] [--streams 8] [--rounds 3] [--kv-mib 512] [--out F]

On a GPU: `--device cuda:0 --shape 8b --prompt-tokens 32768 --kv-mib 8192`; three times 24 GiB of its memory.
Three models with random weights on one device, each with an engine of the node, without HTTP. The first
has 8 streams; when each has 16 tokens, the second gets one long prompt, or the second and the third get one
each. Measured: time between the streams' tokens from then until the last prompt's first token, and the time to
each prompt's first token. The order of turns is changed between rounds, in one process, round robin:
`first_come` takes turns as they are asked for, with steps of `max_step_tokens`; `deadline` is the node's with
its default target; `shortest` is that with a target of 0. `alone`: the streams without any prompt.

`two_decode`: two models with 8 streams each and no prompts, tokens/s of both and the part of the time in which the
step thread computes; `in_turn` is `deadline` without putting a step behind another model's while that runs.
"""

import argparse
import asyncio
import json
import os
import shutil
import statistics
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

import torch
from typing_extensions import override

from scripts.bench import random_checkpoint
from scripts.bench.figures import commit, describe_machine
from scripts.bench.first_come import FirstCome
from sllm_node.bench.devices import open_device
from sllm_node.checkpoint.catalog import Catalog
from sllm_node.core.clock import MonotonicClock
from sllm_node.core.config import ByteSize, EngineConfig, StoreConfig
from sllm_node.core.metrics import Metrics
from sllm_node.core.types import GenerationRequest, ModelId, SamplingParameters, SessionId
from sllm_node.core.units import GIB, MIB
from sllm_node.engine.engine import Engine
from sllm_node.engine.engines import Engines
from sllm_node.engine.interleave import Order
from sllm_node.engine.turns import Need, Turns
from sllm_node.store.store import Store
from tests.models import make_checkpoint

NAMES: Final = ("reader", "prompted-1", "prompted-2")
WARM_TOKENS: Final = 16
GREEDY: Final = SamplingParameters(temperature=0.0)
SMALL: Final[dict[str, Any]] = {
    "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 64, "max_position_embeddings": 65536,
}  # fmt: skip


class InTurn(Turns):
    """Turns by deadline, of which each begins when the one before has ended."""

    @override
    def following(self) -> int | None:
        return None


class Switch:
    """Several orders, one of which counts; changed while no engine has anything to do."""

    def __init__(self, orders: dict[str, Order]) -> None:
        self.orders = orders
        self.current = next(iter(orders.values()))

    def join(self) -> int:
        """Take the same seat in all of them."""
        (seat,) = {order.join() for order in self.orders.values()}
        return seat

    def leave(self, seat: int) -> None:
        """Give it up in all of them."""
        for order in self.orders.values():
            order.leave(seat)

    def ready(self, seat: int, need: Need, now: float) -> None:
        """As the current one."""
        self.current.ready(seat, need, now)

    def rest(self, seat: int) -> None:
        """As the current one."""
        self.current.rest(seat)

    def begin(self, now: float) -> int | None:
        """As the current one."""
        return self.current.begin(now)

    def following(self) -> int | None:
        """As the current one."""
        return self.current.following()

    def follow(self, seat: int) -> None:
        """As the current one."""
        self.current.follow(seat)

    def ended(self, seat: int, prompt_tokens: int, now: float, draws: int = 0) -> None:
        """As the current one."""
        self.current.ended(seat, prompt_tokens, now, draws)

    def prompt_tokens(self, seat: int) -> int | None:
        """As the current one."""
        return self.current.prompt_tokens(seat)


class SwitchedEngines(Engines):
    """Engines whose order of turns can be changed."""

    switch: Switch

    @override
    def order(self) -> Order:
        config = self._config
        self.switch = Switch({
            "first_come": FirstCome(),
            "deadline": Turns(config.inter_token_target_s, config.prefill_beside_tokens),
            "shortest": Turns(0.0, config.prefill_beside_tokens),
            "in_turn": InTurn(config.inter_token_target_s, config.prefill_beside_tokens),
        })  # fmt: skip
        return self.switch


class Bench:
    """Three engines on one device, and what was measured."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        self.numbers = torch.Generator().manual_seed(0)
        self.asked = 0
        self.busy_s = 0.0
        """What steps took on the step thread."""
        self.leases: list[Any] = []
        self.opened: list[Engine] = []

    async def start(self) -> None:
        """Bring the models onto the device."""
        catalog = Catalog(self.arguments.store)
        catalog.scan()
        checkpoints = [catalog.get(ModelId(name)) for name in NAMES]
        size = checkpoints[0].index.size
        self.vocabulary = checkpoints[0].index.tensors[0].shape[0]
        kv = ByteSize(self.arguments.kv_mib * MIB)
        config = EngineConfig(kv_cache_bytes=kv, prefix_cache=False)
        pool = StoreConfig(
            path=str(self.arguments.store), relay=False, chunk_bytes=ByteSize(16 * MIB),
            pool_bytes=ByteSize(min(size // (16 * MIB) + 8, 512) * 16 * MIB),
        )  # fmt: skip
        device = open_device(self.arguments.device, len(NAMES) * (size + kv) + GIB)
        clock, metrics = MonotonicClock(), Metrics()
        self.store = Store(catalog, [device], pool, clock, metrics)
        await self.store.start()
        self.engines = SwitchedEngines([device], self.store, config, clock, metrics)
        for checkpoint in checkpoints:
            codec = await self.engines.load_codec(checkpoint.path)
            skeleton = await self.engines.skeleton(checkpoint)
            self.leases.append(await self.store.acquire(checkpoint.model))
            self.opened.append(await self.engines.open(self.leases[-1], skeleton, codec))
            self.time_steps(self.opened[-1])

    def time_steps(self, engine: Any) -> None:
        """Add what its steps take to `busy_s`."""
        advance = engine._runner.advance  # noqa: SLF001

        def timed(steps: Any) -> Any:
            began = time.perf_counter()
            try:
                return advance(steps)
            finally:
                self.busy_s += time.perf_counter() - began

        engine._runner.advance = timed  # noqa: SLF001

    async def close(self) -> None:
        """Give everything back."""
        for engine, lease in zip(self.opened, self.leases, strict=True):
            await engine.close()
            lease.release()
        self.engines.close()
        await self.store.close()

    def request(self, tokens_in: int, tokens_out: int) -> GenerationRequest:
        """Return one with a random prompt."""
        self.asked += 1
        drawn = torch.randint(0, min(self.vocabulary, 300), (tokens_in,), generator=self.numbers)
        return GenerationRequest(
            SessionId(f"s{self.asked}"), ModelId("m"), tuple(drawn.tolist()), GREEDY, tokens_out,
            ignore_eos=True,
        )  # fmt: skip

    async def stream(
        self, started: asyncio.Event, stop: asyncio.Event, model: int = 0
    ) -> list[float]:
        """Return when each token of an endless session came."""
        times: list[float] = []
        generation = self.opened[model].submit(self.request(64, 60000))
        async for chunk in generation:
            times += [time.perf_counter()] * len(chunk.tokens)
            if len(times) >= WARM_TOKENS:
                started.set()
            if stop.is_set():
                generation.cancel()
        return times

    async def first_token(self, engine: Engine) -> float:
        """Return the seconds to the first token of a long prompt."""
        began = time.perf_counter()
        async for _ in engine.submit(self.request(self.arguments.prompt_tokens, 1)):
            pass
        return time.perf_counter() - began

    async def use(self, order: str) -> None:
        """Change the order of turns when no engine has anything to do."""
        while any(engine._flight for engine in self.opened):  # noqa: SLF001, ASYNC110 - of cancelled streams
            await asyncio.sleep(0.01)
        self.engines.switch.current = self.engines.switch.orders[order]

    async def both(self, order: str) -> dict[str, Any]:
        """Return what two models that decode do with the device."""
        await self.use(order)
        stop = asyncio.Event()
        starts = [asyncio.Event() for _ in range(2 * self.arguments.streams)]
        tasks = [self.stream(start, stop, number % 2) for number, start in enumerate(starts)]
        streams = [asyncio.create_task(task) for task in tasks]
        for start in starts:
            await start.wait()
        began, busy_s = time.perf_counter(), self.busy_s
        await asyncio.sleep(self.arguments.alone_s)
        ended, busy_s = time.perf_counter(), self.busy_s - busy_s
        stop.set()
        times = await asyncio.gather(*streams)
        tokens = sum(began < at < ended for one in times for at in one)
        gaps = [b - a for one in times for a, b in pairwise(one) if a > began and b < ended]
        took_s = ended - began
        return {"tokens_per_s": tokens / took_s, "busy": busy_s / took_s, "gaps": gaps}

    async def round(self, order: str, prompted: int) -> dict[str, Any]:
        """Return gaps (seconds) and the prompts' first tokens of one round."""
        await self.use(order)
        stop = asyncio.Event()
        starts = [asyncio.Event() for _ in range(self.arguments.streams)]
        streams = [asyncio.create_task(self.stream(start, stop)) for start in starts]
        for start in starts:
            await start.wait()
        began = time.perf_counter()
        engines = self.opened[1 : 1 + prompted]
        firsts = await asyncio.gather(*(self.first_token(engine) for engine in engines))
        if not prompted:
            await asyncio.sleep(self.arguments.alone_s)
        ended = time.perf_counter()
        stop.set()
        times = await asyncio.gather(*streams)
        gaps = [b - a for one in times for a, b in pairwise(one) if b > began and a < ended]
        return {"gaps": gaps, "first_tokens_s": firsts}


def summary(rounds: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return what of some rounds is reported: quantiles over all gaps, medians over rounds."""
    gaps = sorted(1e3 * gap for one in rounds for gap in one["gaps"])
    lasts = [max(one["first_tokens_s"]) for one in rounds if one["first_tokens_s"]]
    p99s = [1e3 * sorted(one["gaps"])[int(0.99 * (len(one["gaps"]) - 1))] for one in rounds]
    return {
        "p50_ms": round(gaps[len(gaps) // 2], 1), "p99_ms": round(gaps[int(0.99 * (len(gaps) - 1))], 1),
        "most_ms": round(gaps[-1], 1), "gaps": len(gaps),
        "p99_of_rounds_ms": [round(value, 1) for value in p99s],
        "last_first_token_s": round(statistics.median(lasts), 3) if lasts else None,
    }  # fmt: skip


async def two_decode(bench: Bench) -> dict[str, Any]:
    """Compare two orders while two models decode; they alternate."""
    orders = ("in_turn", "deadline")
    rounds: dict[str, list[dict[str, Any]]] = {order: [] for order in orders}
    for number in range(bench.arguments.decode_rounds):
        for order in orders if number % 2 else orders[::-1]:
            rounds[order].append(await bench.both(order))
    made: dict[str, Any] = {}
    for order, ones in rounds.items():
        gaps = sorted(1e3 * gap for one in ones for gap in one["gaps"])
        made[order] = {
            "tokens_per_s": [round(one["tokens_per_s"]) for one in ones],
            "busy": [round(one["busy"], 3) for one in ones],
            "busy_median": round(statistics.median(one["busy"] for one in ones), 3),
            "p50_ms": round(gaps[len(gaps) // 2], 2), "p99_ms": round(gaps[int(0.99 * (len(gaps) - 1))], 2),
        }  # fmt: skip
    pairs = zip(rounds["deadline"], rounds["in_turn"], strict=True)
    ratios = sorted(new["tokens_per_s"] / old["tokens_per_s"] for new, old in pairs)
    made["tokens_of_in_turn"] = [round(ratio, 3) for ratio in ratios]
    made["tokens_of_in_turn_median"] = round(statistics.median(ratios), 3)
    print(json.dumps({"two_decode": made}, indent=1), flush=True)
    return made


async def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Run all rounds."""
    bench = Bench(arguments)
    await bench.start()
    orders = [order for order in bench.engines.switch.orders if order != "in_turn"]
    await bench.round("first_come", 2)  # warm
    found: dict[str, Any] = {"alone": summary([await bench.round("deadline", 0)])}
    if arguments.decode_rounds:
        found["two_decode"] = await two_decode(bench)
    for prompted in (1, 2) if arguments.rounds else ():
        rounds: dict[str, list[dict[str, Any]]] = {order: [] for order in orders}
        for number in range(arguments.rounds):
            for place in range(len(orders)):
                order = orders[(place + number) % len(orders)]
                rounds[order].append(await bench.round(order, prompted))
        made = {order: summary(rounds[order]) for order in orders}
        naive = made["first_come"]
        for order in orders[1:]:
            made[order]["p99_of_first_come"] = round(made[order]["p99_ms"] / naive["p99_ms"], 3)
            made[order]["first_token_of_first_come"] = round(
                made[order]["last_first_token_s"] / naive["last_first_token_s"], 3
            )
        found[f"prompted_{prompted}"] = made
        print(json.dumps({f"prompted_{prompted}": made}, indent=1), flush=True)
    await bench.close()
    return found


def prepare(arguments: argparse.Namespace) -> None:
    """Write the models that are not there; one copy of the bytes."""
    store: Path = arguments.store
    store.mkdir(parents=True, exist_ok=True)
    if not (store / NAMES[0]).exists():
        if arguments.shape == "small":
            make_checkpoint(store, NAMES[0], codec="raw", chunk_bytes=4 << 20, shard_bytes=1 << 30, **SMALL)  # fmt: skip
        else:
            random_checkpoint.write(store, arguments.shape, NAMES[0])
            random_checkpoint.make_servable(store / NAMES[0], arguments.shape)
    for name in NAMES[1:]:
        if not (store / name).exists():
            shutil.copytree(store / NAMES[0], store / name, copy_function=os.link)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--store", type=Path, required=True)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--shape", default="small")
    parser.add_argument("--prompt-tokens", type=int, default=8192)
    parser.add_argument("--streams", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--kv-mib", type=int, default=512)
    parser.add_argument("--decode-rounds", type=int, default=6)
    parser.add_argument("--alone-s", type=float, default=3.0)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    prepare(arguments)
    found = {
        "date": datetime.now(UTC).isoformat(), "commit": commit(), "machine": describe_machine(),
        "device": arguments.device, "shape": arguments.shape, "streams": arguments.streams,
        "prompt_tokens": arguments.prompt_tokens, "rounds": arguments.rounds,
    }  # fmt: skip
    found |= asyncio.run(measure(arguments))
    if arguments.out:
        arguments.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
