"""What a model's masks tell of how far back its layers look."""

import pytest
import torch
from transformers import AttentionMaskInterface
from transformers.masking_utils import (
    and_masks,
    bidirectional_mask_function,
    causal_mask_function,
    chunked_causal_mask_function,
    sliding_window_bidirectional_mask_function,
    sliding_window_causal_mask_function,
    sliding_window_overlay,
)

from sllm_node.engine.attention import MASKED, UnknownAttentionOptionError

MASK = AttentionMaskInterface()[MASKED]


@pytest.mark.parametrize("window", [1, 2, 8, 131072])
def test_a_causal_mask_tells_its_window(window):
    sees = sliding_window_causal_mask_function(window)
    assert MASK(mask_function=sees, local_size=window).window == window
    assert MASK(mask_function=causal_mask_function, q_length=4).window is None


@pytest.mark.parametrize(
    ("sees", "window"),
    [
        (chunked_causal_mask_function(8, torch.zeros(1, dtype=torch.long)), 8),
        (and_masks(causal_mask_function, sliding_window_overlay(8)), None),
        (sliding_window_causal_mask_function(8), 9),
        (bidirectional_mask_function, None),
        (sliding_window_bidirectional_mask_function(8), 8),
    ],
    ids=["chunked", "unnamed window", "other window", "both ways", "window both ways"],
)
def test_a_mask_that_lets_tokens_see_otherwise_is_refused(sees, window):
    with pytest.raises(UnknownAttentionOptionError, match="more than causal"):
        MASK(mask_function=sees, local_size=window)
