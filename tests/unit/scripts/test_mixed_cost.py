"""A layer of a mixed step launches no more than it has to."""

import pytest

from scripts.bench import mixed_cost
from sllm_node.engine.step_graphs import CAPTURES_A_STEP


@pytest.mark.parametrize(("behind", "launches"), [(3000, 3), (100, 2)])
def test_a_layer_of_a_captured_step_launches_our_kernels_and_hardly_anything_of_torchs(
    monkeypatch, behind, launches
):
    mixed_cost.null_flash(monkeypatch.setattr)
    kernels = mixed_cost.null_kernels(monkeypatch.setattr)
    runner = mixed_cost.made_runner(kernels, 6000)
    step = mixed_cost.made_step(4, behind, 20)
    for _ in range(
        2 + mixed_cost.LAYERS // CAPTURES_A_STEP
    ):  # from the second on pieces are captured
        runner.advance([step])
    names, count = mixed_cost.counted(runner, step, kernels)
    copies = names.pop("copy_") // mixed_cost.LAYERS
    assert copies == (behind == 100)  # where nothing is put together
    assert max(names.values()) < mixed_cost.LAYERS
    assert count // mixed_cost.LAYERS == launches
