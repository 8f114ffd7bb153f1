"""How good startup estimates are where no noise of a machine can excuse them: on virtual time."""

from tests.sim.estimates_world import BYTES_S, estimates, is_good

SEEDS = 8


def test_nearly_all_estimates_are_within_a_fifth_once_a_few_loads_were_seen(tmp_path):
    lines = [
        line
        for seed in range(SEEDS)
        for line in estimates(tmp_path / str(seed), seed, gap_s=1.5, count=150)
    ]
    off = [(r.model, r.expected_s, r.startup_s) for r in lines if not is_good(r)]
    assert sum(r.startup_s > BYTES_S for r in lines) > 20 * SEEDS, "many of them load"
    assert len(off) <= 0.02 * len(lines), off
