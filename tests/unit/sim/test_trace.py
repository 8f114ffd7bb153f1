import numpy as np
import pytest

from sllm_node.core.errors import ConfigError
from sllm_node.sim.trace import Row, arrivals, cut, gamma_rows, parse_gamma, read_rows, scaled

HEADER = "TIMESTAMP,ContextTokens,GeneratedTokens"


def test_times_of_a_trace_count_from_its_first_request():
    lines = [HEADER, "2023-11-16 18:17:03.9799600,4808,10", "2023-11-16 18:17:04.4799600,3180,8"]
    assert read_rows(lines, "t") == [Row(0.0, 4808, 10), Row(0.5, 3180, 8)]


@pytest.mark.parametrize("lines", [[HEADER], [HEADER, "yesterday,1,1"], ["a,b", "1,2"]])
def test_what_is_no_trace_is_refused(lines):
    with pytest.raises(ConfigError):
        read_rows(lines, "t")


@pytest.mark.parametrize(
    "text",
    [
        "gamma:", "gamma:cv=8", "gamma:rate=x", "gamma:rate=0", "gamma:colour=1", "gamma:rate=nan",
        "gamma:rate=inf", "gamma:rate=1,cv=nan", "gamma:rate=1,duration=inf", "gamma:rate=1,in=nan",
        "gamma:rate=1,out=inf", "gamma:rate=1e9", "gamma:rate=1,cv=1e-200", "gamma:rate=1,cv=1e200",
    ],
)  # fmt: skip
def test_what_is_no_gamma_process_is_refused(text):
    with pytest.raises(ConfigError):
        parse_gamma(text)


def test_a_gamma_process_has_its_rate_and_its_bursts():
    rows = gamma_rows(parse_gamma("gamma:rate=50,cv=4,duration=2000"), 1)
    gaps = np.diff([row.at_s for row in rows])
    assert len(rows) / 2000 == pytest.approx(50, rel=0.1)
    assert gaps.std() / gaps.mean() == pytest.approx(4, rel=0.1)


def test_scaling_up_keeps_bursts_and_counts():
    rows = [Row(float(second), 10, 10) for second in (0, 100)]
    made = scaled(rows, 30, 1)
    assert len(made) == 60
    assert {int(row.at_s) for row in made} <= {0, 1, 100, 101}


def test_a_fraction_of_a_trace_is_drawn_from_it():
    rows = [Row(float(i), 10, 10) for i in range(1000)]
    assert len(scaled(rows, 0.3, 1)) == pytest.approx(300, rel=0.2)
    assert cut(rows, 10, 5) == [Row(float(i), 10, 10) for i in range(5)]


def test_popular_models_get_their_share_and_tokens_fit_the_context():
    rows = [Row(0.0, 5000, 5000)] * 3000
    made = arrivals(rows, [3.0, 1.0], [100, 8192], 1)
    assert sum(a.model == 0 for a in made) == pytest.approx(2250, rel=0.1)
    assert all(a.tokens_in + a.tokens_out <= (100, 8192)[a.model] for a in made)
