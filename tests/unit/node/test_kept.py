from pathlib import Path

from sllm_node.cluster.journal import Journal
from sllm_node.core.config import parse_config
from sllm_node.core.types import ModelId
from sllm_node.node.kept import KeptPins, journal_path


def test_the_journal_lies_beside_the_store_under_the_nodes_name():
    config = parse_config('[node]\nid = "rack/1"\n[store]\npath = "/models"\n')
    assert journal_path(config) == Path("/models/.journal/rack%2F1.sqlite")


def test_the_journal_lies_where_the_config_says():
    assert journal_path(parse_config('[node]\njournal = "/var/j"\n')) == Path("/var/j")


async def test_pins_are_there_after_a_restart_until_they_are_dropped(tmp_path):
    journal = await Journal.open(tmp_path / "j")
    pins = KeptPins(journal)
    for model in (ModelId("b"), ModelId("a")):
        await pins.keep(model)
    await pins.drop(ModelId("never pinned"))
    await journal.close()
    journal = await Journal.open(tmp_path / "j")
    pins = KeptPins(journal)
    assert pins.models() == ("a", "b")
    await pins.drop(ModelId("a"))
    assert pins.models() == ("b",)
    await journal.close()
