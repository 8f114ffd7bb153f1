"""What a mixed step costs the host: its launches on a GPU that is not there, timed.

    python -m scripts.bench.mixed_cost [--behind 1920] [--profile]

Sessions that decode and a piece of a long prompt go through the runner with as many layers as a model
of 8B has, but few and narrow heads: torch's operations run on the CPU and have next to nothing to do.
Graphs replay nothing, our kernels go to a driver that takes everything, torch's flash kernel is a
function that returns memory. What is left is Python and torch's dispatch; the driver's own time, 2 to
6 us a launch, is not there, so the operations and launches of a layer tell what a GPU adds, besides one
replay and two calls of the flash kernel.
"""

import argparse
import cProfile
import pstats
import statistics
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, TypeVar

import numpy as np
import torch
from cuda.bindings import driver
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM
from typing_extensions import override

from sllm_node.core.types import SamplingParameters
from sllm_node.device.step_kernels import StepKernels
from sllm_node.engine import flash
from sllm_node.engine.decode_batch import DecodeBatch
from sllm_node.engine.decode_ops import KernelOps
from sllm_node.engine.fused import FusedDecoder
from sllm_node.engine.kv import KvCache, KvMemory, KvPart, bytes_per_token
from sllm_node.engine.runner import Runner, StepPart
from sllm_node.engine.sampling import SamplingRow
from sllm_node.engine.scratch import ScratchMemory
from sllm_node.engine.skeleton import LayerShape
from sllm_node.engine.step_graphs import CAPTURES_A_STEP, StepGraphs

LAYERS, HEADS, KV_HEADS, SIZE, BLOCK_TOKENS = 32, 4, 1, 64, 16
T = TypeVar("T")
MULTIPROCESSORS = 132
VIEWS = {
    "view",
    "slice",
    "select",
    "as_strided",
    "unsqueeze",
    "permute",
    "split",
    "detach",
    "alias",
}


Put = Callable[[Any, str, Any], None]
"""Puts something in the place of the real thing."""


class _Context:
    def __enter__(self) -> None:
        return None

    def __exit__(self, *_: object) -> None:
        return None

    def check(self, what: str, result: tuple[Any, ...]) -> Any:
        assert result[0] == driver.CUresult.CUDA_SUCCESS, what
        return result[1] if len(result) == 2 else result[1:]


class _Ops(KernelOps):
    flash_multiprocessors = MULTIPROCESSORS


class _Graphs:
    """Graphs that replay nothing."""

    def capture(self, compute: Callable[[], T]) -> Callable[[], T]:
        made = compute()
        return lambda: made


