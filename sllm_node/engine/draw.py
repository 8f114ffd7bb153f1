"""From logits to tokens on the device: one mixed batch, each row by its own rules and nobody else's.

Order: repetition, presence and frequency penalties, logit bias, temperature, top-k, top-p, min-p.
Then the inverse of the cumulative distribution at one uniform number from (seed, token index). Rows
are computed independently, so a row's token does not depend on who shares the batch.

Nothing here looks at a number on the host: every shape follows from the `Variant`, so a GPU is
never waited for and a CUDA graph can hold all of it.
"""

from collections.abc import Sequence

import torch

from sllm_node.engine.philox import MULTIPLIERS, ROUNDS, WEYL
from sllm_node.engine.sampling import Drawn, SamplingRow
from sllm_node.engine.sampling_plan import SamplingPlan, Variant

_MASK = 0xFFFFFFFF
_Fields = dict[str, torch.Tensor]


def sample(logits: torch.Tensor, rows: Sequence[SamplingRow]) -> list[Drawn]:
    """Draw a token for each row of `logits`, (rows, vocabulary), and wait for them."""
    plan = SamplingPlan(rows, logits.shape[-1])
    buffer = torch.from_numpy(plan.buffer()).to(logits.device)
    return plan.read(draw(logits, buffer, plan.variant).cpu().numpy())


def draw(logits: torch.Tensor, buffer: torch.Tensor, variant: Variant) -> torch.Tensor:
    """Return what a plan, whose `buffer` is on the device, draws from (rows, vocabulary).

    One array of int64: a token for each row, -1 where the logits are not numbers (which is no input
    for a next step: clamp it); then, of the rows that are told, the token's log probability as the
    bits of a float32, the ids of the most likely tokens and their log probabilities.
    """
    assert logits.shape[0] == variant.rows, f"{logits.shape[0]} rows, {variant.rows} planned"
    fields = {
        field.name: buffer[field.start : field.end].view(getattr(torch, field.dtype))
        for field in variant.fields()
        if field.start < field.end
    }
    best = logits.max(dim=-1)
    tokens, adjusted = best.indices, logits
    if variant.adjusted:
        adjusted = _adjusted(logits, fields)
        tokens = adjusted.argmax(dim=-1)
    if variant.plain or variant.filtered:
        tokens = tokens.index_copy(0, fields["row"], _drawn(adjusted, fields, variant.plain))
    tokens = tokens.masked_fill(~torch.isfinite(best.values), -1)
    if not variant.told:
        return tokens
    return torch.cat([tokens, *_told(logits, tokens, fields["told"], variant.top)])


def _adjusted(logits: torch.Tensor, fields: _Fields) -> torch.Tensor:
    adjusted = logits.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
    flat, position, factor = adjusted.view(-1), fields["position"], fields["factor"]
    scores = flat.index_select(0, position)
    scores = torch.where(scores > 0, scores / factor, scores * factor)
    flat.index_copy_(0, position, scores - fields["minus"] + fields["bias"])
    return adjusted


def _drawn(logits: torch.Tensor, fields: _Fields, plain: int) -> torch.Tensor:
    """Draw from softmax(logits / temperature) for each row in `fields`, `plain` ones first."""
    uniform = uniforms(fields["seed"], fields["index"])[:, None]
    temperature = fields["temperature"][:, None]
    drawn = []
    for group, is_filtered in ((slice(plain), False), (slice(plain, None), True)):
        rows = fields["row"][group]
        if len(rows):
            chosen = logits.index_select(0, rows).float()
            scaled = chosen.sub_(chosen.amax(dim=-1, keepdim=True)).div_(temperature[group])
            way = _filtered if is_filtered else _plain
            drawn.append(way(scaled, uniform[group], fields))
    return torch.cat(drawn)


def _plain(scaled: torch.Tensor, uniform: torch.Tensor, _fields: _Fields) -> torch.Tensor:
    cumulative = scaled.double().softmax(dim=-1).cumsum_(dim=-1)
    total = cumulative[:, -1:]
    # Below the total, however it is rounded: a token without probability is never found.
    target = torch.minimum(uniform * total, total.nextafter(torch.zeros_like(total)))
    found = torch.searchsorted(cumulative, target, right=True)[:, 0]
    return found.masked_fill(found == scaled.shape[-1], 0)  # no numbers: a bias was too large


def _filtered(scaled: torch.Tensor, uniform: torch.Tensor, fields: _Fields) -> torch.Tensor:
    """Draw after setting what the filters exclude to 0."""
    scaled, order = scaled.sort(dim=-1, descending=True, stable=True)
    rank = torch.arange(scaled.shape[-1], device=scaled.device)
    kept = scaled.double().softmax(dim=-1).masked_fill_(rank >= fields["top_k"][:, None], 0.0)
    kept /= kept.sum(dim=-1, keepdim=True)
    top_p, min_p = fields["top_p"][:, None], fields["min_p"][:, None]
    # A top_p of 1 keeps all, whatever rounding makes of the sum.
    is_out = (kept.cumsum(dim=-1).sub_(kept) >= top_p) & (top_p < 1)
    is_out |= kept < min_p * kept[:, :1]
    kept.masked_fill_(is_out, 0.0)
    last = (kept > 0).sum(dim=-1, keepdim=True) - 1  # what is kept stands at the front
    cumulative = kept.cumsum_(dim=-1)
    found = torch.searchsorted(cumulative, uniform * cumulative[:, -1:], right=True)
    return order.gather(-1, torch.minimum(found, last).clamp_(min=0))[:, 0]


def uniforms(seed: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Return what `philox.uniforms` returns, bit by bit, for the bits of uint64 held in int64."""
    # Even and odd words of the counter, (2, rows) each. Products wrap; shifts drag the sign along.
    even = torch.stack([index & _MASK, torch.zeros_like(index)])
    odd = torch.stack([(index >> 32) & _MASK, torch.zeros_like(index)])
    which = torch.arange(2, device=seed.device)[:, None]
    multiplier = which * (MULTIPLIERS[1] - MULTIPLIERS[0]) + MULTIPLIERS[0]
    weyl = which * (WEYL[1] - WEYL[0]) + WEYL[0]
    key = torch.stack([seed & _MASK, (seed >> 32) & _MASK])
    rounds = torch.arange(ROUNDS, device=seed.device)[:, None, None]
    for keys in ((key + rounds * weyl) & _MASK).unbind():
        product = (even * multiplier).flip(0)
        even, odd = ((product >> 32) & _MASK) ^ odd ^ keys, product & _MASK
    bits = (even[0] << 21) | (odd[0] >> 11)
    return bits.double() * 2.0**-53


def _told(
    logits: torch.Tensor, tokens: torch.Tensor, rows: torch.Tensor, top: int
) -> list[torch.Tensor]:
    """Return log probabilities of the model's own distribution."""
    logprobs = logits.index_select(0, rows).float().log_softmax(dim=-1)
    drawn = tokens.index_select(0, rows).clamp(min=0)
    told = [_bits(logprobs.gather(-1, drawn[:, None]))]
    if top:
        best = _ranks(logprobs).topk(top, dim=-1).indices
        told += [best, _bits(logprobs.gather(-1, best))]
    return [part.flatten() for part in told]


def _ranks(values: torch.Tensor) -> torch.Tensor:
    """Return numbers in the order of `values`, of equal ones the first the largest."""
    bits = values.view(torch.int32)
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    count = values.shape[-1]
    return (ordered.long() << 32) + torch.arange(count, 0, -1, device=values.device)


def _bits(values: torch.Tensor) -> torch.Tensor:
    return values.view(torch.int32).long()
