"""What penalties and biases change about the logits of a session, kept up as its output grows.

A session's output only grows, so each token is looked at once: a step costs a copy of what is
known, as long as there are different tokens, and nothing is counted again.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from sllm_node.core.types import SamplingParameters, TokenIds

Tokens = npt.NDArray[np.int64]
Numbers = npt.NDArray[np.float32]

_ENTRY: Final = np.dtype(
    [("token", np.int64), ("count", np.int32), ("bias", np.float32), ("is_seen", np.bool_)]
)


@dataclass(frozen=True, slots=True)
class Adjustments:
    """Changes of one row's logits, no token twice.

    A logit is divided by its factor, or multiplied if it is not above 0; then `minus` is
    subtracted and `bias` added.
    """

    tokens: Tokens
    factors: Numbers
    minus: Numbers
    biases: Numbers

    def within(self, vocabulary: int) -> "Adjustments":
        """Return those of tokens that there are; a logit beyond would be another row's."""
        if not len(self.tokens) or self.tokens.max() < vocabulary:
            return self
        inside = self.tokens < vocabulary
        return Adjustments(
            self.tokens[inside], self.factors[inside], self.minus[inside], self.biases[inside]
        )


def is_adjusted(parameters: SamplingParameters) -> bool:
    """Tell whether anything changes about the logits."""
    return bool(parameters.logit_bias) or has_penalties(parameters)


def has_penalties(parameters: SamplingParameters) -> bool:
    """Tell whether past tokens matter."""
    return (
        parameters.repetition_penalty != 1.0
        or parameters.presence_penalty != 0.0
        or parameters.frequency_penalty != 0.0
    )


class Adjuster:
    """The tokens of one session that its parameters change something about."""

    def __init__(self, parameters: SamplingParameters, prompt: TokenIds) -> None:
        self._parameters = parameters
        self._places: dict[int, int] = {}
        self._entries = np.zeros(16, _ENTRY)
        self._counted = 0
        """Tokens of the output that are in the entries."""
        biases: dict[int, float] = {}
        for token, bias in parameters.logit_bias:
            biases[token] = biases.get(token, 0.0) + bias
        places = self._placed(np.array(list(biases), np.int64))
        self._entries["bias"][places] = list(biases.values())
        if parameters.repetition_penalty != 1.0:
            places = self._placed(np.unique(np.array(prompt, np.int64)))
            self._entries["is_seen"][places] = True

    def after(self, output: Sequence[int]) -> Adjustments:
        """Return the changes after `output`, which must begin with what it was before."""
        if has_penalties(self._parameters) and len(output) > self._counted:
            fresh = np.array(output[self._counted :], np.int64)
            tokens, counts = np.unique(fresh, return_counts=True)
            places = self._placed(tokens)
            self._entries["is_seen"][places] = True
            self._entries["count"][places] += counts.astype(np.int32)
            self._counted = len(output)
        return self._adjustments()

    def _placed(self, tokens: Tokens) -> Tokens:
        """Return where the entries of `tokens` are, no token twice, making those that lack."""
        known = self._places
        places = [known.setdefault(token, len(known)) for token in tokens.tolist()]
        if len(known) > len(self._entries):
            more = max(len(self._entries), len(known) - len(self._entries))
            self._entries = np.concatenate([self._entries, np.zeros(more, _ENTRY)])
        self._entries["token"][places] = tokens
        return np.array(places, np.int64)

    def _adjustments(self) -> Adjustments:
        p = self._parameters
        known = self._entries[: len(self._places)]
        times = known["count"].astype(np.float32)
        minus = np.float32(p.presence_penalty) + np.float32(p.frequency_penalty) * times
        factor, one = np.float32(p.repetition_penalty), np.float32(1)
        return Adjustments(
            known["token"].copy(),
            np.where(known["is_seen"], factor, one),
            np.where(times > 0, minus, np.float32(0)),
            known["bias"].copy(),
        )


def adjustments(
    parameters: SamplingParameters, prompt: TokenIds, output: Sequence[int]
) -> Adjustments | None:
    """Return what changes for a session with these tokens; None: nothing."""
    return Adjuster(parameters, prompt).after(output) if is_adjusted(parameters) else None
