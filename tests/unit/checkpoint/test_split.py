import pytest

from sllm_node.checkpoint.index import VERSION, Shard, TensorEntry, TensorIndex
from sllm_node.checkpoint.split import Cut, layer_of, layer_starts, split

PAGE = 4096


def index_of(names, size=PAGE):
    entries = tuple(
        TensorEntry(name, "U8", (size,), 0, number * size, size)
        for number, name in enumerate(names)
    )
    shard = Shard("s", len(names) * size, (0,))
    return TensorIndex(VERSION, "m", "x", "U8", 16, PAGE, 0, (shard,), entries)


LAYERS = [f"model.layers.{layer}.{part}" for layer in range(4) for part in ("a.weight", "b.weight")]


@pytest.fixture
def index():
    return index_of(["model.embed.weight", *LAYERS, "norm.weight"])


def test_a_layer_begins_where_its_first_tensor_lies(index):
    assert layer_starts(index) == (0, 3 * PAGE, 5 * PAGE, 7 * PAGE)


def test_each_part_takes_about_its_share(index):
    assert split(index, 0, (10 * PAGE, 10 * PAGE)) == (
        Cut(0, 5 * PAGE, 2),
        Cut(5 * PAGE, 10 * PAGE, 2),
    )
    assert split(index, 0, (4 * PAGE, 16 * PAGE)) == (
        Cut(0, 3 * PAGE, 1),
        Cut(3 * PAGE, 10 * PAGE, 3),
    )


def test_kv_memory_counts_by_layers(index):
    assert split(index, 4 * PAGE, (7 * PAGE, 7 * PAGE)) is not None
    assert split(index, 4 * PAGE, (7 * PAGE, 6 * PAGE)) is None


def test_there_are_no_more_parts_than_layers(index):
    assert split(index, 0, (10 * PAGE,) * 5) is None
    assert [cut.layers for cut in split(index, 0, (10 * PAGE,) * 4) or ()] == [1, 1, 1, 1]


@pytest.mark.parametrize("names", [["h.1.w", "h.0.w"], ["h.0.w", "h.2.w"], ["w"]])
def test_layers_out_of_order_are_not_cut(names):
    assert layer_starts(index_of([f"model.{name}" for name in names])) == ()


@pytest.mark.parametrize(
    ("name", "layer"),
    [("model.layers.12.mlp.weight", 12), ("transformer.h.0", 0), ("model.norm.weight", None), ("", None)],
)  # fmt: skip
def test_names_tell_the_layer(name, layer):
    assert layer_of(name) == layer
