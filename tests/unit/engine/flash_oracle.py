"""What flash attention is compared with: one sequence after another in plain torch."""

import math

import numpy as np
import torch


def oracle(query, key, value, lengths, scoring):
    """Attend to one sequence after another; the last query sees the last key."""
    outputs, logs = [], []
    for i in range(len(lengths.queries) - 1):
        q = query[lengths.queries[i] : lengths.queries[i + 1]]
        k, v = (
            x[lengths.keys[i] : lengths.keys[i + 1]].repeat_interleave(
                query.shape[1] // x.shape[1], 1
            )
            for x in (key, value)
        )
        assert len(q) <= lengths.longest_query
        assert len(k) <= lengths.longest_key
        scores = torch.einsum("qhd,khd->hqk", q, k) * scoring.scaling
        if lengths.is_causal:
            last = torch.arange(len(q), device=q.device)[:, None] + len(k) - len(q)
            ahead = torch.arange(len(k), device=q.device) > last
            if scoring.window is not None:
                ahead |= torch.arange(len(k), device=q.device) <= last - scoring.window
            scores = scores.masked_fill(ahead, -math.inf)
        logs.append(torch.logsumexp(scores, -1))
        outputs.append(torch.einsum("hqk,khd->qhd", torch.softmax(scores, -1), v))
    return torch.cat(outputs), torch.cat(logs, 1)


def ends_of(pieces):
    return np.cumsum([piece.length for piece in pieces])[:-1]
