from dataclasses import replace

from sllm_node.cluster.shown import differing
from tests.unit.cluster.test_choice import held, node, view_of


def of(created, digest):
    return (replace(held(), created=created, digest=digest),)


def test_models_of_which_nodes_have_different_weights_are_shown_the_newest_first():
    view = view_of(
        node("a", models=of(1, "x")), node("b", models=of(2, "y")), node("c", models=of(3, "x"))
    )
    assert differing(view) == {"m": [["a", "c"], ["b"]]}


def test_nodes_that_converted_the_same_at_different_times_or_do_not_tell_do_not_differ():
    view = view_of(
        node("a", models=of(1, "x")), node("b", models=of(2, "x")), node("c", models=of(3, ""))
    )
    assert differing(view) == {}
