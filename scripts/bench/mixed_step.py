"""What a step with a piece of a prompt takes on a GPU, beside sessions that decode; shapes of an 8B Llama.

    python -m scripts.bench.mixed_step [--device cuda:0] [--sessions 32] [--pieces 0,32,96,160,480]
        [--behind 0,8192,16384,32000] [--profile] [--out F]

Weights are random, sessions have 500 tokens. Steps follow each other as in the node, the next launched
before the last one's tokens are read, so what is printed is the longer of the host's and the device's
time: the median of `--rounds`, in milliseconds. `--profile` lists the kernels of the shortest and the longest
piece behind the longest context, and the sum of their times. `scripts.bench.mixed_cost` times the host alone.
"""

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import orjson
import torch
from torch.profiler import ProfilerActivity, profile
from transformers import LlamaConfig, LlamaForCausalLM

from scripts.bench.figures import commit, describe_machine
from scripts.bench.mixed_cost import BLOCK_TOKENS, made_step
from sllm_node.bench.devices import open_device
from sllm_node.core.units import GIB
from sllm_node.device.optional import step_kernels
from sllm_node.engine.decode_batch import DecodeBatch
from sllm_node.engine.decode_ops import KernelOps
from sllm_node.engine.fused import FusedDecoder
from sllm_node.engine.graphs import CudaGraphs
from sllm_node.engine.kv import KvCache, KvMemory, bytes_per_token
from sllm_node.engine.runner import Runner, StepPart
from sllm_node.engine.scratch import ScratchMemory
from sllm_node.engine.skeleton import LayerShape
from sllm_node.engine.step_graphs import StepGraphs

WARM = 8


def made_runner(name: str, slots: int) -> Runner:
    """Return a runner of an 8B Llama with random weights."""
    gpu = torch.device(name)
    config = LlamaConfig(
        hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, vocab_size=128256, head_dim=128,
        num_attention_heads=32, num_key_value_heads=8, max_position_embeddings=131072,
    )  # fmt: skip
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    with gpu:
        model = LlamaForCausalLM(config).eval()
    torch.set_default_dtype(before)
    shapes = [LayerShape(8, 128, 128)] * 32
    size = bytes_per_token(shapes, torch.bfloat16) * slots
    device: Any = open_device(name, size + GIB)
    kernels = step_kernels(device)
    assert kernels is not None
    cache = KvCache(shapes, slots, torch.bfloat16, [KvMemory(name, 32, device.allocate(size))])
    for tensor in (*cache.keys, *cache.values):
        tensor.normal_()
    decoder = FusedDecoder.of(model, shapes, KernelOps(kernels, 65536))
    assert decoder is not None
    graphs = StepGraphs(CudaGraphs(gpu), 1000)
    decode = DecodeBatch(decoder, cache, BLOCK_TOKENS, 2048, ScratchMemory(gpu), graphs)
    return Runner(model, cache, BLOCK_TOKENS, decode)


def step_ms(runner: Runner, step: list[StepPart], rounds: int) -> float:
    """Return the time between the ends of such steps, each launched behind the one before it."""
    runner.advance([step, step])
    ends = []
    for _ in range(WARM + rounds):
        runner.advance([step])
        ends.append(time.perf_counter())
    runner.advance([])
    times = [later - earlier for earlier, later in zip(ends[WARM:], ends[WARM + 1 :], strict=False)]
    return 1e3 * statistics.median(times)


def profiled(runner: Runner, step: list[StepPart]) -> None:
    """Print the kernels of a step."""
    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as found:
        runner.advance([step])
        torch.cuda.synchronize()
    rows = [row for row in found.key_averages() if row.device_time_total and not row.cpu_time_total]
    rows.sort(key=lambda row: -row.device_time_total)
    print(f"    kernels {sum(row.device_time_total for row in rows) / 1e3:.2f} ms")
    for row in rows[:12]:
        print(f"    {row.device_time_total / 1e3:7.3f} ms {row.count:5} x {row.key[:90]}")


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--sessions", type=int, default=32, help="that decode")
    parser.add_argument("--pieces", default="0,32,96,160,480")
    parser.add_argument("--behind", default="0,8192,16384,32000")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    pieces, lengths = (
        [int(one) for one in text.split(",")] for text in (asked.pieces, asked.behind)
    )
    slots = asked.sessions * 512 + max(lengths) + max(pieces) + 1024
    found: dict[str, dict[str, float]] = {}
    with torch.inference_mode():
        runner = made_runner(asked.device, slots // BLOCK_TOKENS * BLOCK_TOKENS)
        for behind in lengths:
            row = found[str(behind)] = {}
            for piece in pieces:
                step = made_step(asked.sessions, behind, piece)
                step = step if piece else step[:-1]
                row[str(piece)] = round(step_ms(runner, step, asked.rounds), 3)
            print(
                f"behind {behind:6}:", "  ".join(f"{n}: {ms:.2f} ms" for n, ms in row.items()),
                flush=True,
            )  # fmt: skip
        if asked.profile:
            for piece in (min(filter(None, pieces)), max(pieces)):
                print(f"{piece} behind {max(lengths)}:")
                profiled(runner, made_step(asked.sessions, max(lengths), piece))
    if asked.out:
        about = {
            "machine": describe_machine(),
            "gpu": torch.cuda.get_device_name(),
            "commit": commit(),
        }
        data = {"about": about, "sessions": asked.sessions, "ms": found}
        asked.out.write_bytes(orjson.dumps(data, option=orjson.OPT_INDENT_2))


if __name__ == "__main__":
    main()
