import threading
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from sllm_node.checkpoint.catalog import Catalog
from sllm_node.core.errors import (
    ArgumentError,
    CheckpointChangedError,
    CheckpointFormatError,
    ChecksumError,
    ConversionError,
    SllmError,
)
from sllm_node.engine.weights import TORCH_DTYPES
from sllm_node.library import dicts
from tests.unit.library.replacing import Replacing

POOL = "32MiB"


def round_trip(loader, tensors, folder):
    return dicts.load(loader, dicts.save(tensors, folder), pool_bytes=POOL)


def same(one, other):
    return (
        one.dtype == other.dtype
        and one.shape == other.shape
        and one.contiguous().reshape(-1).view(torch.uint8).tolist()
        == other.reshape(-1).view(torch.uint8).tolist()
    )


@pytest.mark.parametrize("dtype", list(TORCH_DTYPES.values()), ids=list(TORCH_DTYPES))
def test_every_dtype_and_shape_comes_back(loader, tmp_path, dtype):
    def make(*shape):
        count = torch.Size(shape).numel() * dtype.itemsize
        raw = torch.arange(count, dtype=torch.uint8) % (2 if dtype == torch.bool else 251)
        return raw.view(dtype).reshape(shape)

    tensors = {
        "odd.name with/characters ü": make(3, 5),
        "scalar": make(1).reshape(()),
        "empty": make(0),
        "empty too": make(4, 0, 7),
        "many": make(1, 2, 1, 3, 1, 2),
    }
    found = round_trip(loader, tensors, tmp_path / "d")
    assert list(found) == list(tensors)
    assert all(same(tensors[name], found[name]) for name in tensors)


def test_an_empty_dict_comes_back(loader, tmp_path):
    assert round_trip(loader, {}, tmp_path / "d") == {}


def test_tensors_that_are_one_stay_one_and_the_order_stays(loader, tmp_path):
    shared = torch.randn(3, 4)
    tensors = {"z": shared, "m": torch.ones(2), "a": shared, "b": shared.detach()}
    found = round_trip(loader, tensors, tmp_path / "d")
    assert list(found) == ["z", "m", "a", "b"]
    assert found["a"] is found["z"] is found["b"]
    assert same(shared, found["a"])


def test_tensors_apart_in_one_storage_are_apart(loader, tmp_path):
    whole = torch.arange(24.0).reshape(4, 6)
    found = round_trip(loader, {"top": whole[:2], "bottom": whole[2:]}, tmp_path / "d")
    found["top"].zero_()
    assert same(whole[2:], found["bottom"])


def test_tensors_that_share_only_some_memory_are_refused_by_name(tmp_path):
    whole = torch.arange(24.0)
    with pytest.raises(ConversionError, match=r"'all' and 'some' share"):
        dicts.save({"all": whole, "some": whole[4:]}, tmp_path / "d")
    square = torch.randn(3, 3)
    with pytest.raises(ConversionError, match="share"):
        dicts.save({"it": square, "turned": square.T}, tmp_path / "d")
    assert list(tmp_path.iterdir()) == []


def test_columns_of_one_tensor_are_stored_apart(loader, tmp_path):
    whole = torch.randn(10, 12)
    tensors = dict(zip("qkv", whole.split([5, 3, 4], dim=1), strict=True))
    found = round_trip(loader, tensors, tmp_path / "d")
    assert all(same(tensors[name], found[name]) for name in tensors)
    with pytest.raises(ConversionError, match="'q' and 'wide' share, or may share, some"):
        dicts.save({**tensors, "wide": whole[:, 1:4]}, tmp_path / "e")


def test_negated_views_are_stored_as_the_numbers_that_they_show(loader, tmp_path):
    numbers = torch.randn(4, 4, dtype=torch.complex64)
    negated = numbers.conj().imag
    assert negated.is_neg()
    found = round_trip(loader, {"a": negated, "b": negated}, tmp_path / "d")
    assert torch.equal(found["a"], -numbers.imag)
    assert found["b"] is found["a"]
    with pytest.raises(ConversionError, match="'a' and 'b' share"):
        dicts.save({"a": numbers.imag, "b": negated}, tmp_path / "e")


def test_what_is_not_contiguous_comes_back_contiguous(loader, tmp_path):
    base = torch.randn(6, 8)
    tensors = {"turned": base.T, "stepped": torch.randn(9)[::2], "spread": torch.ones(1).expand(5)}
    found = round_trip(loader, tensors, tmp_path / "d")
    assert all(same(tensors[name], found[name]) for name in tensors)
    assert all(tensor.is_contiguous() for tensor in found.values())


def test_a_module_comes_back_with_its_parameters_and_buffers(loader, tmp_path):
    module = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    other = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    other.load_state_dict(round_trip(loader, module.state_dict(), tmp_path / "d"), assign=True)
    given = torch.randn(5, 3)
    assert torch.equal(module.eval()(given), other.eval()(given))


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        (3, "no tensor"),
        (torch.empty(2, device="meta"), "meta"),
        (torch.ones(2, dtype=torch.complex64), "complex64"),
        (torch.eye(2).to_sparse(), "sparse"),
    ],
)
def test_what_the_format_cant_hold_is_refused_by_name(tmp_path, value, problem):
    with pytest.raises(ConversionError, match=f"'x'.*{problem}"):
        dicts.save({"x": value}, tmp_path / "d")


@pytest.mark.parametrize("value", [[1], {3: torch.ones(1)}, {"\ud800": torch.ones(1)}])
def test_what_is_no_dict_of_names_is_refused(tmp_path, value):
    with pytest.raises(ArgumentError):
        dicts.save(value, tmp_path / "d")


