"""Which tokens a piece of a prompt looks at."""

from typing import Any

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from sllm_node.engine import kv


def mask_of(start, length, window=None, *, is_named=False) -> Any:
    prompt = kv._Prompt(slice(0, length - start), start, torch.arange(length))
    return kv._prompt_mask(prompt, window, is_named=is_named)


@pytest.mark.parametrize(("start", "length"), [(1, 2), (5, 12), (11, 12)])
def test_the_named_mask_of_a_later_piece_is_the_mask_itself(start, length):
    named = mask_of(start, length, is_named=True)
    assert torch.equal(named._materialize(), mask_of(start, length))


@pytest.mark.filterwarnings("ignore")  # torch tells on a CPU why there is no flash attention
def test_attention_by_the_named_mask_is_attention_by_the_mask():
    made = torch.Generator().manual_seed(1)
    query, key, value = (
        torch.randn(1, n, m, 8, generator=made) for n, m in ((4, 7), (2, 12), (2, 12))
    )
    found, wanted = (
        scaled_dot_product_attention(
            query, key, value, enable_gqa=True, is_causal=False, scale=0.3,
            attn_mask=mask_of(5, 12, is_named=named),
        )
        for named in (True, False)
    )  # fmt: skip
    assert torch.allclose(found, wanted, atol=1e-6)


def test_a_window_that_cuts_is_never_only_named():
    mask = mask_of(5, 12, 4, is_named=True)
    assert mask.sum(1).tolist() == [4] * 7


def test_the_first_piece_of_a_prompt_needs_no_mask():
    assert mask_of(0, 12, is_named=True) is None
    assert mask_of(0, 12, 12, is_named=True) is None
