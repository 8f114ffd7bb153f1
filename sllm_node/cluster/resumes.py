"""How long sessions take here from their grant to the next token, by model: what was seen, for the fits.

A session that resumes computes what it knows, prompt and output so far, as one that begins computes its
prompt: both are samples of a * tokens + b. Not counted is what tells nothing of it: a session computed
while its model still loaded, one that repeats its output token by token, one that held for its tokens.
"""

from collections.abc import Callable

from sllm_node.cluster.estimate import ResumeEstimator, resume_s
from sllm_node.cluster.state import ResumeFit
from sllm_node.core.types import ModelId
from sllm_node.schedule.stream import Stream


class Resumes:
    """The fits of one node."""

    def __init__(self, tell: Callable[[ModelId, float, float], None] = lambda *_: None) -> None:
        """`tell`: takes what the fit of a model had expected, before it learns what came."""
        self._tell = tell
        self._models: dict[ModelId, ResumeEstimator] = {}

    def observe(self, stream: Stream) -> None:
        """Take a session that has ended."""
        request = stream.request
        may_be_replayed = bool(request.resumed) and request.resume != "fast"
        if stream.granted is None or stream.first_token is None:
            return
        if stream.is_early or request.held or may_be_replayed:
            return
        tokens = len(request.prompt) + len(request.resumed) - stream.cached_tokens
        known = self._models.setdefault(request.model, ResumeEstimator())
        elapsed_s = stream.first_token - stream.granted
        if known.errors.count and tokens > 0:
            self._tell(request.model, resume_s(known.fit, tokens), elapsed_s)
        known.observe(tokens, elapsed_s)

    def fit(self, model: ModelId) -> ResumeFit | None:
        """Return the line of `model`, in steps so coarse that it changes seldom; None: nothing seen."""
        known = self._models.get(model)
        if known is None or not known.errors.count:
            return None
        return ResumeFit(_coarse(known.fit.a_s_per_token), _coarse(known.fit.b_s))


def _coarse(value: float) -> float:
    return float(f"{value:.2g}")
