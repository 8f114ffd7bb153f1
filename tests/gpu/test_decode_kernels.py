"""The kernels of decode steps compute on a GPU what their references say, also when captured."""

import pytest
import torch

from sllm_node.core.units import MIB
from sllm_node.engine import decode_kernels as ours
from sllm_node.engine import paged_attention as paged
from tests.gpu.test_loads import open_devices
from tests.unit.engine import decode_cases as cases

pytestmark = pytest.mark.gpu
HALVES = (torch.bfloat16, torch.float16)
LARGE = (
    cases.LinearCase(1, 4096, (4096, 1024, 1024), norm=True),
    cases.LinearCase(8, 14336, (4096,), residual=True),
    cases.LinearCase(4, 4096, (14336,), bias=True),
    cases.LinearCase(1, 4096, (128256,), norm=True),
    cases.LinearCase(16, 4096, (4096,), residual=True),
    cases.LinearCase(3, 896, (896, 128, 128), norm=True, bias=True),
)
LONG = (
    cases.AttentionCase((1000,) * 3 + (1,), 32, 8, 128, splits=16),
    cases.AttentionCase((30000,), 32, 8, 128, splits=48),
    cases.AttentionCase((9000, 100, 5000), 16, 8, 256, splits=8, window=4096, softcap=50.0),
    cases.AttentionCase(tuple(range(1, 129, 3)), 64, 4, 128),
    cases.AttentionCase((2048, 700), 32, 32, 80, splits=4),
)


@pytest.fixture(scope="module", params=[True, False], ids=["overlapping", "in turn"])
def rig(request):
    from sllm_node.device.step_kernels import StepKernels

    (device,) = open_devices(1, 64 * MIB)
    kernels = StepKernels(device.cuda, device.cuda.handle, overlaps=request.param)
    yield cases.Rig(kernels, "cuda:0")
    torch.cuda.synchronize()
    kernels.close()
    device.close()


@pytest.mark.parametrize("case", cases.LINEAR + LARGE, ids=str)
def test_products_are_right(rig, case):
    cases.check_linear(rig, case)


@pytest.mark.parametrize("gelu", [False, True])
@pytest.mark.parametrize(
    "case", [*cases.GATED_LINEAR, cases.LinearCase(5, 4096, (14336,), norm=True)], ids=str
)
def test_gated_products_are_right(rig, case, gelu):
    cases.check_gated_linear(rig, case, gelu)


@pytest.mark.parametrize("case", cases.ROPE, ids=str)
def test_heads_are_rotated_and_kept(rig, case):
    cases.check_rope(rig, case)


@pytest.mark.parametrize("case", cases.ATTENTION + LONG, ids=str)
def test_attention_is_right(rig, case):
    cases.check_attention(rig, case)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize(("rows", "size"), cases.SIZES)
def test_rows_are_normed(rig, rows, size, dtype):
    cases.check_norm(rig, rows, size, dtype)


@pytest.mark.parametrize("gelu", [False, True])
@pytest.mark.parametrize(("rows", "size"), cases.SIZES)
def test_rows_are_gated(rig, rows, size, gelu):
    cases.check_gated(rig, rows, size, gelu)


def test_a_captured_chain_says_what_single_launches_say(rig):
    """Each launch reads what the one before wrote; replays see new lengths and new input."""
    case = cases.AttentionCase((700, 33), 8, 2, 128, splits=6)
    cache = cases.laid_out(rig, case)
    cache.keys.nan_to_num_(0.5)
    cache.values.nan_to_num_(0.5)
    hidden = rig.random(2, 1024, seed=9)
    weights = [rig.random(1024, 1024, seed=s, scale=0.03) for s in range(4)]
    norm = ours.RmsNorm(rig.random(1024, seed=8), 1e-5)
    query, attended, wide = (torch.empty_like(hidden) for _ in range(3))
    splits = paged.make_splits(6, query.view(2, 8, 128), 2)

    def step():
        for _ in range(5):
            ours.linear(rig.kernels, hidden, [ours.Matrix(weights[0], query)], norm)
            paged.attend(
                rig.kernels, query.view(2, 8, 128), cache, paged.Scoring(0.1), splits,
                attended.view(2, 8, 128),
            )  # fmt: skip
            ours.linear(rig.kernels, attended, [ours.Matrix(weights[1], hidden)], None, hidden)
            unit = ours.GatedUnit(weights[2], weights[3])
            ours.gated_linear(rig.kernels, hidden, unit, wide, norm)
            ours.rms_norm(rig.kernels, hidden, norm, query, wide, hidden)

    start = hidden.clone()
    step()  # loads every variant
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    for lengths in ((700, 33), (699, 1), (0, 48)):
        cache.lengths.copy_(torch.tensor(lengths))
        hidden.copy_(start)
        step()
        wanted = hidden.clone()
        for _ in range(20):
            hidden.copy_(start)
            graph.replay()
            torch.cuda.synchronize()
            assert torch.equal(hidden, wanted)
