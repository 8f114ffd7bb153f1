import shutil

import pytest

from sllm_node.checkpoint.cards import Cards
from sllm_node.checkpoint.catalog import Catalog
from sllm_node.checkpoint.given import Given, file_of
from sllm_node.core.types import ModelId
from tests.unit.store.handmade import write_checkpoint


def found(given):
    checkpoint = given.checkpoint(ModelId("a"))
    assert checkpoint is not None
    return checkpoint


@pytest.fixture
def store(tmp_path):
    write_checkpoint(tmp_path, "a")
    (tmp_path / "a" / "config.json").write_text("{}")
    (tmp_path / "a" / "notes.txt").write_text("private")
    return tmp_path


def test_what_is_at_a_remote_is_not_passed_on(store):
    cards = Cards(store)
    index = (store / "a" / "tensor_index.json").read_bytes()
    cards.write(ModelId("far"), "r", {"tensor_index.json": index, "config.json": b"{}"})
    catalog = Catalog(store, cards)
    assert catalog.models() == ("far",)
    assert Given(catalog).checkpoint(ModelId("far")) is None
    assert [one.model for one in Given(catalog).all()] == ["a"]


def test_only_files_that_a_checkpoint_may_have_are_found(store):
    checkpoint = found(Given(Catalog(store)))
    for name in ("shard-00000.bin", "config.json"):
        assert file_of(checkpoint, name) == store / "a" / name
    for name in ("notes.txt", "../a/config.json", "shard-00009.bin", "tokenizer.json", "", "."):
        assert file_of(checkpoint, name) is None


def test_the_digest_tells_versions_apart(store):
    given = Given(Catalog(store))
    before = given.digest(found(given))
    assert given.digest(found(given)) == before
    shutil.rmtree(store / "a")
    write_checkpoint(store, "a", seed=2)
    assert given.digest(found(given)) != before
