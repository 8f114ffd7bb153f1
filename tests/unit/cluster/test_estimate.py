import math
from dataclasses import replace

import pytest

from sllm_node.cluster.estimate import (
    RESUME_GUESS,
    ErrorTrack,
    ForwardEstimator,
    ResumeEstimator,
    Source,
    StartupParts,
    errors_by_part,
    load_path,
    resume_s,
    send_rate,
)  # fmt: skip
from sllm_node.cluster.state import Bandwidths, HeldModel, ResumeFit
from sllm_node.core.types import ModelId, NodeId

RATES = Bandwidths(clone=100, decode=80, dram=50, nvme=10, peer=5, remote=1)


def held(dram=0, nvme=0, stored=100, decoded=100):
    return HeldModel(ModelId("a"), decoded, stored, dram, nvme)


@pytest.mark.parametrize(
    ("model", "peer_rate", "seconds", "source"),
    [
        (held(dram=100, nvme=100), 0, 2, Source.DRAM),
        (held(dram=50, nvme=100), 0, 5, Source.NVME),
        (held(nvme=100), 0, 10, Source.NVME),
        (held(), 3, 100 / 3, Source.PEER),
        (held(), 50, 20, Source.PEER),
        (held(), 0, 100, Source.REMOTE),
        (held(nvme=90), 50, 9, Source.PEER),
    ],
)
def test_a_load_lasts_as_long_as_the_slowest_tier_of_its_path(model, peer_rate, seconds, source):
    path = load_path(model, RATES, peer_rate=peer_rate, has_replica=False)
    assert path.load_s == pytest.approx(seconds)
    assert path.source is source


def test_links_carry_stored_bytes_and_the_device_puts_out_decoded_ones():
    encoded = held(dram=70, stored=70, decoded=100)
    assert load_path(encoded, RATES, peer_rate=0, has_replica=False).load_s == 70 / 50
    slow = Bandwidths(clone=100, decode=20, dram=50, nvme=10)
    assert load_path(encoded, slow, peer_rate=0, has_replica=False).load_s == 5


def test_a_clone_is_taken_when_it_is_quicker():
    path = load_path(held(dram=100), RATES, peer_rate=0, has_replica=True)
    assert (path.load_s, path.source) == (1, Source.CLONE)
    slow = Bandwidths(clone=10, decode=80, dram=50, nvme=10)
    assert load_path(held(dram=100), slow, peer_rate=0, has_replica=True).source is Source.DRAM


def test_a_model_whose_module_is_kept_takes_less_beside_its_bytes():
    rates = replace(RATES, beside_s=3.0, kept_s=0.5)
    new, kept = held(dram=100), replace(held(dram=100), is_kept=True)
    assert load_path(new, rates, peer_rate=0, has_replica=False).load_s == 2 + 3
    assert load_path(kept, rates, peer_rate=0, has_replica=False).load_s == 2 + 0.5


def test_without_any_path_a_load_never_ends():
    rates = Bandwidths(clone=100, decode=80, dram=50, nvme=10)
    assert load_path(held(nvme=99), rates, peer_rate=9, has_replica=False).load_s == math.inf


def test_only_a_node_with_the_whole_model_can_send_it():
    assert send_rate(held(dram=100), RATES) == 50
    assert send_rate(held(dram=20, nvme=100), RATES) == 10
    assert send_rate(held(dram=20, nvme=99), RATES) == 0


def test_the_line_through_observations_is_found():
    estimator = ResumeEstimator()
    assert estimator.fit == RESUME_GUESS
    for tokens in (100, 2000, 700, 4000, 50):
        estimator.observe(tokens, 0.001 * tokens + 0.2)
    assert estimator.fit.a_s_per_token == pytest.approx(0.001)
    assert estimator.fit.b_s == pytest.approx(0.2)
    assert resume_s(estimator.fit, 1000) == pytest.approx(1.2)
    assert resume_s(estimator.fit, 3000, sessions=2) == pytest.approx(3.4)


def test_the_line_follows_a_change():
    estimator = ResumeEstimator()
    for seconds in (0.001, 0.003):
        for i in range(400):
            estimator.observe(100 + 37 * (i % 11), seconds * (100 + 37 * (i % 11)))
    assert estimator.fit.a_s_per_token == pytest.approx(0.003, rel=0.01)


