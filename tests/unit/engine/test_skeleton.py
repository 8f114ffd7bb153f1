"""What a module is built to do, whatever the config that came with it asks for."""

import json
from typing import Any

import pytest
import torch
from transformers import AutoConfig

from sllm_node.checkpoint.split import layer_starts
from sllm_node.core.errors import UnsupportedArchitectureError
from sllm_node.engine.attention import attention_step
from sllm_node.engine.skeleton import architecture, build_skeleton, forward_order, layer_shapes
from tests.models import FAMILIES, make_checkpoint, make_model, make_source
from tests.unit.engine.rig import ask, collect, engine_of, reference

EXPERTS = ["mixtral", "qwen2_moe", "qwen3_moe", "granitemoe", "glm4_moe", "deepseek_v3"]
PROMPT = tuple(range(5, 29))


class NoAttention:
    """Answers attention with nothing."""

    def attend(self, call):
        return call.query.new_zeros(*call.query.shape[:2], call.value.shape[-1])


def config_of(folder, family="llama", **changes):
    """Write the config of `family`, with `changes` as a user would make them, and return the folder."""
    model_type, fields = FAMILIES[family]
    AutoConfig.for_model(model_type, **fields).save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
    return folder


def output_of(model):
    model = model.to_empty(device="cpu")
    ids = torch.arange(4)[None]
    with torch.inference_mode(), attention_step(NoAttention()):
        return model(input_ids=ids, position_ids=ids, use_cache=False)


@pytest.mark.parametrize("family", ["llama", "mixtral", "qwen3_moe"])
def test_only_logits_are_computed_even_where_the_config_asks_for_more(tmp_path, family):
    fields: dict[str, Any] = {
        "output_router_logits": True,
        "output_hidden_states": True,
        "return_dict": False,
    }
    source = make_source(tmp_path / "m", family, **fields)
    assert json.loads((source / "config.json").read_text()).items() >= fields.items()
    assert [
        name for name, value in output_of(build_skeleton(source)).items() if value is not None
    ] == ["logits"]


@pytest.mark.parametrize("family", EXPERTS)
def test_experts_are_computed_where_they_lie_whatever_the_config_asks_for(tmp_path, family):
    source = make_source(tmp_path / "m", family)
    config = json.loads((source / "config.json").read_text())
    changed = {**config, "experts_implementation": "batched_mm"}
    (source / "config.json").write_text(json.dumps(changed))
    model = build_skeleton(source)
    assert model.config._experts_implementation == "grouped_mm"
    forward_order(model)
    layer_shapes(model)
    assert model.config._experts_implementation == "grouped_mm"


@pytest.mark.parametrize("family", EXPERTS)
def test_the_experts_of_a_layer_are_few_tensors_between_those_of_its_neighbours(tmp_path, family):
    index = make_checkpoint(tmp_path, "m", family, num_hidden_layers=3).index
    stacks = [entry for entry in index.tensors if len(entry.shape) == 3]
    assert {entry.name.split(".")[2] for entry in stacks} >= {"1", "2"}
    assert max(sum(f".{n}." in entry.name for entry in stacks) for n in range(3)) == 2
    assert len(layer_starts(index)) == 3
    numbers = sum(
        parameter.numel() for parameter in make_model(family, num_hidden_layers=3).parameters()
    )
    assert numbers * 4 <= index.size < numbers * 4.1 + 256 * len(index.tensors)


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
async def test_a_session_says_the_same_whoever_shares_its_experts(tmp_path, family):
    checkpoint = make_checkpoint(tmp_path, "m", family)
    others = [[7 * n + k for k in range(3, 3 + 9 * n)] for n in range(1, 5)]
    async with engine_of(checkpoint, max_step_tokens=32, block_tokens=4) as engine:
        alone = (await collect(engine.submit(ask(PROMPT, 16))))[1]
        first = engine.submit(ask(PROMPT, 16))
        crowd = [engine.submit(ask([t % 300 for t in other], 16)) for other in others]
        assert (await collect(first))[1] == alone
        for generation in crowd:
            await collect(generation)
    assert alone == reference(make_model(family), list(PROMPT), 16)


@pytest.mark.parametrize(
    ("family", "windows"),
    [("mistral", (8, 8)), ("gemma2", (8, None)), ("llama", (None, None)), ("olmoe", (None, None))],
)
def test_a_layer_has_the_window_of_its_mask(tmp_path, family, windows):
    model = build_skeleton(config_of(tmp_path, family, sliding_window=8))
    assert tuple(shape.window for shape in layer_shapes(model)) == windows


def test_a_window_in_which_a_token_does_not_even_see_itself_is_refused(tmp_path):
    with pytest.raises(UnsupportedArchitectureError, match="sliding_window = 0"):
        build_skeleton(config_of(tmp_path, "mistral", sliding_window=0))


def test_a_class_may_be_spelled_as_on_the_hub(tmp_path):
    folder = config_of(tmp_path, "phimoe", architectures=["PhiMoEForCausalLM"], sliding_window=8)
    model = build_skeleton(folder)
    assert architecture(model.config) == type(model).__name__ == "PhimoeForCausalLM"


def test_a_class_that_is_no_list_is_one_name(tmp_path):
    folder = config_of(tmp_path, architectures="LlamaForCausalLM")
    assert architecture(build_skeleton(folder).config) == "LlamaForCausalLM"


@pytest.mark.parametrize("names", [5, [], None, {"a": "b"}])
def test_where_no_class_is_named_it_is_that_of_the_type(tmp_path, names):
    folder = config_of(tmp_path, architectures=names)
    assert architecture(build_skeleton(folder).config) == "LlamaForCausalLM"


@pytest.mark.parametrize("rope", ["linear", "llama3", "yarn", "longrope"])
def test_phimoe_with_scaled_positions_is_refused(tmp_path, rope):
    parameters = {
        "rope_type": rope, "rope_theta": 1e4, "factor": 2.0, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0, "short_mscale": 1.2, "long_mscale": 1.2,
        "original_max_position_embeddings": 64, "short_factor": [1.0] * 8, "long_factor": [2.0] * 8,
    }  # fmt: skip
    with pytest.raises(UnsupportedArchitectureError, match=f"rotary embedding '{rope}'"):
        build_skeleton(config_of(tmp_path, "phimoe", rope_parameters=parameters))


@pytest.mark.parametrize(
    ("family", "changes", "problem"),
    [
        (
            "qwen2",
            {"architectures": ["LlamaForCausalLM"]},
            "LlamaForCausalLM with a config of type qwen2, which transformers runs as Qwen2ForC",
        ),
        (
            "mistral",
            {
                "architectures": ["MistralForCausalLM"],
                "sliding_window": 8,
                "layer_types": ["sliding_attention", "full_attention"],
            },
            "MistralForCausalLM with a config of type ministral, which transformers runs as Minist",
        ),
    ],
)
def test_a_class_that_is_not_the_one_of_the_config_is_refused_with_both(
    tmp_path, family, changes, problem
):
    with pytest.raises(UnsupportedArchitectureError, match=problem):
        build_skeleton(config_of(tmp_path, family, **changes))
