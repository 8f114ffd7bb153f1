"""Where transformers' models call our attention: one function, registered once under one name.

A model knows nothing of sessions and KV blocks: it hands over the queries, keys and values of all
packed tokens, and the step under way, found through a context variable, does the rest. Options that
a model passes and we would ignore are errors, because ignoring one silently changes its answers.

How far back a layer looks, a model says twice: by an option, and by the mask that its class builds.
The two need not agree, and the mask is what counts in transformers. So models build their masks once,
in a dry run under the name `MASKED`; each attention module then has the window that its mask told.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Final, Protocol

import torch
from transformers import AttentionInterface, AttentionMaskInterface

ATTENTION: Final = "sllm_paged"
MASKED: Final = "sllm_paged_masked"
"""The same, with masks: each attention module learns its window from the one that it is given."""
_WINDOW: Final = "sllm_window"
"""The attribute of an attention module with its window, as its mask told it."""

_IGNORED: Final = frozenset({
    "position_ids", "cache_position", "use_cache", "output_router_logits", "output_attentions",
    "output_hidden_states", "return_dict",
})  # fmt: skip
"""Options without a meaning for attention itself."""
_NEUTRAL: Final[dict[str, tuple[object, ...]]] = {"dropout": (0, None), "is_causal": (True, None)}
"""Values that change nothing; of any other option that we don't know, None and False."""


@dataclass(frozen=True, slots=True)
class AttentionCall:
    """What one attention layer asks for."""

    layer: int
    query: torch.Tensor  # (tokens, heads, head)
    key: torch.Tensor  # (tokens, kv heads, head)
    value: torch.Tensor  # (tokens, kv heads, value head)
    scaling: float
    window: int | None
    """A token sees itself and the `window - 1` tokens before it; None: all before it."""
    softcap: float | None


class AttentionStep(Protocol):
    """Computes the attention of one step, layer by layer."""

    def attend(self, call: AttentionCall) -> torch.Tensor:
        """Return (tokens, heads, value head)."""


class UnknownAttentionOptionError(Exception):
    """A model passed an option that our attention does not know."""


_step: ContextVar[AttentionStep] = ContextVar("attention_step")


@contextmanager
def attention_step(step: AttentionStep) -> Iterator[None]:
    """Let `step` answer the attention calls of models that run in this thread meanwhile."""
    token = _step.set(step)
    try:
        yield
    finally:
        _step.reset(token)


def attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *args: Any,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """Answer a transformers attention layer; (1, heads, tokens, head) each, transposed out."""
    mask = args[0] if args else options.pop("attention_mask", None)
    if mask is not None:
        raise UnknownAttentionOptionError("attention_mask")
    scaling = options.pop("scaling", None)
    window, softcap = options.pop("sliding_window", None), options.pop("softcap", None)
    window = getattr(module, _WINDOW, window)
    _refuse_unknown(options)
    call = AttentionCall(
        layer=module.layer_idx,
        query=query[0].transpose(0, 1),
        key=key[0].transpose(0, 1),
        value=value[0].transpose(0, 1),
        scaling=query.shape[-1] ** -0.5 if scaling is None else float(scaling),
        window=window,
        softcap=softcap,
    )
    return _step.get().attend(call)[None], None


def _masked_attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: object,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """Answer like `attention`, and let `module` have the window of its mask from now on."""
    if not isinstance(attention_mask, _Mask):
        raise UnknownAttentionOptionError("attention_mask")
    window = attention_mask.window
    if window is not None and window < 1:
        raise UnknownAttentionOptionError(f"sliding_window = {window}")
    setattr(module, _WINDOW, window)
    return attention(module, query, key, value, **options)


@dataclass(frozen=True, slots=True)
class _Mask:
    """Stands for a causal mask with a window, if any, in the place of a tensor."""

    window: int | None


def _mask(
    mask_function: Callable[..., torch.Tensor], local_size: int | None = None, **_: object
) -> _Mask:
    """Answer transformers where a model has a mask built."""
    if not _is_causal(mask_function, local_size):
        raise UnknownAttentionOptionError("a mask that is more than causal with a window")
    return _Mask(local_size)


def _is_causal(sees: Callable[..., torch.Tensor], window: int | None) -> bool:
    """Whether `sees`, of (batch, head, query, key), is a causal mask with `window`, at samples."""
    edges = {n * (window or 1) + d for n in (1, 2, 3) for d in (-1, 0, 1)}
    numbers = sorted(edges | {0} | {1 << n for n in range(24)})
    query, key = torch.cartesian_prod(*[torch.tensor(numbers, device="cpu")] * 2).unbind(1)
    expected = key <= query
    if window is not None:
        expected &= key > query - window
    return torch.equal(sees(0, 0, query, key), expected)


def _refuse_unknown(options: dict[str, Any]) -> None:
    for name, value in options.items():
        if name in _IGNORED:
            continue
        if isinstance(value, torch.Tensor) or value not in _NEUTRAL.get(name, (None, False)):
            raise UnknownAttentionOptionError(f"{name} = {value!r}")


# No entry of it in AttentionMaskInterface: models then build no mask at all, which is what we want
# (and saves the look for packed sequences, which waits for the device).
AttentionInterface.register(ATTENTION, attention)
AttentionInterface.register(MASKED, _masked_attention)
AttentionMaskInterface.register(MASKED, _mask)
