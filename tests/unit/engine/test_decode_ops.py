"""More rows than our products take go through torch's, joined where weights lie side by side."""

import pytest
import torch

from sllm_node.engine.decode_kernels import GatedUnit, Matrix, RmsNorm
from sllm_node.engine.decode_ops import OURS_MAX, DecodeOps, KernelOps, ReferenceOps
from tests.emulation.cpu_kernels import CpuKernels, is_possible

pytestmark = pytest.mark.skipif(not is_possible(), reason="needs g++")
ROWS, INNER = OURS_MAX + 1, 64
HEIGHTS = [32, 16, 16]
OPS: tuple[DecodeOps, ...] = (KernelOps(CpuKernels(), 100), ReferenceOps())


def random(*shape, seed):
    made = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    return (made * 0.1).to(torch.bfloat16)


@pytest.mark.parametrize("lie_apart", [False, True])
def test_many_rows_of_several_matrices_are_right(lie_apart):
    weights = torch.split(random(sum(HEIGHTS), INNER, seed=1), HEIGHTS)
    if lie_apart:
        weights = tuple(weight.clone() for weight in weights)
    x, norm = random(ROWS, INNER, seed=2), RmsNorm(random(INNER, seed=3), 1e-5)
    results = []
    for ops in OPS:
        packed = torch.full((ROWS, sum(HEIGHTS)), float("nan"), dtype=torch.bfloat16)
        outputs = torch.split(packed, HEIGHTS, 1)
        ops.linear(x, [Matrix(w, o) for w, o in zip(weights, outputs, strict=True)], norm)
        results.append(packed)
    assert torch.allclose(results[0], results[1], atol=1e-2, rtol=2e-2)


@pytest.mark.parametrize("lie_apart", [False, True])
def test_many_rows_of_a_gated_unit_are_right(lie_apart):
    gate, up = random(2 * 48, INNER, seed=1).chunk(2)
    unit = GatedUnit(gate, up.clone() if lie_apart else up)
    x, norm = random(ROWS, INNER, seed=2), RmsNorm(1 + random(INNER, seed=3), 1e-5)
    results = [torch.full((ROWS, 48), float("nan"), dtype=torch.bfloat16) for _ in OPS]
    for ops, output in zip(OPS, results, strict=True):
        ops.gated_linear(x, unit, output, norm)
    assert torch.allclose(results[0], results[1], atol=1e-2, rtol=2e-2)
