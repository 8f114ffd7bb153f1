from sllm_node.store.pipeline import within
from sllm_node.store.residency import Unit

UNITS = [Unit(number, 0, 10 * number, 10, 10 * number, 10) for number in range(6)]


def wanted(*ranges):
    return [unit.index for unit in within(UNITS, ranges)]


def test_units_are_wanted_for_one_byte_of_theirs():
    assert wanted((9, 11), (29, 30), (45, 46)) == [0, 1, 2, 4]
    assert wanted((0, 60)) == [0, 1, 2, 3, 4, 5]
    assert wanted((10, 20)) == [1]
    assert wanted() == []
