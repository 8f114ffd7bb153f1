"""Peak resident memory of `sllm-node convert` on a random checkpoint of 4 GB.

`python -m scripts.bench.convert_memory --folder DIR`, where DIR has 9 GB free. The model is written
in slices, converted in a process of its own, and deleted; that process's peak is what counts.
"""

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from scripts.bench.figures import record
from tests.models import make_tokenizer

SLICE = 16 << 20
SHARD = 1 << 30
HIDDEN, WIDE, LAYERS, VOCABULARY, KEYS = 2048, 8192, 25, 128256, 512
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "dtype": "bfloat16",
    "hidden_size": HIDDEN,
    "intermediate_size": WIDE,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
    "eos_token_id": 317,
}


def shapes() -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield the tensors of the model."""
    yield "model.embed_tokens.weight", (VOCABULARY, HIDDEN)
    for layer in range(LAYERS):
        at = f"model.layers.{layer}"
        yield f"{at}.input_layernorm.weight", (HIDDEN,)
        yield f"{at}.self_attn.q_proj.weight", (HIDDEN, HIDDEN)
        yield f"{at}.self_attn.k_proj.weight", (KEYS, HIDDEN)
        yield f"{at}.self_attn.v_proj.weight", (KEYS, HIDDEN)
        yield f"{at}.self_attn.o_proj.weight", (HIDDEN, HIDDEN)
        yield f"{at}.post_attention_layernorm.weight", (HIDDEN,)
        yield f"{at}.mlp.gate_proj.weight", (WIDE, HIDDEN)
        yield f"{at}.mlp.up_proj.weight", (WIDE, HIDDEN)
        yield f"{at}.mlp.down_proj.weight", (HIDDEN, WIDE)
    yield "model.norm.weight", (HIDDEN,)
    yield "lm_head.weight", (VOCABULARY, HIDDEN)


def write_model(folder: Path) -> int:
    """Write a random bf16 model as sharded safetensors; return its bytes."""
    folder.mkdir()
    shards: list[list[tuple[str, tuple[int, ...], int]]] = [[]]
    for name, shape in shapes():
        size = 2 * int(np.prod(shape))
        if shards[-1] and sum(s for _, _, s in shards[-1]) + size > SHARD:
            shards.append([])
        shards[-1].append((name, shape, size))
    random = np.random.default_rng(0)
    places = {}
    for number, tensors in enumerate(shards, 1):
        file_name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        places.update({name: file_name for name, _, _ in tensors})
        write_shard(folder / file_name, tensors, random)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    (folder / "config.json").write_text(json.dumps(CONFIG))
    make_tokenizer(folder)
    return sum(size for tensors in shards for _, _, size in tensors)


def write_shard(
    path: Path, tensors: list[tuple[str, tuple[int, ...], int]], random: np.random.Generator
) -> None:
    """Write one safetensors file of random bytes."""
    header, offset = {}, 0
    for name, shape, size in tensors:
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for start in range(0, offset, SLICE):
            file.write(random.bytes(min(SLICE, offset - start)))
        os.fsync(file.fileno())


def convert(source: Path, store: Path) -> tuple[float, float]:
    """Convert in a process of its own; return its peak in GiB and the seconds it took."""
    command = [
        sys.executable, "-m", "sllm_node", "convert", str(source), "--name", "random", "--store", str(store),
    ]  # fmt: skip
    start = time.monotonic()
    child = os.posix_spawn(sys.executable, command, os.environ)
    _, status, usage = os.wait4(child, 0)
    if status != 0:
        sys.exit(f"convert failed with status {status}")
    return usage.ru_maxrss / (1 << 20), time.monotonic() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--runs", type=int, default=3)
    arguments = parser.parse_args()
    work = Path(tempfile.mkdtemp(prefix="sllm-convert-", dir=arguments.folder))
    try:
        size = write_model(work / "source")
        samples = []
        print(f"{'run':>4} {'model GB':>9} {'peak GiB':>9} {'seconds':>8} {'GB/s':>6}")
        for run in range(1, arguments.runs + 1):
            peak, seconds = convert(work / "source", work / "store")
            samples.append(peak)
            print(
                f"{run:>4} {size / 1e9:>9.2f} {peak:>9.3f} {seconds:>8.1f} {size / 1e9 / seconds:>6.2f}"
            )
            shutil.rmtree(work / "store")
        note = f"{size / 1e9:.2f} GB of bf16 in {LAYERS} layers, 4 safetensors shards"
        record(
            "convert_peak_rss_gib", max(samples), samples, note=note,
            command="python -m scripts.bench.convert_memory",
        )  # fmt: skip
    finally:
        shutil.rmtree(work)


if __name__ == "__main__":
    main()
