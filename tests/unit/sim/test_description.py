import pytest

from sllm_node.core.errors import ConfigError
from sllm_node.sim.description import parse_description

SMALL = """
[[nodes]]
name = "n"
hbm = "80GB"
dram = "100GB"
nvme = "1TB"
[[models]]
name = "m"
size = "16GB"
kv = "4GB"
"""


def test_what_is_not_said_has_a_default():
    described = parse_description(SMALL)
    assert described.nodes[0].count == 1
    assert described.limits.publish_s == 0.1


@pytest.mark.parametrize(
    ("more", "problem"),
    [
        ("colour = 1", "models[0].colour: unknown key"),
        ("devices = 2", "which no node has"),
        ('[[models]]\nname = "m"\nsize = "1GB"\nkv = "1GB"', "'m' is there twice"),
        ('[[models]]\nname = "o"', "models[1].size: is missing"),
        ('[[faults]]\nnode = "x"\nat_s = 1\nlasts_s = 1', "there is no such node"),
        ("[limits]\nwait_s = -1", "limits.wait_s = -1"),
    ],
)
def test_a_wrong_file_is_refused_with_its_place(more, problem):
    with pytest.raises(ConfigError) as raised:
        parse_description(SMALL + more)
    assert problem in str(raised.value)
