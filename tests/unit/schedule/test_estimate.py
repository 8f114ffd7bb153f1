from dataclasses import replace

import pytest

from sllm_node.core.types import LoadReport, ModelId
from sllm_node.schedule.estimate import PEER, LoadEstimator, MovingAverage, RunningMedian, waited


def report(total, from_nvme, elapsed_s):
    return LoadReport(ModelId("a"), total, from_nvme, total - from_nvme, 0, 0, 0, elapsed_s, 0.0, 0)


def test_the_first_sample_replaces_the_guess_and_later_ones_move_the_mean():
    mean = MovingAverage(100.0)
    mean.observe(10.0)
    assert mean.value == 10.0
    mean.observe(20.0)
    assert mean.value == pytest.approx(13.0)


def test_one_long_sample_among_others_does_not_move_the_median():
    found = RunningMedian(7.0)
    assert found.value == 7.0
    for sample in (1.0, 3.0, 100.0, 2.0, 3.0):
        found.observe(sample)
    assert found.value == 3.0
    for _ in range(3):
        found.observe(9.0)
    assert found.value == 9.0


def test_a_load_lasts_as_long_as_its_slowest_tier():
    estimator = LoadEstimator()
    assert estimator.load_s(10**10, 10**10) == pytest.approx(10.0)
    assert estimator.load_s(10**10, 10**9) == pytest.approx(2.0)


def test_an_observed_load_corrects_the_tier_that_held_it_up():
    estimator = LoadEstimator()
    estimator.observe(report(10**10, 10**10, 5.0))
    assert estimator.load_s(10**10, 10**10) == pytest.approx(5.0)
    assert estimator.load_s(10**10, 0) == pytest.approx(2.0)
    estimator.observe(report(10**10, 0, 1.0))
    assert estimator.load_s(10**10, 0) == pytest.approx(1.0)


def test_raw_and_encoded_checkpoints_do_not_spoil_each_others_estimates():
    estimator = LoadEstimator()
    estimator.observe(report(10**10, 10**10, 5.0))
    encoded = replace(report(10**10, 10**10, 20.0), is_encoded=True)
    for _ in range(3):
        estimator.observe(encoded)
    assert estimator.load_s(10**10, 10**10) == pytest.approx(5.0)
    assert estimator.load_s(10**10, 10**10, is_encoded=True) == pytest.approx(20.0)


def test_a_load_beside_others_tells_only_that_the_tier_is_not_slower():
    estimator = LoadEstimator()
    estimator.observe(report(10**10, 10**10, 4.0), is_alone=False)
    assert estimator.load_s(10**10, 10**10) == pytest.approx(4.0), "more than a guess"
    estimator.observe(report(10**10, 10**10, 8.0), is_alone=False)
    assert estimator.load_s(10**10, 10**10) == pytest.approx(4.0)
    estimator.observe(report(10**10, 10**10, 2.0), is_alone=False)
    assert estimator.load_s(10**10, 10**10) < 4.0


@pytest.mark.parametrize(("total", "elapsed_s"), [(0, 1.0), (10, 0.0)])
def test_a_load_that_tells_nothing_changes_nothing(total, elapsed_s):
    estimator = LoadEstimator()
    estimator.observe(report(total, total, elapsed_s))
    assert estimator.load_s(10**9, 10**9) == pytest.approx(1.0)


def test_what_is_at_a_remote_comes_at_the_remotes_rate():
    estimator = LoadEstimator()
    assert estimator.load_s(10**9, 10**9, 10**9) == pytest.approx(10.0)
    estimator.observe(LoadReport(ModelId("a"), 10**9, 10**9, 0, 0, 0, 0, 2.0, 0.0, 0, 10**9))
    assert estimator.load_s(10**9, 10**9, 10**9) == pytest.approx(2.0)
    assert estimator.load_s(10**9, 10**9) == pytest.approx(1.0)


def test_loads_from_peers_have_a_rate_of_their_own():
    estimator = LoadEstimator()
    estimator.expect_from_peers(2e8)
    assert estimator.load_s(10**9, 10**9, 10**9, is_peer=True) == pytest.approx(5.0)
    far = LoadReport(ModelId("a"), 10**9, 10**9, 0, 0, 0, 0, 4.0, 0.0, 0, 10**9)
    estimator.observe(far, is_peer=True)
    assert estimator.bandwidth(PEER) == pytest.approx(2.5e8)
    assert estimator.load_s(10**9, 10**9, 10**9) == pytest.approx(10.0)


def test_of_equal_guesses_a_load_from_a_peer_teaches_the_peers_rate():
    estimator = LoadEstimator()
    far = LoadReport(ModelId("a"), 10**9, 10**9, 0, 0, 0, 0, 4.0, 0.0, 0, 10**9)
    estimator.observe(far, is_peer=True)
    assert estimator.bandwidth(PEER) == pytest.approx(2.5e8)
    assert estimator.load_s(10**9, 10**9) == pytest.approx(1.0)


def test_what_a_load_takes_beside_its_bytes_is_learned_apart_for_kept_modules():
    estimator = LoadEstimator()
    estimator.observe_whole(report(100, 100, 2.0), 5.0, is_kept=False)
    estimator.observe_whole(report(100, 100, 2.0), 2.25, is_kept=True)
    assert estimator.beside_s(is_kept=False) == 3.0
    assert estimator.beside_s(is_kept=True) == 0.25
    estimator.observe_eviction(0.5)
    assert estimator.evict_s == 0.5


@pytest.mark.parametrize(
    ("load", "queue_s", "load_s"),
    [
        (None, 10, 0),
        ((1, 4), 10, 0),
        ((8, 13), 7, 3),
        ((12, 19), 3, 7),
        ((12, 20), 2, 8),
    ],
)
def test_of_a_wait_the_time_of_the_models_load_counts_as_load(load, queue_s, load_s):
    found = waited(10, 20, load)
    assert (found.queue_s, found.load_s) == (queue_s, load_s)
    assert found.total_s == 10
