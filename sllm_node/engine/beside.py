"""How much of prompts a step may have beside sessions that decode, by what steps took lately. Pure.

Readers of the sessions that decode wait for a step with a piece of a prompt longer than for one
without. How much longer each token of the piece makes it depends on model and device and grows with
what lies before the piece: at the end of 32,768 tokens a piece of 128 takes an 8B model on an H200
three times as long as at the beginning. So the length follows what was measured: after a step with n
tokens of prompts that took e longer than one without, where b longer is allowed, n * b / e would have
been right, were all of e in proportion to n. Part of it is not, so the length comes near the right one over
a few steps, from either side. A share of each finding counts, and a single late
step no more than halves the length.

A piece has a quarter of the usual length at least: where what lies before costs more than a step, shorter
pieces would make the prompt wait and help nobody.

Source: as in TCP's control of its window, a limit that is found by what happens; chunked prefill beside
decode steps is Sarathi's (Agrawal et al., OSDI 2024), with a budget that is fixed there.
"""

from typing import Final

from sllm_node.core.units import align_up

STEP_TOKENS: Final = 64
"""A step is filled up to so many tokens, or a multiple, where graphs are captured: they cost the same."""
LEAST_SHARE: Final = 4
"""A piece has this part of the usual length at least."""
_WEIGHT: Final = 0.5
"""Of the newest step in what is known."""
_FACTOR: Final = 4.0
"""By how much a finding may be above what was tried."""
_MARGIN: Final = 1.15
"""A finding that would allow more allows less by this, or lengths near the limit would swing around it."""
_NOTHING_S: Final = 1e-4
"""A shorter step was over before it was looked for: nothing can be learnt."""


class Beside:
    """The length of pieces of prompts, for one model."""

    def __init__(self, usual_tokens: int, ratio: float) -> None:
        """A step takes `ratio` times as long as one without prompts at most; 0: any number."""
        self._usual = usual_tokens
        self._least = max(1, usual_tokens // LEAST_SHARE)
        self._ratio = ratio
        self._step_s = 0.0
        """What a step without prompts takes; 0: not known yet."""
        self._tokens = float("inf")

    def learn(self, prompt_tokens: int, took_s: float) -> None:
        """Take note of a step in which sessions decoded, with so many tokens of prompts."""
        if took_s < _NOTHING_S or not self._ratio:
            return
        if not prompt_tokens or took_s <= self._step_s:
            self._step_s = self._step_learned(took_s)
        if not prompt_tokens or not self._step_s:
            return
        allowed_s, more_s = (self._ratio - 1) * self._step_s, took_s - self._step_s
        right = prompt_tokens * (allowed_s / more_s if more_s > 0 else _FACTOR)
        if right > prompt_tokens:
            right = max(prompt_tokens, right / _MARGIN)
        right = min(max(right, prompt_tokens / 2), prompt_tokens * _FACTOR)
        known = min(self._tokens, _FACTOR * prompt_tokens)
        self._tokens = known + _WEIGHT * (right - known)

    def _step_learned(self, took_s: float) -> float:
        if not self._step_s:
            return took_s
        return self._step_s + _WEIGHT * (min(took_s, _FACTOR * self._step_s) - self._step_s)

    def tokens(self, decoding: int, usual: int) -> int:
        """Return the most of prompts beside so many sessions, where it is `usual` without a limit.

        Never less than a quarter of the usual length for few sessions.
        """
        room = usual
        if usual >= STEP_TOKENS:
            room = align_up(decoding + usual, STEP_TOKENS) - decoding
        if self._tokens >= room:
            return room
        filled = (decoding + int(self._tokens)) // STEP_TOKENS * STEP_TOKENS - decoding
        return max(self._least, filled if filled > 0 else int(self._tokens))