def test_what_a_link_leads_to_is_replaced_where_it_lies(loader, tmp_path):
    dicts.save({"x": torch.zeros(2)}, tmp_path / "disk" / "d")
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "link").symlink_to(tmp_path / "disk" / "d")
    dicts.save({"x": torch.ones(2)}, tmp_path / "store" / "link", overwrite=True)
    assert dicts.load(loader, tmp_path / "disk" / "d", pool_bytes=POOL)["x"].tolist() == [1, 1]
    for folder, name in (("store", "link"), ("disk", "d")):
        assert [path.name for path in (tmp_path / folder).iterdir()] == [name]


@pytest.mark.parametrize(("times", "found"), [(2, [1.0]), (10, None)])
def test_a_dict_that_is_replaced_since_it_was_found_is_the_new_one(loader, tmp_path, times, found):
    def replace(time):
        dicts.save({"x": torch.full((1,), float(time))}, tmp_path / "d", overwrite=True)

    replace(-1)
    beside: Any = Replacing(loader, replace, times)
    with nullcontext() if found else pytest.raises(CheckpointChangedError, match="was replaced"):
        assert dicts.load(beside, tmp_path / "d", pool_bytes=POOL)["x"].tolist() == found


@pytest.mark.parametrize("names", ["cd", "ba"])
def test_an_order_is_never_that_of_another_dict(loader, tmp_path, names):
    def save(names, number):
        tensors = dict.fromkeys(names, torch.full((1,), number))
        dicts.save(tensors, tmp_path / "d", overwrite=True)

    save("ab", 1.0)
    beside: Any = Replacing(loader, lambda time: save(names, 2.0), 1, after=True)
    found = dicts.load(beside, tmp_path / "d", pool_bytes=POOL)
    assert [(name, number.tolist()) for name, number in found.items()] == [
        (name, [2.0]) for name in names
    ]


def test_what_else_lies_in_a_folder_is_never_deleted(loader, tmp_path):
    folder = dicts.save({"x": torch.zeros(2)}, tmp_path / "d")
    (folder / "optimizer.pt").write_text("mine")
    with pytest.raises(ArgumentError, match=r"would be deleted with it: optimizer\.pt"):
        dicts.save({"x": torch.ones(2)}, folder, overwrite=True)
    assert (folder / "optimizer.pt").read_text() == "mine"
    assert dicts.load(loader, folder, pool_bytes=POOL)["x"].tolist() == [0, 0]


def test_a_dict_is_replaced_only_if_asked_for(loader, tmp_path):
    dicts.save({"x": torch.zeros(2)}, tmp_path / "d")
    with pytest.raises(ArgumentError, match="overwrite"):
        dicts.save({"x": torch.ones(2)}, tmp_path / "d")
    dicts.save({"x": torch.ones(2)}, tmp_path / "d", overwrite=True)
    assert dicts.load(loader, tmp_path / "d", pool_bytes=POOL)["x"].tolist() == [1, 1]
    assert [path.name for path in tmp_path.iterdir()] == ["d"]


def test_the_catalogue_lists_a_dict_as_no_model(tmp_path):
    dicts.save({"x": torch.zeros(2)}, tmp_path / "d")
    catalog = Catalog(tmp_path)
    catalog.scan()
    assert catalog.problems == {}
    assert [catalog.get(model).index.architecture for model in catalog.models()] == ["none"]


def test_the_tensors_of_a_model_are_a_dict_as_well(loader, store):
    found = dicts.load(loader, "llama_tied", store=store, pool_bytes="1MiB")
    assert found["lm_head.weight"] is found["model.embed_tokens.weight"]


def test_loaded_tensors_go_into_other_formats(loader, tmp_path):
    found = round_trip(loader, {"a": torch.ones(3), "b": torch.zeros(2, 2)}, tmp_path / "d")
    save_file(found, tmp_path / "x.safetensors")
    torch.save(found["a"], tmp_path / "a.pt")
    assert (tmp_path / "a.pt").stat().st_size < 4096
    assert torch.load(tmp_path / "a.pt").tolist() == [1, 1, 1]


def test_memory_goes_back_with_the_last_tensor(loader, tmp_path):
    found = round_trip(loader, {"a": torch.ones(3), "b": torch.zeros(2, 2)}, tmp_path / "d")
    kept = found.pop("a").view(1, 3)
    found.clear()
    assert loader.memory_used("cpu") > 0
    assert kept.tolist() == [[1, 1, 1]]
    del kept
    assert loader.memory_used("cpu") == 0


def test_a_damaged_dict_is_an_error(loader, tmp_path):
    folder = dicts.save({"a": torch.ones(300)}, tmp_path / "d")
    path = folder / "shard-00000.bin"
    path.write_bytes(b"x" + path.read_bytes()[1:])
    with pytest.raises(ChecksumError):
        dicts.load(loader, folder, pool_bytes=POOL)


@pytest.mark.parametrize("order", ["{", '["a"]', '["a", "a"]'])
def test_a_damaged_order_is_an_error(loader, tmp_path, order):
    shared = torch.ones(2)
    folder = dicts.save({"a": shared, "b": shared}, tmp_path / "d")
    (folder / "order.json").write_text(order)
    with pytest.raises(CheckpointFormatError, match=r"order\.json"):
        dicts.load(loader, folder, pool_bytes=POOL)


def test_threads_save_and_load_at_once(loader, tmp_path):
    failures: list[Exception] = []

    def work(number):
        try:
            tensors = {str(n): torch.full((50,), float(number + n)) for n in range(5)}
            found = round_trip(loader, tensors, tmp_path / f"d{number}")
            assert all(torch.equal(tensors[name], found[name]) for name in tensors)
        except (SllmError, AssertionError) as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
