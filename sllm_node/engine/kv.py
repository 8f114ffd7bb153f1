"""The paged KV cache and attention over it, with torch's scaled_dot_product_attention.

Each layer has two tensors, (slots, kv heads, size), in device memory beside its weights; a slot is one
token's place, `block * block_tokens + offset`. A step first writes its tokens' keys and values to
their slots, then reads: a prompt's piece attends alone over its own slots; sessions that decode are
gathered by their block tables in groups of similar length, one call a group, so that many short
sessions cost no more calls than one, and padding stays below half.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
import torch
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import scaled_dot_product_attention

from sllm_node.device.base import DeviceRange
from sllm_node.engine.attention import AttentionCall
from sllm_node.engine.skeleton import LayerShape
from sllm_node.engine.upload import Numbers, upload
from sllm_node.engine.weights import torch_name

_ALIGNMENT: Final = 256
_PADDING_MAX: Final = 2
"""A group's longest session is at most this many times its shortest."""
_FLASH_SIZE_MAX: Final = 256
"""Of a head, for flash attention."""
_GROUP_START: Final = 64
"""Sessions up to this many tokens share a group however short they are."""


def bytes_per_token(shapes: Sequence[LayerShape], dtype: torch.dtype) -> int:
    """Return the KV memory of one token."""
    return sum(s.kv_heads * (s.key_size + s.value_size) for s in shapes) * dtype.itemsize


def token_bytes_from_config(config: Any) -> int:
    """Return the KV memory of one token as the config tells it, without building the module."""
    heads = config.num_attention_heads
    dtype = config.dtype or torch.float32
    rotated = getattr(config, "qk_rope_head_dim", None)
    if rotated:  # multi-head latent attention, which hands us keys and values of every head
        both = config.qk_nope_head_dim + rotated + config.v_head_dim
        return int(config.num_hidden_layers * heads * both * dtype.itemsize)
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    return int(config.num_hidden_layers * kv_heads * 2 * size * dtype.itemsize)


@dataclass(frozen=True, slots=True)
class KvMemory:
    """Device memory for the KV cache of a run of layers."""

    device: str
    layers: int
    buffer: DeviceRange


class KvCache:
    """Keys and values of all layers, as views of one buffer a device."""

    def __init__(
        self,
        shapes: Sequence[LayerShape],
        slots: int,
        dtype: torch.dtype,
        memory: Sequence[KvMemory],
    ) -> None:
        self.keys: list[torch.Tensor] = []
        self.values: list[torch.Tensor] = []
        first = 0
        for one in memory:
            self._take(shapes[first : first + one.layers], slots, dtype, one)
            first += one.layers
        assert first == len(shapes)

    def _take(
        self, shapes: Sequence[LayerShape], slots: int, dtype: torch.dtype, memory: KvMemory
    ) -> None:
        flat = torch.as_tensor(memory.buffer.array, device=torch_name(memory.device))
        offset = 0
        for shape in shapes:
            for kept, size in ((self.keys, shape.key_size), (self.values, shape.value_size)):
                count = slots * shape.kv_heads * size * dtype.itemsize
                view = flat[offset : offset + count].view(dtype)
                kept.append(view.view(slots, shape.kv_heads, size))
                offset += count

    def close(self) -> None:
        """Drop all views."""
        self.keys.clear()
        self.values.clear()


@dataclass(frozen=True, slots=True)
class KvPart:
    """One session's tokens in a step."""

    start: int
    """Among the tokens that `table` holds."""
    count: int
    table: tuple[int, ...]
    passed: int = 0
    """Tokens before those, which the windows of all layers have passed."""


@dataclass(frozen=True, slots=True)
class _Prompt:
    """A piece of a prompt: its rows among the packed tokens, and the slots it may look at."""

    rows: slice
    start: int
    slots: torch.Tensor
    masks: dict[tuple[int | None, bool], torch.Tensor | None] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class _Decoders:
    """Sessions that compute one token each."""

    rows: torch.Tensor
    lengths: torch.Tensor
    slots: torch.Tensor  # (sessions, longest)
    masks: dict[int | None, torch.Tensor] = field(default_factory=dict)


