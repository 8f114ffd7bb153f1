from scripts.bench.migration_simulated import BUSY, LOADS, busy, rows_of
from sllm_node.sim.trace import Row


def trace():
    """Return two busy stretches with a quiet one between them."""
    return [Row(at_s, 10, 5) for at_s in (*[1.0] * BUSY, 41.0, *[81.0] * BUSY)]


def test_only_busy_stretches_of_the_trace_are_compared():
    assert [len(rows) for rows in busy(trace(), 40.0)] == [BUSY, BUSY]
    assert {row.at_s for row in busy(trace(), 40.0)[1]} == {1.0}


def test_each_seed_has_its_own_stretch_every_request_so_many_times():
    rows = rows_of("stretch-100", trace(), 1)
    assert (len(rows), LOADS["stretch-100"]) == (100 * BUSY, 40.0)
    assert min(row.at_s for row in rows) == 1.0
