"""Looks at parts of a context are put together as plain torch does it, and nothing else is taken."""

import pytest
import torch

from sllm_node.core.errors import KernelError
from sllm_node.engine import decode_reference as reference
from sllm_node.engine import segments
from tests.emulation.cpu_kernels import CpuKernels, is_possible
from tests.unit.engine import decode_cases as cases

RIG = cases.Rig(CpuKernels(), "cpu")
PLACES = torch.tensor([[0, 1, 0, 6], [3, 3, 0, 2], [2, 2, 1, 1]], dtype=torch.int32)
"""Of a piece of two tokens with three segments, one without, and one with two."""
HEADS, SIZE, ROWS = 36, 64, 8


def looks(dtype=torch.bfloat16, seed=0):
    tokens = PLACES.shape[1]
    packed = RIG.random(tokens, HEADS + 2, SIZE, seed=seed, dtype=dtype)
    logs = [
        RIG.random(HEADS, count, seed=seed + count, scale=4, dtype=torch.float32)
        for count in (tokens, ROWS)
    ]
    far = RIG.random(ROWS, HEADS, SIZE, seed=seed + 1, dtype=dtype)
    return (packed[:, :HEADS], logs[0]), (far, logs[1])


def doubled(look):
    return look[0].double(), look[1].double()


@pytest.mark.skipif(not is_possible(), reason="needs g++")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_looks_are_joined_layer_by_layer(dtype):
    near, far = looks(dtype)
    output = RIG.poisoned(len(near[0]), HEADS, SIZE, dtype=dtype)
    join = segments.prepared(RIG.kernels, near, far, PLACES, output)
    for seed in range(2):
        near, far = looks(dtype, seed)
        join(near, far, output)
        truth = reference.joined(doubled(near), doubled(far), PLACES)
        cases.check(output, truth)
        assert torch.equal(output[2], near[0][2])  # nothing to join


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda near, far: ((near[0], near[1].double()), far), "logarithms of near sums"),
        (lambda near, far: (near, (far[0][:-1], far[1])), "logarithms of far sums"),
        (lambda near, far: (near, (far[0].half(), far[1])), "far of torch.float16"),
        (lambda near, far: (near, (far[0][:, :, :40], far[1])), "far"),
    ],
)
def test_what_does_not_fit_is_refused(change, words):
    near, far = looks()
    output = torch.empty_like(near[0])
    changed_near, changed_far = change(near, far)
    with pytest.raises(KernelError, match=words):
        segments.prepared(RIG.kernels, changed_near, changed_far, PLACES, output)


def test_a_layer_unlike_the_first_is_refused():
    near, far = looks()
    output = torch.empty_like(near[0])
    join = segments.prepared(RIG.kernels, near, far, PLACES, output)
    with pytest.raises(KernelError, match="unlike"):
        join(near, (far[0][:-1], far[1][:, :-1]), output)