class PagedStep:
    """The attention of one step; answers the layers' calls."""

    def __init__(self, cache: KvCache, parts: Sequence[KvPart], block_tokens: int) -> None:
        self._cache = cache
        self._parts = parts
        self._block_tokens = block_tokens
        self._places: dict[torch.device, _Places] = {}

    def attend(self, call: AttentionCall) -> torch.Tensor:
        """Keep the step's keys and values, and look at them; return (tokens, heads, value head)."""
        keys, values = self._cache.keys[call.layer], self._cache.values[call.layer]
        written = self._places_on(keys.device).written
        keys.index_copy_(0, written, call.key)
        values.index_copy_(0, written, call.value)
        return self.look(call)

    def look(self, call: AttentionCall) -> torch.Tensor:
        """Return (tokens, heads, value head), once the cache has the step's keys and values."""
        keys, values = self._cache.keys[call.layer], self._cache.values[call.layer]
        places = self._places_on(keys.device)
        tokens, heads, _ = call.query.shape
        out = call.query.new_empty(tokens, heads, call.value.shape[-1])
        for prompt in places.prompts:
            query = call.query[prompt.rows].transpose(0, 1)[None]
            key = keys[prompt.slots].transpose(0, 1)[None]
            value = values[prompt.slots].transpose(0, 1)[None]
            mask = _prompt_mask(prompt, call.window, is_named=_is_for_flash(call))
            out[prompt.rows] = _attend(call, query, key, value, mask)[0].transpose(0, 1)
        for group in places.groups:
            query = call.query[group.rows][:, :, None]
            key = keys[group.slots].transpose(1, 2)
            value = values[group.slots].transpose(1, 2)
            mask = _decode_mask(group, call.window)
            out[group.rows] = _attend(call, query, key, value, mask)[:, :, 0]
        return out

    def _places_on(self, device: torch.device) -> "_Places":
        if device not in self._places:
            self._places[device] = _Places(self._parts, self._block_tokens, device)
        return self._places[device]


class _Places:
    """Where the tokens of a step lie in the cache, on one device."""

    def __init__(self, parts: Sequence[KvPart], block_tokens: int, device: torch.device) -> None:
        written: list[torch.Tensor] = []
        self.prompts: list[_Prompt] = []
        decoders: list[tuple[int, torch.Tensor]] = []
        row = 0
        for part in parts:
            slots = slots_of(part, block_tokens)
            written.append(slots[part.start :])
            if part.count == 1:
                decoders.append((row, slots))
            else:
                rows = slice(row, row + part.count)
                self.prompts.append(_Prompt(rows, part.start, upload(slots, device)))
            row += part.count
        self.written = upload(torch.cat(written), device)
        self.groups = [_group(members, device) for members in _similar(decoders)]


def slots_of(part: KvPart, block_tokens: int) -> torch.Tensor:
    """Return the slots of a session's tokens up to the end of its part."""
    return torch.from_numpy(slot_numbers(part, block_tokens)).long()


