"""How many texts change when they are cut and resumed, by `fast` and by `replay`; records nothing.

    python -m scripts.bench.resume [--seconds 110] [--tokens 48] [--store DIR] [--model NAME]

The model is the one of scripts/quickstart, fetched and converted if it is not there: bf16, on this
CPU. For each prompt and seed (seed 0 greedy, others at temperature 0.8) a text is generated alone,
twice; then it is cut after a quarter, a half and three quarters of its tokens and resumed in both
modes. No prefix cache, as on a node that has not seen the session. A text has changed when any of
its tokens is another one. `again` is the same text generated a second time: what changes there is no
mode's fault. Ends after the prompt and seed during which `--seconds` are over.
"""

import argparse
import asyncio
import time
from collections.abc import Iterator
from contextlib import AsyncExitStack
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any, Final

from scripts import quickstart
from sllm_node.checkpoint.catalog import Catalog
from sllm_node.core.clock import MonotonicClock
from sllm_node.core.config import Config, parse_config
from sllm_node.core.metrics import Metrics
from sllm_node.core.types import (
    GenerationRequest,
    ModelId,
    ResumeMode,
    SamplingParameters,
    SessionId,
    TokenIds,
)
from sllm_node.device.cpu import CpuDevice
from sllm_node.engine.engines import Engines
from sllm_node.engine.text import TextCodec
from sllm_node.schedule.driver import Service
from sllm_node.store.store import Store

CONFIG: Final = """
[store]
path = "{store}"
pool_bytes = "512MiB"
[device]
memory_bytes = "2GiB"
[engine]
kv_cache_bytes = "128MiB"
torch_threads = 1
prefix_cache = false
"""
MODES: Final[tuple[ResumeMode, ...]] = ("fast", "replay")
PROMPTS: Final = (
    "Tell me a short story about a lighthouse.",
    "Explain why the sky is blue.",
    "Write a poem about rain in the city.",
    "How do I bake bread without yeast?",
    "What should I see in Lisbon in two days?",
    "List five uses of an old newspaper.",
)


@dataclass(slots=True)
class Row:
    """What one way of resuming did."""

    texts: int = 0
    changed: int = 0
    kept: int = 0
    """Tokens behind the cut that were the same, of the texts that changed."""
    seconds: float = 0.0

    def take(self, rest: TokenIds, wanted: TokenIds, seconds: float) -> None:
        """Count one resumed text."""
        self.texts += 1
        self.seconds += seconds
        if rest != wanted:
            self.changed += 1
            pairs = zip(rest, wanted, strict=False)
            self.kept += next((n for n, (a, b) in enumerate(pairs) if a != b), len(rest))

    def show(self, name: str) -> str:
        """Return a line of the table."""
        share = 100 * self.changed / self.texts
        kept = f"{self.kept / self.changed:.1f}" if self.changed else "-"
        each = 1e3 * self.seconds / self.texts
        return f"{name:8} {self.texts:6} {self.changed:8} {share:8.1f} {kept:>12} {each:10.0f}"


class Node:
    """The model on the CPU device, asked without HTTP."""

    def __init__(self, service: Service[TextCodec], model: ModelId) -> None:
        self._service = service
        self._model = model
        self._numbers = count()

    async def prompt(self, question: str) -> TokenIds:
        """Return the tokens of a question."""
        codec = await self._service.prepare(self._model)
        return codec.render_chat([{"role": "user", "content": question}])

    async def generate(
        self, prompt: TokenIds, seed: int, tokens: int, **more: Any
    ) -> tuple[TokenIds, float]:
        """Return what is generated, and the seconds that it took."""
        sampling = SamplingParameters(temperature=0.8 if seed else 0.0, seed=seed)
        session = SessionId(f"s{next(self._numbers)}")
        began = time.monotonic()
        stream = self._service.open(
            GenerationRequest(session, self._model, prompt, sampling, tokens, **more)
        )
        made: TokenIds = ()
        async for chunk in stream:
            made += chunk.tokens
        return made, time.monotonic() - began


async def open_node(stack: AsyncExitStack, config: Config, model: ModelId) -> Node:
    """Open device, store and service, and load the model."""
    clock, metrics = MonotonicClock(), Metrics()
    catalog = Catalog(Path(config.store.path))
    catalog.scan()
    device = stack.enter_context(CpuDevice(config.device.memory_bytes))
    store = Store(catalog, (device,), config.store, clock, metrics)
    await store.start()
    stack.push_async_callback(store.close)
    engines = Engines((device,), store, config.engine, clock, metrics)
    stack.callback(engines.close)
    service: Service[TextCodec] = Service(config, catalog, store, engines, clock, metrics)
    stack.push_async_callback(service.close)
    await service.load(model)
    return Node(service, model)


def cases() -> Iterator[tuple[int, str]]:
    """Yield seeds and prompts, for ever."""
    return ((seed, question) for seed in count() for question in PROMPTS)


async def measure(node: Node, seconds: float, tokens: int) -> dict[str, Row]:
    """Cut and resume texts until the time is over."""
    rows = {name: Row() for name in ("again", *MODES)}
    end = time.monotonic() + seconds
    for seed, question in cases():
        prompt = await node.prompt(question)
        whole, _ = await node.generate(prompt, seed, tokens)
        rows["again"].take(*await _rest(node, prompt, seed, tokens, whole, 0, None))
        for cut in sorted({len(whole) * quarter // 4 for quarter in (1, 2, 3)} - {0}):
            for mode in MODES:
                rows[mode].take(*await _rest(node, prompt, seed, tokens, whole, cut, mode))
        if time.monotonic() >= end:
            return rows
    raise AssertionError


async def _rest(
    node: Node, prompt: TokenIds, seed: int, tokens: int, whole: TokenIds, cut: int,
    mode: ResumeMode | None,
) -> tuple[TokenIds, TokenIds, float]:  # fmt: skip
    """Return what comes behind a cut, what should, and the seconds that it took."""
    rest, took = await node.generate(prompt, seed, tokens, resumed=whole[:cut], resume=mode)
    return rest, whole[cut:], took


async def run(asked: argparse.Namespace) -> None:
    config = parse_config(CONFIG.format(store=asked.store))
    async with AsyncExitStack() as stack:
        node = await open_node(stack, config, ModelId(asked.model))
        rows = await measure(node, asked.seconds, asked.tokens)
    print("way       texts  changed  percent  kept tokens    ms each")
    for name, row in rows.items():
        print(row.show(name))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=110.0)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--store", type=Path, default=quickstart.STORE)
    parser.add_argument("--model", default=quickstart.MODEL)
    asked = parser.parse_args()
    if asked.store == quickstart.STORE:
        quickstart.HOME.mkdir(exist_ok=True)
        quickstart.convert(quickstart.fetch_model())
    asyncio.run(run(asked))


if __name__ == "__main__":
    main()
