"""What the kernels of decode steps compute, in plain torch: what they are compared with.

In the dtype of their inputs these round where transformers rounds; in float64 they are the truth.
"""

import torch
from torch.nn import functional

from sllm_node.engine.decode_kernels import Angles, RmsNorm
from sllm_node.engine.paged_attention import KvTables, Scoring


def rms_norm(x: torch.Tensor, norm: RmsNorm) -> torch.Tensor:
    """Return x divided by the root of its mean square, times the norm's weights."""
    wide = torch.promote_types(x.dtype, torch.float32)
    values = x.to(wide)
    values = values * torch.rsqrt(values.pow(2).mean(-1, keepdim=True) + norm.epsilon)
    if norm.offset:
        return (values * (norm.weight.to(wide) + norm.offset)).to(x.dtype)
    return norm.weight * values.to(x.dtype)


def gated(gate: torch.Tensor, up: torch.Tensor, *, gelu: bool = False) -> torch.Tensor:
    """Return act(gate) * up."""
    activated = functional.gelu(gate, approximate="tanh") if gelu else functional.silu(gate)
    return activated * up


def rotated(heads: torch.Tensor, angles: Angles) -> torch.Tensor:
    """Return (tokens, heads, size) with the first elements of each head rotated by halves."""
    rotary = angles.cosines.shape[-1]
    turned, rest = heads[..., :rotary], heads[..., rotary:]
    low, high = turned.chunk(2, -1)
    cosines, sines = angles.cosines[:, None].to(heads.dtype), angles.sines[:, None].to(heads.dtype)
    turned = turned * cosines + torch.cat((-high, low), -1) * sines
    return torch.cat((turned, rest), -1)


def attention(query: torch.Tensor, cache: KvTables, scoring: Scoring) -> torch.Tensor:
    """Return (sessions, heads, size): the attention of one token a session."""
    outputs = [
        _attend(query[i], cache, i, scoring) if length else torch.zeros_like(query[i])
        for i, length in enumerate(cache.lengths.tolist())
    ]
    return torch.stack(outputs)


def _attend(query: torch.Tensor, cache: KvTables, session: int, scoring: Scoring) -> torch.Tensor:
    length = int(cache.lengths[session])
    tokens = torch.arange(length, device=query.device)
    if scoring.window is not None:
        tokens = tokens[-scoring.window :]
    table = cache.tables[session].long()
    slots = table[tokens // cache.block_tokens] * cache.block_tokens + tokens % cache.block_tokens
    repeats = query.shape[0] // cache.keys.shape[1]
    keys = cache.keys[slots].to(query.dtype).repeat_interleave(repeats, 1)
    values = cache.values[slots].to(query.dtype).repeat_interleave(repeats, 1)
    scores = torch.einsum("hd,thd->ht", query, keys) * scoring.scaling
    if scoring.softcap is not None:
        scores = torch.tanh(scores / scoring.softcap) * scoring.softcap
    wide = torch.promote_types(query.dtype, torch.float32)
    weights = scores.softmax(-1, dtype=wide).to(query.dtype)
    return torch.einsum("ht,thd->hd", weights, values)


def joined(
    near: tuple[torch.Tensor, torch.Tensor],
    far: tuple[torch.Tensor, torch.Tensor],
    places: torch.Tensor,
) -> torch.Tensor:
    """Return what looks at parts of a context give together; as `segments.prepared` takes them."""
    first, count, apart = places.long()
    number = torch.arange(int(count.max()), device=places.device)[:, None]
    is_there = number < count
    rows = torch.where(is_there, first + number * apart, 0)  # (segments, tokens)
    logs = far[1][:, rows].masked_fill(~is_there, -torch.inf)
    shares = torch.softmax(torch.cat((near[1][:, None], logs), 1), 1)
    weights = shares.permute(1, 2, 0)[..., None]  # (segments + 1, tokens, heads, 1)
    return near[0] * weights[0] + (far[0][rows] * weights[1:]).sum(0)
