"""Decode steps by our kernels, captured in graphs, on a GPU."""

import random
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from sllm_node.core.clock import MonotonicClock
from sllm_node.core.config import ByteSize, EngineConfig
from sllm_node.core.metrics import Metrics
from sllm_node.core.types import Part, SamplingParameters, Tier
from sllm_node.core.units import MIB
from sllm_node.device.optional import step_kernels
from sllm_node.engine.decode_ops import KernelOps, ReferenceOps
from sllm_node.engine.engines import Engines
from sllm_node.engine.fused import DecodeInputs, FusedDecoder, Scratch
from sllm_node.engine.kv import KvCache, KvMemory, bytes_per_token
from sllm_node.engine.skeleton import LayerShape
from tests.gpu.test_engine import MODEL, open_store
from tests.gpu.test_loads import open_devices
from tests.models import make_checkpoint
from tests.unit.engine.rig import ask, collect

pytestmark = pytest.mark.gpu
SHAPE: dict[str, Any] = {
    "hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 4, "vocab_size": 320,
    "num_attention_heads": 8, "num_key_value_heads": 2, "max_position_embeddings": 512,
    "head_dim": 64,
}  # fmt: skip
BLOCK_TOKENS, BLOCKS = 16, 64


def small_model(family, dtype):
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **SHAPE), dtype=dtype)
    return model.to("cuda:0").eval()


def step_of(model, ops, rows, device):
    """Return the logits of a step with random keys and values in the cache."""
    config = model.config
    shapes = [LayerShape(config.num_key_value_heads, 64, 64)] * config.num_hidden_layers
    slots = BLOCK_TOKENS * BLOCKS
    buffer = device.allocate(bytes_per_token(shapes, model.dtype) * slots)
    cache = KvCache(shapes, slots, model.dtype, [KvMemory("cuda:0", len(shapes), buffer)])
    generator = torch.Generator("cuda:0").manual_seed(5)
    for tensor in (*cache.keys, *cache.values):
        tensor.normal_(0, 1, generator=generator)
    lengths = torch.arange(1, 1 + 7 * rows, 7, dtype=torch.int32, device="cuda:0")
    width = BLOCKS // rows
    tables = torch.arange(width * rows, dtype=torch.int32, device="cuda:0").view(rows, width)
    last = lengths.long() - 1
    blocks = tables.gather(1, (last // BLOCK_TOKENS)[:, None])[:, 0]
    place = (blocks * BLOCK_TOKENS + last % BLOCK_TOKENS).int()
    ids = torch.randint(0, 320, (rows,), generator=generator, device="cuda:0", dtype=torch.int32)
    decoder = FusedDecoder.of(model, shapes, ops)
    assert decoder is not None
    made = (torch.empty(rows, n, dtype=model.dtype, device="cuda:0") for n in decoder.widths())
    inputs = DecodeInputs(ids, last.int(), place, tables, lengths)
    with torch.inference_mode():
        logits = decoder.step(inputs, cache, BLOCK_TOKENS, Scratch(*made)).clone()
    torch.cuda.synchronize()
    cache.close()
    buffer.close()
    return logits


@pytest.mark.parametrize("rows", [1, 3, 8])
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mistral"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_kernels_give_the_logits_of_the_reference(family, rows, dtype):
    (device,) = open_devices(1, 256 * MIB)
    model = small_model(family, dtype)
    kernels = step_kernels(device)
    assert kernels is not None
    found = step_of(model, KernelOps(kernels, 512), rows, device).double()
    torchs = step_of(model, ReferenceOps(), rows, device).double()
    truth = step_of(model.double(), ReferenceOps(), rows, device)
    error = float((found - truth).norm() / truth.norm())
    assert error <= 1.2 * float((torchs - truth).norm() / truth.norm()) + 1e-3
    kernels.close()
    device.close()


@pytest.mark.parametrize("number", [0, 1])
async def test_a_model_that_returns_says_the_same_with_the_graphs_that_it_had(tmp_path, number):
    checkpoint = make_checkpoint(tmp_path / "store", "m", "llama", dtype="bfloat16", **SHAPE)
    devices = open_devices(number + 1, 900 * MIB)
    placement = (Part(devices[number].name, 0, checkpoint.index.size),)
    store = await open_store(tmp_path / "store", devices)
    settings = EngineConfig(kv_cache_bytes=ByteSize(64 * MIB))
    engines = Engines(devices, store, settings, MonotonicClock(), Metrics())
    codec = await engines.load_codec(checkpoint.path)
    numbers = random.Random(1)
    prompts = [[numbers.randrange(4, 300) for _ in range(n)] for n in (3, 40, 11, 90)]
    sampled = SamplingParameters(temperature=0.9, top_k=50, seed=11)
    said, graphs = [], []
    for _ in range(3):
        lease = await store.acquire(MODEL, placement)
        engine = await engines.open(lease, await engines.skeleton(checkpoint), codec)
        asks = [ask(p, 30) for p in prompts] + [ask(p, 30, sampled) for p in prompts]
        # One at a time: who shares a batch may change a last bit, and with it a token.
        said.append([(await collect(engine.submit(one)))[1] for one in asks])
        assert engine._parts.decode is not None
        graphs.append(engine._parts.decode.graphs)
        await engine.close()
        lease.release()
        store.evict(MODEL, Tier.DEVICE, "operator")
        taken = await store.allocate(
            devices[number].name, 256 * MIB
        )  # other memory where the model was
        taken.close()
    assert said[1] == said[0]
    assert said[2] == said[0]
    assert graphs[0] > 0
    engines.close()
    await store.close()
    for device in devices:
        device.close()