class Counted(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts operations that would launch something."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names: dict[str, int] = {}

    @override
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name not in VIEWS and not name.startswith(("empty", "new_empty")):
            self.names[name] = self.names.get(name, 0) + 1
        return func(*args, **(kwargs or {}))


def null_kernels(put: Put = setattr) -> StepKernels:
    """Return the real thing on a driver that takes everything."""
    good = driver.CUresult.CUDA_SUCCESS
    launches = SimpleNamespace(count=0)

    def launch(*_: Any) -> tuple[Any]:
        launches.count += 1
        return (good,)

    answers: dict[str, Any] = {
        "cuDeviceGetAttribute": lambda which, _: (
            good, MULTIPROCESSORS if "MULTIPROCESSOR" in which.name else 9 * ("MAJOR" in which.name),
        ),
        "cuModuleLoadData": lambda *_: (good, 1),
        "cuModuleGetFunction": lambda *_: (good, driver.CUfunction(1)),
        "cuOccupancyMaxActiveBlocksPerMultiprocessor": lambda *_: (good, 2),
        "cuLaunchKernelEx": launch,
    }  # fmt: skip
    for name, answer in answers.items():
        put(driver, name, answer)
    kernels = StepKernels(_Context(), 0)
    kernels.launches = launches  # type: ignore[attr-defined]
    return kernels


def null_flash(put: Put = setattr) -> None:
    """Put a function that computes nothing in the place of torch's flash kernel."""
    known: dict[tuple[int, ...], tuple[torch.Tensor, torch.Tensor]] = {}

    def attend(query: torch.Tensor, *_: Any) -> tuple[torch.Tensor, torch.Tensor]:
        if query.shape not in known:
            tokens, heads, _size = query.shape
            known[query.shape] = torch.zeros_like(query), torch.zeros(heads, tokens)
        return known[query.shape]

    put(flash, "flash", attend)


def made_runner(kernels: StepKernels, slots: int) -> Runner:
    """Return a runner of a model of many narrow layers."""
    config = LlamaConfig(
        hidden_size=64, intermediate_size=64, num_hidden_layers=LAYERS, vocab_size=320, head_dim=SIZE,
        num_attention_heads=HEADS, num_key_value_heads=KV_HEADS, max_position_embeddings=65536,
    )  # fmt: skip
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    shapes = [LayerShape(KV_HEADS, SIZE, SIZE)] * LAYERS
    buffer: Any = SimpleNamespace(
        array=np.zeros(bytes_per_token(shapes, torch.bfloat16) * slots, np.uint8)
    )
    cache = KvCache(shapes, slots, torch.bfloat16, [KvMemory("cpu", LAYERS, buffer)])
    decoder = FusedDecoder.of(model, shapes, _Ops(kernels, 32768))
    assert decoder is not None
    memory = ScratchMemory(torch.device("cpu"))
    decode = DecodeBatch(decoder, cache, BLOCK_TOKENS, 2048, memory, StepGraphs(_Graphs(), 1000))
    return Runner(model, cache, BLOCK_TOKENS, decode)


def made_step(sessions: int, behind: int, piece: int) -> list[StepPart]:
    """Return the parts: sessions of 500 tokens that decode, and a piece of a prompt."""
    parts, first = [], 0
    for number in range(sessions + 1):
        is_piece = number == sessions
        start, count = (behind, piece) if is_piece else (500, 1)
        blocks = -(-(start + count + 1) // BLOCK_TOKENS)
        table = tuple(range(first, first + blocks))
        first += blocks
        row = SamplingRow(SamplingParameters(temperature=0.0), 0)
        parts.append(StepPart((7,) * count, KvPart(start, count, table), row))
    return parts


def counted(
    runner: Runner, step: list[StepPart], kernels: StepKernels
) -> tuple[dict[str, int], int]:
    """Return which operations of torch a step launches, and how many launches of our kernels."""
    counts, launches = Counted(), kernels.launches  # type: ignore[attr-defined]
    launches.count = 0
    with counts:
        runner.advance([step])
    return dict(sorted(counts.names.items())), launches.count


def measure(options: argparse.Namespace) -> None:
    """Measure and print."""
    null_flash()
    kernels = null_kernels()
    slots = options.sessions * 512 + options.behind + options.piece + 64
    runner = made_runner(kernels, slots)
    step = made_step(options.sessions, options.behind, options.piece)
    for _ in range(3 + LAYERS // CAPTURES_A_STEP):  # from the second on pieces are captured
        runner.advance([step])
    names, launches = counted(runner, step, kernels)
    per_layer = {name: count // LAYERS for name, count in names.items() if count >= LAYERS}
    per_step = {name: count % LAYERS for name, count in names.items() if count % LAYERS}
    print(f"of a layer: {launches / LAYERS:.1f} launches of our kernels, operations {per_layer}")
    print(f"of a step, besides: operations {per_step}")
    profile, seconds = cProfile.Profile(), []
    for _ in range(options.rounds):
        begun = time.perf_counter()
        runner.advance([step])
        seconds.append(time.perf_counter() - begun)
    if options.profile:
        profile.enable()
        for _ in range(options.rounds):
            runner.advance([step])
        profile.disable()
        pstats.Stats(profile).sort_stats("tottime").print_stats(32)
    best, middle = min(seconds) * 1e6, statistics.median(seconds) * 1e6
    print(f"a step: {middle:.0f} us, best {best:.0f} us, {best / LAYERS:.0f} us for each layer")


def main() -> None:
    """Read options."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--sessions", type=int, default=32, help="that decode")
    parser.add_argument("--piece", type=int, default=128, help="tokens of a prompt")
    parser.add_argument("--behind", type=int, default=1920, help="tokens before these")
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--profile", action="store_true")
    torch.set_num_threads(1)
    measure(parser.parse_args())


if __name__ == "__main__":
    main()
