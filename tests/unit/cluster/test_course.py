"""What is told of a session's nodes, and of how long it waits."""

from sllm_node.cluster.choice import Choice
from sllm_node.cluster.course import Course
from sllm_node.core.types import NodeId, Startup, Stay

A, B = NodeId("a"), NodeId("b")


def at(node, way="load"):
    return Choice(node, way, f"{node} is best")


def test_a_session_waits_from_its_arrival_to_its_first_grant_and_again_after_its_node_is_lost():
    course = Course(Startup("a", "load"), 10.0)
    assert course.waited_s(15.0) == 5.0
    course.granted(at(A), 16.0)
    assert course.waited_s(20.0) == 0.0
    course.left(A, "peer_unreachable", 116.0)
    assert course.waited_s(117.0) == 1.0
    course.granted(at(B, "serve"), 118.0)
    assert course.waited_s(200.0) == 0.0


def test_the_startup_is_of_the_first_node_and_all_others_are_told():
    course = Course(Startup("a", "load"), 10.0)
    course.granted(at(A), 12.0)
    course.took(7)
    course.left(A, "peer_unreachable", 20.0)
    course.granted(at(B, "serve"), 30.0)
    course.took(3)
    course.left(B, "moved", 31.0)
    course.goes_on(at(A, "serve"))
    assert course.startup() == Startup(
        "a", "serve", "a is best", None, 2.0,
        (Stay("a", 7, "peer_unreachable"), Stay("b", 3, "moved")),
    )  # fmt: skip
    assert course.waited_s(40.0) == 0.0


def test_a_session_that_ran_here_already_does_not_wait():
    course = Course(Startup("a", "serve", startup_s=0.5), 10.0, 4, is_running=True)
    course.granted(at(A, "here"), 20.0)
    assert course.waited_s(20.0) == 0.0
    assert course.startup() == Startup("a", "serve", startup_s=0.5)
