import pytest

from sllm_node.checkpoint.belongings import in_the_way
from sllm_node.checkpoint.cards import TEXT_FILES
from tests.unit.checkpoint.raw import write_raw


def test_shards_index_and_texts_are_a_checkpoints_own(tmp_path):
    folder = write_raw(tmp_path).path
    for name in (*TEXT_FILES, "order.json", "sentencepiece.bpe.model", "qwen.tiktoken"):
        (folder / name).write_text("")
    (folder / "additional_chat_templates").mkdir()
    assert in_the_way(folder) is None


@pytest.mark.parametrize(
    "name",
    ["optimizer.pt", "training_args.bin", "trainer_state.json", "README.md", "model.safetensors",
     "shard-1.bin", "notes.txt", "train.py", ".git"],
)  # fmt: skip
def test_other_files_are_in_the_way_by_name(tmp_path, name):
    folder = write_raw(tmp_path).path
    (folder / name).write_text("mine")
    assert f"would be deleted with it: {name}; move that elsewhere" in (in_the_way(folder) or "")


def test_of_many_the_first_are_named(tmp_path):
    for number in range(11):
        (tmp_path / f"step-{number:02d}").mkdir()
    assert "step-06, step-07 and 3 more;" in (in_the_way(tmp_path) or "")


def test_what_can_not_be_listed_is_in_the_way(tmp_path):
    (tmp_path / "file").write_text("")
    assert "Not a directory" in (in_the_way(tmp_path / "file") or "")
