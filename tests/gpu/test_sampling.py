"""A GPU draws the tokens that a CPU draws, and nobody waits for it."""

from typing import Any

import pytest
import torch

from sllm_node.core.types import SamplingParameters
from sllm_node.engine.adjustments import adjustments
from sllm_node.engine.draw import draw
from sllm_node.engine.sampling import SamplingRow
from sllm_node.engine.sampling_plan import SamplingPlan

pytestmark = pytest.mark.gpu
VOCABULARY = 32_000
GREEDY: dict[str, Any] = {"temperature": 0.0}
PENALTIES: dict[str, Any] = {
    "repetition_penalty": 1.2,
    "presence_penalty": 0.3,
    "frequency_penalty": 0.1,
}
BATCHES: dict[str, list[dict[str, Any]]] = {
    "greedy": [GREEDY],
    "temperature": [{"temperature": 0.7}],
    "full": [{"top_k": 40}, {"top_p": 0.9}, {"min_p": 0.05}, {"top_k": 1}, {"top_p": 0.0}],
    "mixed": [
        GREEDY, {}, {"top_p": 0.8, **PENALTIES}, {"logit_bias": ((5, 9.0),)}, {**GREEDY, **PENALTIES},
    ],
}  # fmt: skip


def row(rules, number):
    parameters = SamplingParameters(seed=number * 0x9E3779B97F4A7C15 % (1 << 64), **rules)
    changes = adjustments(parameters, tuple(range(300)), [number, 7, 7])
    return SamplingRow(parameters, number, 3 if number % 4 == 3 else None, changes)


def batch(name, seed, dtype):
    kinds = BATCHES[name]
    rows = [row(kinds[i % len(kinds)], seed * 100 + i) for i in range(13)]
    logits = torch.randn(16, VOCABULARY, generator=torch.Generator().manual_seed(seed)) * 4
    logits[6] = float("nan")
    return logits.to(dtype), SamplingPlan(rows, VOCABULARY, 16)


def on_gpu(plan):
    return torch.from_numpy(plan.buffer()).cuda()


def compare(found, expected):
    assert [d.token for d in found] == [d.token for d in expected]
    assert expected[6].token == -1
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.logprob == pytest.approx(theirs.logprob, abs=1e-4)
        values = [value for _, value in theirs.top]
        assert [value for _, value in ours.top] == pytest.approx(values, abs=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", BATCHES)
def test_a_gpu_draws_what_a_cpu_draws_without_being_waited_for(name, dtype):
    for seed in range(8):
        logits, plan = batch(name, seed, dtype)
        expected = draw(logits, torch.from_numpy(plan.buffer()), plan.variant)
        there, buffer = logits.cuda(), on_gpu(plan)
        torch.cuda.set_sync_debug_mode("error")
        try:
            packed = draw(there, buffer, plan.variant)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        compare(plan.read(packed.cpu().numpy()), plan.read(expected.numpy()))


@pytest.mark.parametrize("name", BATCHES)
def test_a_cuda_graph_draws_for_every_plan_of_its_variant(name):
    logits, plan = batch(name, 0, torch.bfloat16)
    there, buffer, variant = logits.cuda(), on_gpu(plan), plan.variant
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        draw(there, buffer, variant)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        packed = draw(there, buffer, variant)
    for seed in range(1, 5):
        logits, plan = batch(name, seed, torch.bfloat16)
        assert plan.variant == variant
        there.copy_(logits)
        buffer.copy_(torch.from_numpy(plan.buffer()))
        graph.replay()
        expected = draw(logits, torch.from_numpy(plan.buffer()), variant)
        compare(plan.read(packed.cpu().numpy()), plan.read(expected.numpy()))
