"""Sampling row by row, with host copies: what `draw` is compared with."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from sllm_node.core.types import SamplingParameters, TokenIds
from sllm_node.engine.adjustments import has_penalties
from sllm_node.engine.philox import uniforms
from sllm_node.engine.sampling import Drawn


@dataclass(frozen=True, slots=True)
class ReferenceRow:
    """What decides one row's token besides its logits."""

    parameters: SamplingParameters
    index: int
    """Of the token to draw: 0 for the first of the output."""
    logprobs: int | None = None
    prompt: TokenIds = ()
    """Needed for the repetition penalty only."""
    output: TokenIds = ()
    """Needed for penalties only."""


def sample(logits: torch.Tensor, rows: Sequence[ReferenceRow]) -> list[Drawn]:
    """Draw a token for each row of `logits`, (rows, vocabulary)."""
    logits = logits.float()
    is_sound = torch.isfinite(logits.max(dim=-1).values).tolist()
    adjusted = _adjusted(logits, rows)
    tokens = adjusted.argmax(dim=-1).tolist()
    plain: list[int] = []
    filtered: list[int] = []
    for i, row in enumerate(rows):
        p = row.parameters
        if is_sound[i] and p.temperature > 0:
            wanted = filtered if p.top_k or p.top_p < 1 or p.min_p > 0 else plain
            wanted.append(i)
    for chosen, is_filtered in ((plain, False), (filtered, True)):
        if chosen:
            drawn = _draw(adjusted[chosen], [rows[i] for i in chosen], is_filtered=is_filtered)
            for i, token in zip(chosen, drawn, strict=True):
                tokens[i] = token
    return [
        _with_logprobs(logits[i], rows[i], tokens[i]) if is_sound[i] else Drawn(-1)
        for i in range(len(rows))
    ]


def _adjusted(logits: torch.Tensor, rows: Sequence[ReferenceRow]) -> torch.Tensor:
    touched = [
        i for i, r in enumerate(rows) if has_penalties(r.parameters) or r.parameters.logit_bias
    ]
    if not touched:
        return logits
    adjusted = logits.clone()
    for i in touched:
        _penalise(adjusted[i], rows[i])
        for token, bias in rows[i].parameters.logit_bias:
            adjusted[i, token] += bias
    return adjusted


def _penalise(row: torch.Tensor, rules: ReferenceRow) -> None:
    p = rules.parameters
    if p.repetition_penalty != 1.0:
        seen = torch.tensor(sorted({*rules.prompt, *rules.output}), device=row.device)
        if len(seen):
            scores = row[seen]
            factor = p.repetition_penalty
            row[seen] = torch.where(scores > 0, scores / factor, scores * factor)
    if rules.output and (p.presence_penalty or p.frequency_penalty):
        counts = Counter(rules.output)
        used = torch.tensor(list(counts), device=row.device)
        times = torch.tensor(list(counts.values()), dtype=row.dtype, device=row.device)
        row[used] -= p.presence_penalty + p.frequency_penalty * times


def _draw(logits: torch.Tensor, rows: Sequence[ReferenceRow], *, is_filtered: bool) -> list[int]:
    """Draw from softmax(logits / temperature), after the filters if there are any."""
    temperature = _column(logits, [max(row.parameters.temperature, 1e-5) for row in rows])
    scaled = (logits - logits.max(dim=-1, keepdim=True).values) / temperature
    order = None
    if is_filtered:
        scaled, order = scaled.sort(dim=-1, descending=True, stable=True)
        probabilities = _filtered(scaled.double().softmax(dim=-1), rows)
    else:
        probabilities = scaled.double().softmax(dim=-1)
    cumulative = probabilities.cumsum(dim=-1)
    drawn = uniforms([row.parameters.seed for row in rows], [row.index for row in rows])
    target = torch.from_numpy(drawn).to(logits.device)[:, None] * cumulative[:, -1:]
    found = torch.searchsorted(cumulative, target, right=True)
    last = (probabilities > 0).cumsum(dim=-1).argmax(dim=-1, keepdim=True)
    found = torch.minimum(found, last)
    if order is not None:
        found = order.gather(-1, found)
    return [int(token) for token in found[:, 0].tolist()]


def _filtered(probabilities: torch.Tensor, rows: Sequence[ReferenceRow]) -> torch.Tensor:
    """Set what the filters exclude to 0; columns are sorted, most likely first."""
    size = probabilities.shape[-1]
    rank = torch.arange(size, device=probabilities.device)
    top_k = _column(probabilities, [min(row.parameters.top_k or size, size) for row in rows])
    kept = probabilities.masked_fill(rank >= top_k, 0.0)
    kept = kept / kept.sum(dim=-1, keepdim=True)
    before = kept.cumsum(dim=-1) - kept
    top_p = _column(kept, [row.parameters.top_p for row in rows])
    min_p = _column(kept, [row.parameters.min_p for row in rows])
    # A top_p of 1 keeps all, whatever rounding makes of the sum.
    is_out = ((before >= top_p) & (top_p < 1)) | (kept < min_p * kept[:, :1])
    return kept.masked_fill(is_out, 0.0)


def _column(like: torch.Tensor, values: Sequence[float]) -> torch.Tensor:
    return torch.tensor(np.array(values)[:, None], dtype=like.dtype, device=like.device)


def _with_logprobs(row: torch.Tensor, rules: ReferenceRow, token: int) -> Drawn:
    if rules.logprobs is None:
        return Drawn(token)
    logprobs = row.log_softmax(dim=-1)
    top = logprobs.topk(min(rules.logprobs, len(logprobs)))
    pairs = zip(top.indices.tolist(), top.values.tolist(), strict=True)
    return Drawn(token, float(logprobs[token]), tuple((int(t), float(v)) for t, v in pairs))
