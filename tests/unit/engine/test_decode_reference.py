"""What the kernels are compared with is what transformers' own modules compute."""

from types import SimpleNamespace

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import (
    LlamaMLP,
    LlamaRMSNorm,
    apply_rotary_pos_emb,
    eager_attention_forward,
)

from sllm_node.engine import decode_reference as reference
from sllm_node.engine.decode_kernels import Angles, RmsNorm
from sllm_node.engine.paged_attention import Scoring
from tests.unit.engine import decode_cases as cases

DTYPES = (torch.float32, torch.bfloat16)
RIG = cases.Rig(None, "cpu")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("kind", "offset"), [(LlamaRMSNorm, 0.0), (GemmaRMSNorm, 1.0)])
def test_the_norm_is_transformers(kind, offset, dtype):
    x, weight = RIG.random(5, 64, dtype=dtype), RIG.random(64, seed=1, dtype=dtype)
    module = kind(64, eps=1e-5).to(dtype)
    module.weight.data = weight
    assert torch.equal(reference.rms_norm(x, RmsNorm(weight, 1e-5, offset)), module(x))


@pytest.mark.parametrize("dtype", DTYPES)
def test_rotated_heads_are_transformers(dtype):
    query, key = RIG.random(3, 4, 64, dtype=dtype), RIG.random(3, 2, 64, seed=1, dtype=dtype)
    phase = torch.rand(3, 32, generator=torch.Generator().manual_seed(2)).repeat(1, 2)
    angles = Angles(phase.cos().to(dtype), phase.sin().to(dtype))
    batch = [t.transpose(0, 1)[None] for t in (query, key)]
    wanted = apply_rotary_pos_emb(*batch, angles.cosines[None], angles.sines[None])
    for heads, rotated in zip((query, key), wanted, strict=True):
        assert torch.equal(reference.rotated(heads, angles), rotated[0].transpose(0, 1))


def test_only_the_first_elements_of_a_head_are_rotated():
    heads = RIG.random(2, 3, 64)
    angles = Angles(torch.zeros(2, 16), torch.zeros(2, 16))
    rotated = reference.rotated(heads, angles)
    assert not rotated[..., :16].any()
    assert torch.equal(rotated[..., 16:], heads[..., 16:])


@pytest.mark.parametrize(("dtype", "error"), [(torch.float32, 1e-6), (torch.bfloat16, 8e-3)])
def test_attention_is_transformers(dtype, error):
    case = cases.AttentionCase((37,), 8, 2, 64, dtype=dtype)
    cache = cases.laid_out(RIG, case)
    query = RIG.random(1, 8, 64, seed=4, dtype=dtype)
    tokens = torch.arange(37)
    slots = cache.tables[0].long()[tokens // 16] * 16 + tokens % 16
    keys, values = (c[slots].transpose(0, 1)[None] for c in (cache.keys, cache.values))
    module = SimpleNamespace(num_key_value_groups=4, training=False)
    wanted, _ = eager_attention_forward(module, query[:, :, None], keys, values, None, 0.125)
    assert cases.error(reference.attention(query, cache, Scoring(0.125)), wanted[0]) <= error


def test_the_gated_unit_is_transformers():
    config = LlamaConfig(hidden_size=16, intermediate_size=24, num_attention_heads=2)
    mlp, x = LlamaMLP(config), torch.randn(3, 16, generator=torch.Generator().manual_seed(1))
    wide = reference.gated(mlp.gate_proj(x), mlp.up_proj(x))
    assert torch.equal(mlp.down_proj(wide), mlp(x))