def slot_numbers(part: KvPart, block_tokens: int, first: int = 0) -> Numbers:
    """Return the slots of a session's tokens from `first` up to the end of its part."""
    length, passed = part.start + part.count, first // block_tokens
    blocks = np.array(part.table[passed : -(-length // block_tokens)], np.int32)
    slots = blocks[:, None] * block_tokens + np.arange(block_tokens)
    return slots.astype(np.int32).ravel()[
        first - passed * block_tokens : length - passed * block_tokens
    ]


def _similar(
    decoders: list[tuple[int, torch.Tensor]],
) -> Iterator[list[tuple[int, torch.Tensor]]]:
    """Yield groups of sessions whose lengths are alike."""
    group: list[tuple[int, torch.Tensor]] = []
    limit = 0
    for member in sorted(decoders, key=lambda member: len(member[1])):
        length = len(member[1])
        if group and length > limit:
            yield group
            group = []
        if not group:
            limit = max(_GROUP_START, _PADDING_MAX * length)
        group.append(member)
    if group:
        yield group


def _group(members: list[tuple[int, torch.Tensor]], device: torch.device) -> _Decoders:
    rows = upload([row for row, _ in members], device)
    lengths = upload([len(slots) for _, slots in members], device)
    slots = torch.nn.utils.rnn.pad_sequence(
        [slots for _, slots in members], batch_first=True, padding_value=-1
    )
    # A session is padded with a slot of its own: what is masked still counts as 0 times its value,
    # and another session's value may be infinite or no number.
    slots = torch.where(slots < 0, slots[:, :1], slots)
    return _Decoders(rows, lengths, upload(slots, device))


def _is_for_flash(call: AttentionCall) -> bool:
    """Whether a GPU's flash attention takes it, which knows causal masks by name and no others."""
    query, value = call.query, call.value
    is_half = query.dtype in {torch.bfloat16, torch.float16}
    fits = query.shape[-1] == value.shape[-1] <= _FLASH_SIZE_MAX
    return query.device.type == "cuda" and is_half and fits and call.softcap is None


def _prompt_mask(
    prompt: _Prompt, window: int | None, *, is_named: bool = False
) -> torch.Tensor | None:
    """Return (queries, keys), True where a query may look; None: plainly causal.

    `is_named`: of a piece that looks at all before it, only the name, for flash attention.
    """
    known = (window, is_named)
    if known not in prompt.masks:
        mask: torch.Tensor | None = None
        length = len(prompt.slots)
        is_cut = window is not None and window < length
        if is_named and prompt.start and not is_cut:
            mask = causal_lower_right(length - prompt.start, length)
        elif prompt.start or is_cut:
            key = torch.arange(length, device=prompt.slots.device)
            query = torch.arange(prompt.start, length, device=key.device)[:, None]
            mask = key <= query
            if window is not None:
                mask &= key > query - window
        prompt.masks[known] = mask
    return prompt.masks[known]


def _decode_mask(group: _Decoders, window: int | None) -> torch.Tensor:
    """Return (sessions, 1, 1, keys), True where a session's token may look."""
    if window not in group.masks:
        key = torch.arange(group.slots.shape[1], device=group.slots.device)
        lengths = group.lengths[:, None]
        mask = key < lengths
        if window is not None:
            mask &= key >= lengths - window
        group.masks[window] = mask[:, None, None]
    return group.masks[window]


def _attend(
    call: AttentionCall,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
) -> torch.Tensor:
    """Attend with (batch, heads, tokens, size) tensors; no mask means causal."""
    if call.softcap is not None:
        return _soft_capped(call, query, key, value, mask)
    options: dict[str, Any] = {"attn_mask": mask, "is_causal": mask is None, "scale": call.scaling}
    grouped = query.shape[1] != key.shape[1]
    return scaled_dot_product_attention(query, key, value, enable_gqa=grouped, **options)


def _soft_capped(
    call: AttentionCall,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
) -> torch.Tensor:
    """Attend with scores squashed to (-cap, cap) by tanh, as Gemma 2 does."""
    assert call.softcap is not None
    repeats = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
    scores = query @ key.transpose(-1, -2) * call.scaling
    scores = call.softcap * torch.tanh(scores / call.softcap)
    if mask is None:
        size = query.shape[-2]
        mask = torch.ones(size, size, dtype=torch.bool, device=query.device).tril()
    scores = scores.masked_fill(~mask, float("-inf"))
    weights = scores.softmax(dim=-1, dtype=torch.float32).to(query.dtype)
    return weights @ value