def test_one_length_alone_scales_the_guess():
    estimator = ResumeEstimator()
    for _ in range(3):
        estimator.observe(1000, 0.5)
    assert resume_s(estimator.fit, 1000) == pytest.approx(0.5)
    assert estimator.fit.b_s == pytest.approx(0.1)


def test_neither_slope_nor_intercept_falls_below_zero():
    falling = ResumeEstimator()
    falling.observe(100, 1.0)
    falling.observe(1000, 0.5)
    assert falling.fit.a_s_per_token == 0
    assert falling.fit.b_s == pytest.approx(0.75, rel=0.02)
    steep = ResumeEstimator()
    steep.observe(1000, 0.1)
    steep.observe(2000, 1.0)
    assert steep.fit.b_s == 0
    assert steep.fit.a_s_per_token > 0


@pytest.mark.parametrize(("tokens", "seconds"), [(0, 1.0), (10, 0.0), (10, math.inf)])
def test_nonsense_is_passed_over(tokens, seconds):
    estimator = ResumeEstimator()
    estimator.observe(tokens, seconds)
    assert estimator.fit == RESUME_GUESS
    assert estimator.errors.count == 0


def test_errors_are_kept_with_their_sign_and_their_worst():
    track = ErrorTrack()
    track.observe(1.0, 1.5)
    assert (track.mean_s, track.bias_s, track.worst_s, track.count) == (0.5, 0.5, 0.5, 1)
    track.observe(2.0, 1.0)
    assert track.bias_s < track.mean_s
    assert track.worst_s == 1.0


def test_nothing_observed_means_the_guess():
    assert resume_s(None, 1000) == resume_s(RESUME_GUESS, 1000)
    assert resume_s(ResumeFit(0.0, 1.0), 1000) == 1.0


def test_what_forwarding_adds_is_learned_for_each_peer():
    forwarding = ForwardEstimator(0.002)
    assert forwarding.seconds(NodeId("b"), 0) == 0.002
    for _ in range(20):
        forwarding.observe(NodeId("b"), 0, 0.010)
    assert forwarding.seconds(NodeId("b"), 0) == pytest.approx(0.010)
    assert forwarding.seconds(NodeId("c"), 0) == 0.002


def test_a_forward_between_busy_nodes_is_expected_to_take_what_such_ones_took():
    forwarding = ForwardEstimator(0.002)
    forwarding.observe(NodeId("b"), 0, 0.001)
    assert forwarding.seconds(NodeId("b"), 2) == 0.001, "nothing more alike was seen"
    forwarding.observe(NodeId("b"), 2, 0.010)
    assert [forwarding.seconds(NodeId("b"), busy) for busy in (0, 1, 2)] == [0.001, 0.001, 0.010]


def test_one_forward_that_a_stall_made_long_moves_nothing():
    forwarding = ForwardEstimator(0.002)
    for elapsed_s in (0.003, 0.003, 0.5):
        forwarding.observe(NodeId("b"), 1, elapsed_s)
    assert forwarding.seconds(NodeId("b"), 1) == 0.003


def test_of_an_older_estimate_first_the_queue_has_passed_then_the_load():
    parts = StartupParts(1.0, 2.0, 0.5)
    assert parts.later(0.25) == StartupParts(0.75, 2.0, 0.5)
    assert parts.later(2.0) == StartupParts(0.0, 1.0, 0.5)
    assert parts.later(9.0) == StartupParts(0.0, 0.0, 0.5)


def test_an_error_is_told_for_each_part():
    found = errors_by_part(StartupParts(1.0, 2.0, 0.5), StartupParts(1.5, 1.0, 0.5))
    assert found == {"queue": 0.5, "load": -1.0, "forward": 0.0}


def test_a_load_from_a_peer_begins_with_index_and_texts():
    rates = replace(RATES, peer_s=0.5)
    path = load_path(held(), rates, peer_rate=50, has_replica=False)
    assert path.load_s == pytest.approx(20.5)
    assert path.source is Source.PEER
    near = load_path(held(nvme=100), rates, peer_rate=50, has_replica=False)
    assert near.load_s == pytest.approx(10)
