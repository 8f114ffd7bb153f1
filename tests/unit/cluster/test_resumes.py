from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from sllm_node.cluster.resumes import Resumes
from sllm_node.core.types import GenerationRequest, ModelId, SamplingParameters, SessionId

REQUEST = GenerationRequest(SessionId("s-0"), ModelId("m"), (1,) * 100, SamplingParameters(), 8)


def ended(request=REQUEST, seconds=0.3, **changes) -> Any:
    return SimpleNamespace(
        **{
            "request": request, "granted": 5.0, "first_token": 5.0 + seconds, "is_early": False,
            "cached_tokens": 0, **changes,
        }
    )  # fmt: skip


def test_a_line_through_what_sessions_took_is_told():
    resumes = Resumes()
    for tokens in (100, 200, 400):
        request = replace(REQUEST, prompt=(1,) * tokens)
        resumes.observe(ended(request, 0.1 + tokens * 0.002))
    fit = resumes.fit(ModelId("m"))
    assert fit is not None
    assert (fit.a_s_per_token, fit.b_s) == pytest.approx((0.002, 0.1))


def test_what_the_line_had_said_is_told_before_it_learns():
    told = []
    resumes = Resumes(lambda *what: told.append(what))
    for seconds in (0.3, 0.3, 0.5):
        resumes.observe(ended(seconds=seconds))
    assert [expected_s for _, expected_s, _ in told] == pytest.approx([0.3, 0.3])
    assert [actual_s for _, _, actual_s in told] == pytest.approx([0.3, 0.5])


def test_cached_tokens_are_not_counted():
    counted, cached = Resumes(), Resumes()
    counted.observe(ended(replace(REQUEST, prompt=(1,) * 40)))
    cached.observe(ended(cached_tokens=60))
    assert counted.fit(ModelId("m")) == cached.fit(ModelId("m"))


@pytest.mark.parametrize(
    "stream",
    [
        ended(granted=None),
        ended(first_token=None),
        ended(is_early=True),
        ended(replace(REQUEST, held=True)),
        ended(replace(REQUEST, resumed=(1,), resume="replay")),
        ended(replace(REQUEST, resumed=(1,))),
    ],
)
def test_what_tells_nothing_of_a_resumption_is_not_counted(stream):
    resumes = Resumes()
    resumes.observe(stream)
    assert resumes.fit(ModelId("m")) is None


def test_a_resumption_that_computes_all_at_once_is_counted():
    resumes = Resumes()
    resumes.observe(ended(replace(REQUEST, resumed=(1,), resume="fast")))
    assert resumes.fit(ModelId("m")) is not None
