import errno
import os
from pathlib import Path

import pytest

from sllm_node.checkpoint.cards import Cards, clear, complete, pack_bits, read_bits
from sllm_node.checkpoint.catalog import Catalog, open_checkpoint
from sllm_node.core.errors import CheckpointFormatError, ModelNotFoundError
from sllm_node.core.types import ModelId
from tests.unit.store.handmade import CHUNK, write_checkpoint

A = ModelId("a")


@pytest.fixture
def made(tmp_path):
    """A store with the card of a checkpoint that lies elsewhere."""
    write_checkpoint(tmp_path / "far", "a")
    write_card(tmp_path)
    return Cards(tmp_path / "store")


def write_card(tmp_path, remote="r"):
    index = (tmp_path / "far" / "a" / "tensor_index.json").read_bytes()
    files = {"tensor_index.json": index, "config.json": b"{}"}
    Cards(tmp_path / "store").write(A, remote, files)


def bring(tmp_path, cards):
    """Let all bytes come."""
    card = cards.get(A)
    for shard in card.index.shards:
        with (card.path / shard.name).open("r+b") as file:
            file.write((tmp_path / "far" / "a" / shard.name).read_bytes())
    (card.path / "fetched.bits").write_bytes(pack_bits([True] * 8))
    return card


def test_a_card_is_a_checkpoint_with_room_for_its_shards(made):
    card = made.get(A)
    assert (card.model, card.remote) == ("a", "r")
    assert [(card.path / s.name).stat().st_size for s in card.index.shards] == [40960, 20480]
    assert read_bits(card.path, card.index) == [False] * 8
    assert made.get(A) is card
    assert (made.models(), made.fetched(A)) == (("a",), (0, 61440))


def test_bits_are_kept_in_order(made):
    card = made.get(A)
    bits = [True, False, False, True, False, False, False, True]
    (card.path / "fetched.bits").write_bytes(pack_bits(bits))
    assert read_bits(card.path, card.index) == bits
    assert made.fetched(A) == (2 * CHUNK + 4096, 61440)


def is_hole(path):
    """Tell whether a file takes no room on the disk."""
    with path.open("rb") as file:
        try:
            os.lseek(file.fileno(), 0, os.SEEK_DATA)
        except OSError as error:
            return error.errno == errno.ENXIO
    return False


def test_to_make_a_card_ready_takes_no_room_on_a_full_disk(made):
    for _ in range(2):
        card = made.get(A)
        found = {path.name: is_hole(path) for path in card.path.iterdir()}
        assert {name for name, is_empty in found.items() if is_empty} == {
            "fetched.bits", "shard-00000.bin", "shard-00001.bin",
        }  # fmt: skip
        made.remove(A)


def test_bits_without_their_shards_say_nothing(made):
    card = made.get(A)
    (card.path / "fetched.bits").write_bytes(pack_bits([True] * 8))
    (card.path / "shard-00001.bin").unlink()
    assert made.fetched(A)[0] == 0
    assert read_bits(made.get(A).path, card.index) == [False] * 8


def test_a_completed_card_has_the_identities_that_it_had(tmp_path, made):
    card = bring(tmp_path, made)
    complete(card, made.store)
    assert open_checkpoint(made.store / "a") == card
    assert made.models() == ()
    assert not list(card.path.glob("shard-*"))


def test_a_card_that_was_cleared_meanwhile_is_not_completed(tmp_path, made):
    card = bring(tmp_path, made)
    held = [(card.path / shard.name).open("rb") for shard in card.index.shards]
    clear(card.path)
    made.get(A)
    with pytest.raises(FileNotFoundError):
        complete(card, made.store)
    assert not (made.store / "a").exists()
    for file in held:
        file.close()


@pytest.mark.parametrize("links", [1, 2, 3, 4])
def test_a_card_that_is_replaced_while_it_is_completed_is_no_checkpoint(
    tmp_path, made, monkeypatch, links
):
    card = bring(tmp_path, made)
    left, link, names = list(range(links)), Path.hardlink_to, Path.iterdir

    def replaced_before_the_last(path, target):
        if left and left.pop() == 0:
            write_checkpoint(tmp_path / "far", "a", seed=4)
            write_card(tmp_path, "new")
        link(path, target)

    monkeypatch.setattr(Path, "iterdir", lambda folder: iter(sorted(names(folder))))
    monkeypatch.setattr(Path, "hardlink_to", replaced_before_the_last)
    with pytest.raises(FileNotFoundError):
        complete(card, made.store)
    assert not (made.store / "a").exists()
    assert (made.remote_of("a"), made.fetched(A)[0]) == ("new", 0)


def test_a_checkpoint_that_took_the_name_meanwhile_stays(tmp_path, made):
    card = bring(tmp_path, made)
    own = write_checkpoint(made.store, "a", seed=4)
    with pytest.raises(OSError, match="not empty"):
        complete(card, made.store)
    assert (made.store / "a" / "shard-00000.bin").read_bytes() == own[:40960]


def test_a_new_card_takes_the_place_of_an_old_one_with_its_bytes(tmp_path, made):
    bring(tmp_path, made)
    assert made.fetched(A)[0] == 61440
    write_card(tmp_path, "other")
    assert (made.remote_of("a"), made.fetched(A)[0]) == ("other", 0)
    assert made.get(A).remote == "other"


def test_cards_of_remotes_that_the_config_has_no_more_are_not_shown(made):
    others = Cards(made.store, frozenset({"other"}))
    assert (others.models(), others.get(A)) == ((), None)
    catalog = Catalog(made.store, others)
    catalog.scan()
    with pytest.raises(ModelNotFoundError):
        catalog.get(A)


def test_a_damaged_card_is_no_checkpoint(made):
    (made.root / "a" / "tensor_index.json").write_text("{}")
    with pytest.raises(CheckpointFormatError):
        made.get(A)
    (made.root / "a" / "card.json").write_text("?")
    assert (made.all(), made.remote_of("a")) == (("a",), None)
    assert made.get(A) is None
    (made.root / "a" / "tensor_index.json").unlink()
    assert made.get(A) is None


def test_a_dropped_card_is_gone(made):
    made.drop(A)
    assert (made.all(), made.get(A), made.remove(A)) == ((), None, False)
