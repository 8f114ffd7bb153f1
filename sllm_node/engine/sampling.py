"""What decides a token besides its logits, and what was drawn. `draw` does it."""

import math
from dataclasses import dataclass

from sllm_node.core.errors import InvalidRequestError
from sllm_node.core.types import SamplingParameters
from sllm_node.engine.adjustments import Adjustments


@dataclass(frozen=True, slots=True)
class SamplingRow:
    """What decides one row's token besides its logits."""

    parameters: SamplingParameters
    index: int
    """Of the token to draw: 0 for the first of the output."""
    logprobs: int | None = None
    adjustments: Adjustments | None = None
    """What penalties and biases change; None: nothing."""


@dataclass(frozen=True, slots=True)
class Drawn:
    """One row's result; `token` is -1 when its logits were not numbers."""

    token: int
    logprob: float = 0.0
    top: tuple[tuple[int, float], ...] = ()


def check_parameters(parameters: SamplingParameters, vocabulary: int | None) -> None:
    """Refuse what would fail the step of everybody; `vocabulary` None: its size is not known yet.

    Raises:
        InvalidRequestError: naming the parameter.
    """
    p = parameters
    wrong = {
        "temperature": not 0 <= p.temperature < math.inf,
        "top_p": not 0 <= p.top_p <= 1,
        "min_p": not 0 <= p.min_p <= 1,
        "top_k": not 0 <= p.top_k < 1 << 31,
        "repetition_penalty": not 0 < p.repetition_penalty < math.inf,
        "presence_penalty": not math.isfinite(p.presence_penalty),
        "frequency_penalty": not math.isfinite(p.frequency_penalty),
        "seed": not 0 <= p.seed < 1 << 64,
    }
    for name, is_wrong in wrong.items():
        if is_wrong:
            raise InvalidRequestError(f"{name} = {getattr(p, name)} is out of range", param=name)
    for token, bias in p.logit_bias:
        if token < 0 or (vocabulary is not None and token >= vocabulary):
            raise InvalidRequestError(f"{token} is no token id of this model", param="logit_bias")
        if not math.isfinite(bias):
            raise InvalidRequestError(f"a bias of {bias} is out of range", param="logit_bias")
