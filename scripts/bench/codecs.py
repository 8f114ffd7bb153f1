"""Codecs compared: ratio and rates on a CPU, of Gaussian and of trained weights.

    python -m scripts.bench.codecs [--trained FILE.safetensors ...] [--threads 2] [--record]

Chunks of 2 MiB, ratios with headers and padding to pages; rates are of decoded bytes, the best of
five; one thread, and for encoding also `--threads`. Trained fp32 weights are cast to bf16, fp16 and
fp8, which is what a conversion would do. `--record` writes a checkpoint of 8B shapes, the first 8 of
32 layers, and records `codec_ratio_gaussian_bf16`: files and index over raw bytes.
"""

import argparse
import re
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch

from scripts.bench.codec_candidates import Escapes, Rans
from scripts.bench.figures import record
from sllm_node.bench.shapes import find_shape
from sllm_node.checkpoint.index import TensorIndex
from sllm_node.checkpoint.layout import TensorSpec, plan_layout
from sllm_node.checkpoint.output import DiskFiles
from sllm_node.checkpoint.sinks import ENCODED_CHUNK_BYTES
from sllm_node.checkpoint.writer import ShardWriter, with_shards, write_index
from sllm_node.codec import exponent
from sllm_node.codec.names import EXPONENT
from sllm_node.core.allocator import keep_freed_memory
from sllm_node.core.units import GIB, MIB, PAGE, align_up

CHUNK = 2 * MIB
DTYPES = {
    "BF16": (torch.bfloat16, exponent.BF16), "F16": (torch.float16, exponent.F16),
    "F32": (torch.float32, exponent.F32), "F8_E4M3": (torch.float8_e4m3fn, exponent.F8_E4M3),
    "F8_E5M2": (torch.float8_e5m2, exponent.F8_E5M2),
}  # fmt: skip


class Ours:
    """The codec of the product."""

    name = "exp: 2 + 3 bits"

    def __init__(self, layout: exponent.FloatFormat) -> None:
        self.layout = layout

    def encode(self, data: bytes) -> Any:
        return exponent.encode(self.layout, memoryview(data))

    def decode(self, encoded: Any) -> bytes:
        return exponent.decode(self.layout, encoded, CHUNK).tobytes()

    def size(self, encoded: Any) -> int:
        return len(encoded)


def gaussian() -> torch.Tensor:
    """Return as many numbers as four chunks of fp32 hold."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(4 * CHUNK // 4, generator=generator) * 0.02


def trained(files: list[Path]) -> torch.Tensor:
    """Return all weights of two dimensions in safetensors files, one after another."""
    from safetensors.torch import load_file

    tensors = [t.float().reshape(-1) for f in files for t in load_file(f).values() if t.dim() > 1]
    return torch.cat(tensors)


def chunks(numbers: torch.Tensor, dtype: torch.dtype) -> list[bytes]:
    """Return whole chunks of `numbers` as `dtype`; fp8 scaled to its range."""
    if dtype.itemsize == 1:
        numbers = numbers * (torch.finfo(dtype).max / 8 / numbers.abs().max())
    data = numbers.to(dtype).view(torch.uint8).numpy().tobytes()
    return [data[i : i + CHUNK] for i in range(0, len(data) - CHUNK + 1, CHUNK)]


def bound(data: list[bytes], layout: exponent.FloatFormat) -> float:
    """Return the ratio that the entropy of the exponents allows, each chunk by itself."""
    total = 0.0
    for chunk in data:
        words = np.frombuffer(chunk, "<u4")
        elements = (words << 1 | words >> 31).view(f"<u{layout.width}")
        counts = np.bincount((elements >> layout.shift).astype(np.uint8))
        shares = counts[counts > 0] / counts.sum()
        total += layout.shift - (shares * np.log2(shares)).sum()
    return total / len(data) / 8 / layout.width


def fastest(work: Callable[[], object], size: int) -> float:
    """Return MB/s, the best of five."""
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    return size / min(seconds) / 1e6


def compare(title: str, numbers: torch.Tensor, threads: int) -> None:
    """Print a row for each dtype and codec."""
    for dtype, (torch_dtype, layout) in DTYPES.items():
        data = chunks(numbers, torch_dtype)[:8]
        candidates: list[Any] = [Ours(layout)]
        if dtype == "BF16":
            candidates += [Escapes(), Rans()]
        for codec in candidates:
            encoded = [codec.encode(chunk) for chunk in data]
            assert all(codec.decode(e) == c for e, c in zip(encoded, data, strict=True))
            stored = sum(align_up(codec.size(e), PAGE) for e in encoded)
            total = len(data) * CHUNK
            with ThreadPoolExecutor(threads) as pool:
                together = fastest(lambda: list(pool.map(codec.encode, data)), total)  # noqa: B023
            alone = fastest(lambda: [codec.encode(c) for c in data], total)  # noqa: B023
            back = fastest(lambda: [codec.decode(e) for e in encoded], total)  # noqa: B023
            print(
                f"| {title} {dtype} | {codec.name} | {stored / total:.4f} | {bound(data, layout):.4f} "
                f"| {alone:.0f} | {together:.0f} | {back:.0f} |",
                flush=True,
            )


def shaped_tensors() -> list[TensorSpec]:
    """Return the tensors of 8B shapes, of the first 8 layers."""
    return [
        TensorSpec(tensor.name, "BF16", tensor.dimensions)
        for tensor in find_shape("8b").tensors
        if (found := re.search(r"layers\.(\d+)\.", tensor.name)) is None or int(found[1]) < 8
    ]


def checkpoint_ratio() -> tuple[float, float]:
    """Write Gaussian weights by the codec; return files and index over raw bytes, and MB/s."""
    specs = shaped_tensors()
    layout = plan_layout(specs, 4 * GIB)
    generator = torch.Generator().manual_seed(0)
    spent = 0.0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with ShardWriter(folder, layout, ENCODED_CHUNK_BYTES, DiskFiles(), EXPONENT) as writer:
            for spec, entry in zip(specs, layout.tensors, strict=True):
                numbers = torch.empty(spec.size // 2, dtype=torch.bfloat16)
                numbers.normal_(0.0, 0.02, generator=generator)
                start = time.perf_counter()
                writer.begin(entry)
                writer.write(numbers.view(torch.uint8).numpy().data)
                spent += time.perf_counter() - start
            start = time.perf_counter()
            shards = writer.finish()
            spent += time.perf_counter() - start
        index = TensorIndex(
            1, "8b", "LlamaForCausalLM", "BF16", 4096, ENCODED_CHUNK_BYTES, 0, (), layout.tensors
        )
        write_index(folder, with_shards(index, shards), DiskFiles())
        stored = sum(path.stat().st_size for path in folder.iterdir())
    return stored / layout.size, layout.size / spent / 1e6


def main() -> None:
    """Compare and print a table."""
    keep_freed_memory()
    parser = argparse.ArgumentParser()
    parser.add_argument("--trained", type=Path, nargs="*", default=[])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--record", action="store_true")
    options = parser.parse_args()
    if options.record:
        ratio, rate = checkpoint_ratio()
        note = f"first 8 of 32 layers, mean 0, deviation 0.02; written at {rate:.0f} MB/s"
        command = "python -m scripts.bench.codecs --record"
        record("codec_ratio_gaussian_bf16", ratio, [ratio], note=note, command=command)
        print(ratio, note)
        return
    print("| weights | codec | ratio | bound | encode MB/s | with threads | decode MB/s |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    compare("Gaussian", gaussian(), options.threads)
    if options.trained:
        compare("trained", trained(options.trained), options.threads)


if __name__ == "__main__":
    main()
