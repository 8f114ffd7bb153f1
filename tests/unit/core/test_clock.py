import pytest

from sllm_node.core.clock import ManualClock, MonotonicClock


def test_a_manual_clock_moves_only_when_told():
    clock = ManualClock(5.0)
    assert clock.now() == clock.wall() == 5.0
    clock.advance(1.5)
    assert clock.now() == 6.5
    with pytest.raises(AssertionError):
        clock.advance(-1)


def test_the_monotonic_clock_never_goes_back():
    clock = MonotonicClock()
    assert clock.now() <= clock.now()
    assert clock.wall() > 1_700_000_000
