import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sllm_node.checkpoint.index import DTYPE_BYTES
from sllm_node.convert import tensors
from sllm_node.convert.tensors import (
    MemoryTensor,
    as_bytes,
    cast_slice,
    dtype_named,
    load,
)
from sllm_node.core.errors import ConversionError
from sllm_node.engine.weights import TORCH_DTYPES


def test_every_dtype_of_the_format_has_torchs_size():
    assert {name: dtype.itemsize for name, dtype in TORCH_DTYPES.items()} == DTYPE_BYTES


@pytest.mark.parametrize(
    ("name", "stored"),
    [("bfloat16", "BF16"), ("BF16", "BF16"), ("fp16", "F16"), ("float32", "F32"), ("f64", "F64"),
     ("float8_e4m3fn", "F8_E4M3"), ("float8_e5m2", "F8_E5M2"), ("half", "F16")],
)  # fmt: skip
def test_a_float_dtype_has_the_names_that_people_use(name, stored):
    assert dtype_named(name) == stored


@pytest.mark.parametrize("name", ["int8", "bf17", ""])
def test_what_is_no_float_dtype_is_refused_with_those_that_are(name):
    with pytest.raises(ConversionError, match=r"is none of bfloat16, float16"):
        dtype_named(name)


@given(st.lists(st.floats(-60000, 60000, width=32), max_size=20), st.sampled_from(["F16", "BF16", "F64", "F32"]))  # fmt: skip
def test_a_cast_gives_what_torch_gives(numbers, wanted):
    before = torch.tensor(numbers, dtype=torch.float32)
    after = before.to(TORCH_DTYPES[wanted])
    view = memoryview(bytearray(as_bytes(before)))
    assert bytes(cast_slice(view, "F32", wanted, "t")) == bytes(as_bytes(after))


@pytest.mark.parametrize(
    ("number", "dtype", "wanted"),
    [(70000.0, "F32", "F16"), (1e300, "F64", "F32"), (500.0, "BF16", "F8_E4M3")],
)
def test_a_number_too_large_for_the_dtype_is_refused_with_its_tensor(number, dtype, wanted):
    view = as_bytes(torch.tensor([1.0, number], dtype=TORCH_DTYPES[dtype]))
    with pytest.raises(ConversionError, match=f"tensor t: has numbers too large for {wanted}"):
        cast_slice(view, dtype, wanted, "t")


def test_an_infinity_that_was_there_before_is_kept():
    view = as_bytes(torch.tensor([float("-inf")]))
    assert bytes(cast_slice(view, "F32", "BF16", "t")) == b"\x80\xff"


def test_a_tensor_in_memory_reads_like_one_in_a_file(monkeypatch):
    monkeypatch.setattr(tensors, "SLICE_BYTES", 8)
    tensor = MemoryTensor("t", torch.arange(6, dtype=torch.int16).reshape(2, 3).T)
    assert (tensor.dtype, tensor.shape, tensor.size) == ("I16", (3, 2), 12)
    assert [len(piece) for piece in tensor.slices()] == [8, 4]
    assert torch.equal(load(tensor), tensor.tensor)


def test_the_bytes_of_a_negated_view_are_those_of_its_numbers():
    negated = torch._neg_view(torch.tensor([2.0, -4.0]))
    assert negated.is_neg()
    assert bytes(as_bytes(negated)) == bytes(as_bytes(torch.tensor([-2.0, 4.0])))


def test_a_single_element_of_a_larger_tensor_has_bytes():
    single = torch.arange(3.0)[1::2]
    assert single.stride() == (2,)
    assert bytes(as_bytes(single)) == bytes(as_bytes(torch.ones(1)))
