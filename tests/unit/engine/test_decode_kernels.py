"""The kernels' own sources, run on the CPU, compute what the references compute."""

import pytest
import torch

from sllm_node.core.errors import KernelError
from sllm_node.engine import decode_kernels as ours
from tests.emulation.cpu_kernels import CpuKernels, is_possible
from tests.unit.engine import decode_cases as cases

emulated = pytest.mark.skipif(not is_possible(), reason="needs g++")


@pytest.fixture(scope="module")
def rig():
    return cases.Rig(CpuKernels(), "cpu")


@emulated
@pytest.mark.parametrize("case", cases.LINEAR, ids=str)
def test_products_are_right(rig, case):
    cases.check_linear(rig, case)


@emulated
@pytest.mark.parametrize("gelu", [False, True])
@pytest.mark.parametrize("case", cases.GATED_LINEAR, ids=str)
def test_gated_products_are_right(rig, case, gelu):
    cases.check_gated_linear(rig, case, gelu)


@emulated
@pytest.mark.parametrize("case", cases.ROPE, ids=str)
def test_heads_are_rotated_and_kept(rig, case):
    cases.check_rope(rig, case)


@emulated
@pytest.mark.parametrize("case", cases.ATTENTION, ids=str)
def test_attention_is_right(rig, case):
    cases.check_attention(rig, case)


@emulated
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("rows", "size"), cases.SIZES)
def test_rows_are_normed(rig, rows, size, dtype):
    cases.check_norm(rig, rows, size, dtype)


@emulated
@pytest.mark.parametrize("gelu", [False, True])
@pytest.mark.parametrize(("rows", "size"), cases.SIZES)
def test_rows_are_gated(rig, rows, size, gelu):
    cases.check_gated(rig, rows, size, gelu)


def test_a_product_is_cut_so_that_all_its_tiles_run_at_once_if_they_can():
    assert ours.tuning_for(256, 132) == ours.DEFAULT_TUNING
    assert ours.tuning_for(384, 132) == ours.NARROW_TUNING
    assert ours.tuning_for(1792, 132) == ours.DEFAULT_TUNING


def asked(**changes):
    x = torch.zeros(2, 16, dtype=torch.bfloat16)
    given = {
        "x": x,
        "weight": torch.zeros(3, 16, dtype=torch.bfloat16),
        "output": x[:, :3],
        **changes,
    }
    return given["x"], [ours.Matrix(given["weight"], given["output"], given.get("bias"))]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"x": torch.zeros(17, 16, dtype=torch.bfloat16)}, "17 rows of x"),
        ({"x": torch.zeros(2, 16)}, "x of torch.float32"),
        ({"x": torch.zeros(2, 12, dtype=torch.bfloat16)}, "inner dimension of 12"),
        ({"x": torch.zeros(2, 33, dtype=torch.bfloat16)[:, 1:17]}, "not aligned"),
        ({"weight": torch.zeros(3, 8, dtype=torch.bfloat16)}, r"weights \(3, 8\)"),
        ({"weight": torch.zeros(3, 16, dtype=torch.float16)}, "weight of torch.float16 beside"),
        ({"output": torch.zeros(2, 4, dtype=torch.bfloat16)}, r"output \(2, 4\) of \(2, 3\)"),
        ({"bias": torch.zeros(4, dtype=torch.bfloat16)}, r"bias \(4,\) of \(3,\)"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(changes, words):
    with pytest.raises(KernelError, match=words):
        ours.linear(CpuKernels(), *asked(**changes))
