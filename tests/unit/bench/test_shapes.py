import pytest

from sllm_node.bench.shapes import find_shape
from sllm_node.core.errors import BenchError


@pytest.mark.parametrize(
    ("name", "gigabytes"), [("8b", 16.06), ("32b", 65.52), ("30b-a3b", 61.06), ("opt-6.7b", 13.32)]
)
def test_a_shape_has_the_bytes_of_its_model(name, gigabytes):
    assert find_shape(name).size / 1e9 == pytest.approx(gigabytes, abs=0.005)


def test_tied_tensors_are_stored_once():
    names = [tensor.name for tensor in find_shape("opt-6.7b").tensors]
    assert "model.decoder.embed_tokens.weight" in names
    assert "lm_head.weight" not in names


def test_an_unknown_shape_is_refused_with_those_there_are():
    with pytest.raises(BenchError, match=r"9b.*8b, 32b"):
        find_shape("9b")
