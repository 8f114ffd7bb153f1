"""Steps with pieces of prompts on a GPU: what torch's flash kernel gives, and what a model then says."""

from typing import Any

import numpy as np
import pytest
import torch

from sllm_node.core.units import MIB
from sllm_node.device.optional import step_kernels
from sllm_node.engine import step_graphs
from sllm_node.engine.decode_ops import KernelOps, ReferenceOps
from sllm_node.engine.flash import FlashPieces, Piece, cuts_of
from sllm_node.engine.fused import FusedDecoder
from sllm_node.engine.graphs import CudaGraphs
from sllm_node.engine.kv import KvCache, KvMemory, KvPart, bytes_per_token
from sllm_node.engine.mixed import MixedSteps
from sllm_node.engine.paged_attention import Scoring
from sllm_node.engine.scratch import ScratchMemory
from sllm_node.engine.skeleton import LayerShape
from sllm_node.engine.step_graphs import StepGraphs
from tests.gpu.test_fused import BLOCK_TOKENS, small_model
from tests.gpu.test_loads import open_devices
from tests.unit.engine.flash_oracle import ends_of, oracle

pytestmark = pytest.mark.gpu
GPU = torch.device("cuda:0")


@pytest.mark.parametrize("window", [None, 700])
@pytest.mark.parametrize(
    "pieces",
    [
        [Piece(64, 64)],
        [Piece(128, 32768)],
        [Piece(32, 20000)],
        [Piece(3, 3), Piece(200, 5000), Piece(1, 2), Piece(7, 3000)],
    ],
)
def test_flash_pieces_are_right(pieces, window):
    torch.manual_seed(2)
    room, multiprocessors = sum(piece.length for piece in pieces), 0 if window else 132
    slots = np.split(torch.randperm(room).int().numpy(), ends_of(pieces))
    keys, values = torch.randn(2, room, 2, 128, device=GPU, dtype=torch.bfloat16)
    query = torch.randn(sum(p.count for p in pieces), 4, 128, device=GPU, dtype=torch.bfloat16)
    scoring = Scoring(128**-0.5, window)
    found, wanted = torch.empty_like(query), torch.empty_like(query, dtype=torch.float64)
    cuts = cuts_of(pieces, 2, 2, multiprocessors)
    (device,) = open_devices(1, 64 * MIB)
    kernels = step_kernels(device)
    assert kernels is not None
    ops = KernelOps(kernels, 512)
    FlashPieces.of(pieces, cuts, slots, GPU, ops).attend(query, keys, values, scoring, found)
    whole = FlashPieces.of(pieces, cuts_of(pieces, 2, 2, 0), slots, GPU, ReferenceOps(), oracle)
    whole.attend(query.double(), keys.double(), values.double(), scoring, wanted)
    assert bool(any(one.segments for one in cuts.each)) == (window is None and room > 2048)
    torch.testing.assert_close(found.double(), wanted, rtol=2e-2, atol=6e-3)
    kernels.close()
    device.close()


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mistral"])
def test_logits_are_as_near_to_the_truth_as_torchs(family, monkeypatch):
    monkeypatch.setattr(step_graphs, "CAPTURES_A_STEP", 2)  # of the five pieces
    model = small_model(family, torch.bfloat16)
    (device,) = open_devices(1, 600 * MIB)
    kernels = step_kernels(device)
    assert kernels is not None
    graphs = StepGraphs(CudaGraphs(GPU), 100)
    found, *captured = logits_of(model, KernelOps(kernels, 512), device, graphs)
    assert [torch.equal(logits, found) for logits in captured] == [True] * 4
    torchs = logits_of(model, ReferenceOps(), device)[0].double()
    truth = logits_of(model.double(), ReferenceOps(), device)[0]
    error = float((found.double() - truth).norm() / truth.norm())
    assert error <= 1.2 * float((torchs - truth).norm() / truth.norm()) + 1e-3
    kernels.close()
    device.close()


def logits_of(model, ops, device, graphs=None):
    """Return the logits, each of five times, of a step of three sessions that decode and two pieces of prompts."""
    config = model.config
    shapes = [LayerShape(config.num_key_value_heads, 64, 64)] * config.num_hidden_layers
    slots = BLOCK_TOKENS * 64
    buffer = device.allocate(bytes_per_token(shapes, model.dtype) * slots)
    cache = KvCache(shapes, slots, model.dtype, [KvMemory("cuda:0", len(shapes), buffer)])
    generator = torch.Generator("cuda:0").manual_seed(5)
    for tensor in (*cache.keys, *cache.values):
        tensor.normal_(0, 1, generator=generator)
    counts, starts = (1, 1, 1, 40, 23), (17, 3, 90, 0, 60)
    tables = [tuple(range(12 * i, 12 * i + 12)) for i in range(5)]
    places = [KvPart(*one) for one in zip(starts, counts, tables, strict=True)]
    decoder: Any = FusedDecoder.of(model, shapes, ops)
    ids = torch.randint(0, 320, (sum(counts),), generator=generator, device=GPU)
    positions = torch.cat(
        [torch.arange(s, s + n, device=GPU) for s, n in zip(starts, counts, strict=True)]
    )
    with torch.inference_mode():
        memory, rows = ScratchMemory(GPU), torch.arange(sum(counts), device=GPU)
        steps = MixedSteps(decoder, cache, BLOCK_TOKENS, (1, 2, 4, 8), memory, graphs)
        made = [steps.compute(places, ids, positions, rows).clone() for _ in range(5)]
        assert (steps.graphs > 0) == (graphs is not None)
        torch.cuda.synchronize()  # unmapping waits for nobody, and another process may keep the GPU busy
        steps.close()
    cache.close()
    buffer.close()
    return made
