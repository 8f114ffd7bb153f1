"""Graphs of a device's replicas: kept, let go, and done without where they can't be captured."""

import weakref

import pytest

from sllm_node.core.errors import KernelError
from sllm_node.engine.step_graphs import CAPTURES_A_STEP, StepGraphs

OWNER, OTHER = object(), object()


class Backend:
    """Captures anything until it has made `most` graphs."""

    def __init__(self, most=1000):
        self.left = most
        self.tries = 0
        self.made = weakref.WeakSet()

    def capture(self, compute):
        self.tries += 1
        if not self.left:
            raise KernelError("test", "no more")
        self.left -= 1

        def replay():
            return ("replayed", compute())

        self.made.add(replay)
        return replay


def piece(number):
    return lambda: number


def say(graphs, kind, pieces, owner=OWNER):
    return [step() for step in graphs.of(owner, kind, pieces)]


def test_all_pieces_of_a_step_are_captured_together():
    graphs, pieces = StepGraphs(Backend(), 10), [piece(1), piece(2)]
    assert say(graphs, "k", pieces) == [1, 2]
    assert say(graphs, "k", pieces) == [("replayed", 1), ("replayed", 2)]
    assert graphs.count(OWNER) == 2


def test_a_step_of_many_pieces_is_captured_some_at_a_time():
    backend = Backend()
    graphs, pieces = StepGraphs(backend, 100), [piece(n) for n in range(2 * CAPTURES_A_STEP + 1)]
    plain, replayed = list(range(len(pieces))), [("replayed", n) for n in range(len(pieces))]
    assert say(graphs, "k", pieces) == plain
    for step in (1, 2, 3, 4):
        done = min(step * CAPTURES_A_STEP, len(pieces))
        assert say(graphs, "k", pieces) == replayed[:done] + plain[done:]
        assert backend.tries == done
    assert graphs.count(OWNER) == len(pieces)


def test_a_step_that_gives_way_half_captured_is_captured_anew_from_its_beginning():
    backend = Backend()
    pieces = [piece(n) for n in range(CAPTURES_A_STEP + 1)]
    graphs = StepGraphs(backend, len(pieces))
    for _ in range(2):
        say(graphs, "one", pieces)
    for _ in range(3):
        say(graphs, "two", [piece(2)], OTHER)
    assert graphs.count(OWNER) == 0
    assert len(backend.made) == 1
    assert say(graphs, "one", pieces) == list(range(len(pieces)))


def test_a_step_whose_capture_fails_in_a_later_part_is_computed_plainly():
    backend = Backend(most=CAPTURES_A_STEP)
    graphs, pieces = StepGraphs(backend, 100), [piece(n) for n in range(CAPTURES_A_STEP + 1)]
    for _ in range(2):
        say(graphs, "k", pieces)
    assert [say(graphs, "k", pieces) for _ in range(2)] == [list(range(len(pieces)))] * 2
    assert graphs.count(OWNER) == 0
    assert not backend.made


def test_a_step_whose_capture_fails_half_way_is_computed_plainly_and_tells_once(caplog):
    told, backend = [], Backend(most=1)
    graphs = StepGraphs(backend, 10, "cuda:1", lambda: told.append(1))
    pieces = [piece(1), piece(2)]
    assert [say(graphs, "k", pieces) for _ in range(5)] == [[1, 2]] * 5
    assert backend.tries == 2
    assert len(told) == len(caplog.records) == 1
    assert caplog.records[0].device == "cuda:1"
    assert not backend.made
    assert graphs.count(OWNER) == 0


@pytest.mark.parametrize("way", ["evicted", "dropped"])
def test_graphs_that_are_let_go_are_destroyed(way):
    backend = Backend()
    graphs = StepGraphs(backend, 1)
    for _ in range(2):
        say(graphs, "one", [piece(1)])
    assert len(backend.made) == 1
    if way == "dropped":
        graphs.drop(OWNER)
        assert not backend.made
    for _ in range(2):
        say(graphs, "two", [piece(2)], OTHER)
    assert len(backend.made) == 1
    assert graphs.count(OTHER) == 1
    assert say(graphs, "one", [piece(1)]) == [1]
