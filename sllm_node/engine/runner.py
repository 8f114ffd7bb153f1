"""One step: packs sessions into a forward pass, draws their tokens. Runs on the step thread.

Values go in and come out; the only state is the module and its KV cache.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from sllm_node.core.types import TokenIds
from sllm_node.engine.attention import attention_step
from sllm_node.engine.decode_batch import DecodeBatch, DecodeRow, bucket_of
from sllm_node.engine.draw import sample
from sllm_node.engine.kv import KvCache, KvPart, PagedStep
from sllm_node.engine.sampling import Drawn, SamplingRow


@dataclass(frozen=True, slots=True)
class StepPart:
    """One session's share of a step."""

    tokens: TokenIds
    place: KvPart
    draw: SamplingRow | None
    """How to draw the next token; None: more of the prompt follows."""


class Runner:
    """A module with weights and KV memory."""

    def __init__(
        self, model: Any, cache: KvCache, block_tokens: int, decode: DecodeBatch | None = None
    ) -> None:
        """`decode`: for steps in which every session has one token; None: the module does them."""
        self._model = model
        self._cache = cache
        self._block_tokens = block_tokens
        self._decode = decode

    def step(self, parts: Sequence[StepPart]) -> list[Drawn | None]:
        """Compute all `parts` at once; return what each has drawn."""
        rows = _decode_rows(parts)
        if self._decode is not None and rows is not None and bucket_of(len(rows)) is not None:
            return list(self._decode.step(rows))
        return self._forward(parts)

    def _forward(self, parts: Sequence[StepPart]) -> list[Drawn | None]:
        """Compute all `parts` by the module's forward pass."""
        device = self._cache.keys[0].device
        ids = [token for part in parts for token in part.tokens]
        begins = [part.place.passed + part.place.start for part in parts]
        positions = [
            begin + i
            for begin, part in zip(begins, parts, strict=True)
            for i in range(part.place.count)
        ]
        ends, end = [], -1
        for part in parts:
            end += part.place.count
            if part.draw is not None:
                ends.append(end)
        with torch.inference_mode():
            step = PagedStep(self._cache, [part.place for part in parts], self._block_tokens)
            with attention_step(step):
                output = self._model(
                    input_ids=torch.tensor([ids], device=device),
                    position_ids=torch.tensor([positions], device=device),
                    use_cache=False,
                    # An index keeps only the rows that draw; a step without any keeps one, unused.
                    # Split over devices, what follows the last layer is where that layer is.
                    logits_to_keep=torch.tensor(ends or [end], device=self._cache.keys[-1].device),
                )
            rows = [part.draw for part in parts if part.draw is not None]
            drawn = iter(sample(output.logits[0], rows) if rows else ())
        return [None if part.draw is None else next(drawn) for part in parts]


def _decode_rows(parts: Sequence[StepPart]) -> list[DecodeRow] | None:
    """Return the rows of a step in which every session draws after one token; None: it is none."""
    rows = []
    for part in parts:
        if part.draw is None or part.place.count != 1:
            return None
        rows.append(DecodeRow(part.tokens[0], part.place, part.draw))
    return rows
