"""When a round is to be the last: by how fast the destination resumes and the source decodes.

After each round the destination is short of the tokens that came meanwhile: the gap. Handing over now
lets the reader wait until they are computed; another round costs a round's time, in which the source
adds tokens, and leaves *that* gap. So a round is worth while as long as the wait is longer than the step
between two tokens, which nobody notices, and as long as the last one made the gap much smaller. With a fast
prefill that takes three or four rounds. Where a token takes as long to resume as to decode (replay) none is
worth while. All rates are measured: the destination's line (`cluster.estimate`) is scaled by what the
rounds of this very migration took. Its fixed part tells little about a round of a few tokens, so whether a
round shrinks the gap is seen, not foretold: on two H200s handing over 215 tokens by the line, where another
round would have left 7, made readers wait for 60 ms.
"""

from typing import Final

from sllm_node.cluster.estimate import RESUME_GUESS, resume_s
from sllm_node.cluster.state import ResumeFit
from sllm_node.schedule.estimate import MovingAverage

STEP_GUESS_S: Final = 0.02
"""Between two tokens, before any was seen."""
_WORTH: Final = 0.8
"""A round must leave less than this part of the gap that it began with."""


class Pace:
    """The rates of one session on its way."""

    __slots__ = ("_fit", "_scale", "_step", "_tried")

    def __init__(self) -> None:
        self._fit = RESUME_GUESS
        self._scale = MovingAverage(1.0)
        self._step = MovingAverage(STEP_GUESS_S)
        self._tried = 0
        """Tokens of the last round; 0: there was none."""

    def aim(self, fit: ResumeFit | None, *, is_replayed: bool) -> None:
        """Begin a migration to a node that resumes so fast; replayed tokens take a step each."""
        self._fit = fit or RESUME_GUESS
        self._scale = MovingAverage(1.0)
        self._tried = 0
        if is_replayed:
            self._fit = ResumeFit(max(self._fit.a_s_per_token, self.step_s), self._fit.b_s)

    @property
    def step_s(self) -> float:
        """Return the time between two tokens of the source."""
        return self._step.value

    def came(self, tokens: int, elapsed_s: float) -> None:
        """Learn of tokens that the source took so long for."""
        if tokens > 0 and elapsed_s > 0:
            self._step.observe(elapsed_s / tokens)

    def resumed(self, tokens: int, elapsed_s: float) -> None:
        """Learn of a round that the destination took so long for."""
        self._tried = tokens
        if tokens > 0 and elapsed_s > 0:
            self._scale.observe(elapsed_s / resume_s(self._fit, tokens))

    def wait_s(self, gap: float) -> float:
        """Return how long the destination needs for so many tokens."""
        return self._scale.value * resume_s(self._fit, gap)

    def is_last(self, gap: int) -> bool:
        """Tell whether to hand over now, with so many tokens that the destination lacks."""
        wait_s = self.wait_s(gap)
        if gap == 0 or wait_s <= self.step_s:
            return True
        if self._scale.value * self._fit.a_s_per_token >= _WORTH * self.step_s:
            return True  # it never comes near
        return bool(self._tried) and gap >= _WORTH * self._tried
