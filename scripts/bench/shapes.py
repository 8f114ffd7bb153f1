"""Checkpoints with the shapes of well-known models and random weights, in our own format.

Written straight to shards by many threads, for measuring loads. Each file chunk has a seed of its
own, so its bytes can be made again and compared. Weights are bf16 of random sign and mantissa
between 2^-7 and 2^-3, so that a model made of them computes numbers; they say nothing about how well
trained weights compress.
"""

import shutil
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from os import cpu_count
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
import xxhash
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoModelForCausalLM,
    LlamaConfig,
    OPTConfig,
    Qwen3Config,
)
from transformers.initialization import no_init_weights

from sllm_node.checkpoint.index import (
    CODEC,
    INDEX_FILE,
    VERSION,
    Shard,
    TensorIndex,
    shard_name,
    to_json,
)
from sllm_node.checkpoint.layout import TensorSpec, plan_layout
from sllm_node.core.units import GIB, MIB
from tests.models import make_source

SHARD_BYTES: Final = 4 * GIB
CHUNK_BYTES: Final = 16 * MIB


def configs() -> dict[str, Any]:
    """Return the config of each shape."""
    return {
        "tiny": LlamaConfig(
            hidden_size=512, intermediate_size=1536, num_hidden_layers=4, num_attention_heads=8,
            num_key_value_heads=4, vocab_size=16384,
        ),
        "llama-3.2-1b": LlamaConfig(
            hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32,
            num_key_value_heads=8, vocab_size=128256, tie_word_embeddings=True,
        ),
        "llama-3.1-8b": LlamaConfig(
            hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
            num_attention_heads=32, num_key_value_heads=8, vocab_size=128256,
        ),
        "qwen3-32b": Qwen3Config(
            hidden_size=5120, intermediate_size=25600, num_hidden_layers=64,
            num_attention_heads=64, num_key_value_heads=8, head_dim=128, vocab_size=151936,
            tie_word_embeddings=False,
        ),
        "opt-6.7b": OPTConfig(
            hidden_size=4096, ffn_dim=16384, num_hidden_layers=32, num_attention_heads=32,
            vocab_size=50272, word_embed_proj_dim=4096,
        ),
    }  # fmt: skip


def specs(shape: str) -> list[TensorSpec]:
    """Return the tensors of a shape in bf16, in the order of the module."""
    config = configs()[shape]
    with torch.device("meta"), no_init_weights():
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.tie_weights()
    seen: dict[int, str] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        seen.setdefault(id(tensor), name)
    tensors = model.state_dict(keep_vars=True)
    return [TensorSpec(name, "BF16", tuple(tensors[name].shape)) for name in seen.values()]


def write(
    root: Path, shape: str, name: str | None = None, seed: int = 0, *, gaussian: bool = False
) -> int:
    """Write the checkpoint `name` of `shape` under `root` and return its bytes.

    `gaussian`: numbers as trained weights have them, for measuring codecs; they take longer to make.
    """
    layout = plan_layout(specs(shape), SHARD_BYTES)
    folder = root / (name or shape)
    folder.mkdir(parents=True, exist_ok=True)
    shards = []
    with ThreadPoolExecutor(cpu_count() or 1) as threads:
        for number, size in enumerate(layout.shard_sizes):
            path = folder / shard_name(number)
            path.touch()
            with path.open("r+b") as file:
                file.truncate(size)
                jobs = [
                    (
                        file.fileno(),
                        chunk_seed(seed, number, at),
                        at,
                        min(CHUNK_BYTES, size - at),
                        gaussian,
                    )
                    for at in range(0, size, CHUNK_BYTES)
                ]
                digests = tuple(threads.map(_write_chunk, jobs))
            shards.append(Shard(path.name, size, digests))
    index = TensorIndex(
        VERSION, folder.name, _architecture(configs()[shape]), "BF16", 4096, CHUNK_BYTES, 0, tuple(shards),
        layout.tensors, (), CODEC,
    )  # fmt: skip
    (folder / INDEX_FILE).write_bytes(to_json(index))
    return index.size


def make_servable(folder: Path, shape: str) -> None:
    """Put config and a small byte-level tokenizer beside the weights."""
    with tempfile.TemporaryDirectory() as place:
        source = make_source(Path(place) / "tiny")
        for path in source.iterdir():
            if "tokenizer" in path.name or path.suffix == ".jinja":
                shutil.copy(path, folder)
    config = configs()[shape]
    config.architectures = [_architecture(config)]
    config.dtype = "bfloat16"
    config.save_pretrained(folder)


def _architecture(config: Any) -> str:
    return str(MODEL_FOR_CAUSAL_LM_MAPPING[type(config)].__name__)


def chunk_seed(seed: int, shard: int, offset: int) -> int:
    """Return the seed of a file chunk."""
    return (seed << 48) + (shard << 36) + offset // CHUNK_BYTES


def chunk_bytes(seed: int, size: int, *, gaussian: bool = False) -> bytes:
    """Return the bytes of the file chunk that has this seed."""
    numbers = np.random.Generator(np.random.SFC64(seed))
    if gaussian:
        drawn = numbers.standard_normal(size // 2, np.float32) * np.float32(0.02)
        return bytes((drawn.view(np.uint32) >> 16).astype(np.uint16).data)
    made = numbers.integers(0, 1 << 16, size // 2, np.uint16)
    return bytes((made & 0x81FF | 0x3C00).data)


def _write_chunk(job: tuple[int, int, int, int, bool]) -> int:
    from os import pwrite

    descriptor, seed, offset, size, gaussian = job
    data = chunk_bytes(seed, size, gaussian=gaussian)
    done = 0
    while done < size:
        done += pwrite(descriptor, data[done:], offset + done)
    return xxhash.xxh3_64_intdigest(data)


def chunks(index: TensorIndex, seed: int) -> Iterator[tuple[int, int, int]]:
    """Yield (place on the device, seed, size) of every file chunk."""
    for number, shard in enumerate(index.shards):
        base = index.shard_base(number)
        for offset in range(0, shard.size, CHUNK_BYTES):
            size = min(CHUNK_BYTES, shard.size - offset)
            yield base + offset, chunk_seed(seed, number, offset), size
