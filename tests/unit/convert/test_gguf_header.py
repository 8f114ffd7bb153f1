import pytest
from transformers import AutoConfig

from sllm_node.convert.gguf_header import GgufHeader, check_config, rope_scaling
from sllm_node.core.errors import ConversionError

SIZES = {"hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2}


def header(kind, fields, factors=()):
    return GgufHeader(kind, fields, 1, {}, factors)


def config_of(kind, **fields):
    return AutoConfig.for_model(kind, **SIZES, **fields)


@pytest.mark.parametrize(
    ("kind", "fields", "problem"),
    [
        ("starcoder2", {"rope.freq_base": 999999.0}, "starcoder2.rope.freq_base is 999999.0, .*has 10000.0"),
        ("phi3", {"rope.dimension_count": 12}, "phi3.rope.dimension_count is 12, .*has 16"),
        ("phi3", {"attention.sliding_window": 2047}, "attention.sliding_window is 2047, .*has None"),
        ("gemma2", {"attn_logit_softcapping": 30.0}, "attn_logit_softcapping is 30.0, .*has 50.0"),
        ("gemma2", {"final_logit_softcapping": 50.0}, "final_logit_softcapping is 50.0, .*has 30.0"),
    ],
)  # fmt: skip
def test_a_key_that_the_config_has_otherwise_is_refused_by_name(kind, fields, problem):
    config = config_of(kind, pad_token_id=0)
    with pytest.raises(ConversionError, match=problem):
        check_config(header(kind, fields), config, "m.gguf")


def test_gemma2_27b_is_refused_as_its_queries_are_scaled_by_what_no_key_says():
    sizes = {"hidden_size": 4608, "num_attention_heads": 32, "head_dim": 128}
    config = AutoConfig.for_model("gemma2", **sizes)
    with pytest.raises(ConversionError, match=r"gemma2.block_count is 46, .*query_pre_attn_scalar"):
        check_config(header("gemma2", {"block_count": 46}), config, "m.gguf")
    check_config(header("gemma2", {"block_count": 42}), config, "m.gguf")
    config.query_pre_attn_scalar = 144
    check_config(header("gemma2", {"block_count": 46}), config, "m.gguf")


def test_keys_that_the_config_has_are_taken():
    rope = {"rope_theta": 1e6, "rope_type": "default", "partial_rotary_factor": 0.75}
    config = config_of("phi3", rope_parameters=rope, sliding_window=9, pad_token_id=0)
    fields = {"rope.freq_base": 1e6, "rope.dimension_count": 12, "attention.sliding_window": 9}
    check_config(header("phi3", fields), config, "m.gguf")
    for none in (0, 2048):
        check_config(
            header("phi3", {"attention.sliding_window": none}), config_of("llama"), "m.gguf"
        )


def test_a_model_whose_layers_turn_differently_is_taken_by_the_base_of_those_that_see_all():
    config = config_of("gemma3_text", head_dim=16)
    base = config.rope_parameters["full_attention"]["rope_theta"]
    check_config(header("gemma3", {"rope.freq_base": base}), config, "m.gguf")
    linear = {"rope.scaling.type": "linear", "rope.scaling.factor": 8.0}
    with pytest.raises(ConversionError, match=r"scaling.type is linear, .*only linear .* of all"):
        rope_scaling(header("gemma3", linear), config, "m.gguf")


@pytest.mark.parametrize(
    ("fields", "scaling"),
    [
        ({}, {}),
        ({"rope.scaling.type": "none", "rope.scaling.factor": 4.0}, {}),
        ({"rope.scaling.type": "linear", "rope.scaling.factor": 1.0}, {}),
        ({"rope.scaling.factor": 4.0}, {"rope_type": "linear", "factor": 4.0}),
        ({"rope.scale_linear": 2.0}, {"rope_type": "linear", "factor": 2.0}),
    ],
)
def test_scaling_is_read_as_llama_cpp_reads_it(fields, scaling):
    assert rope_scaling(header("llama", fields), config_of("llama"), "m.gguf") == scaling


@pytest.mark.parametrize("factors", [(8.0,) * 8, (1.0, 8.0), (1.0,) * 7 + (float("nan"),)])
def test_factors_that_follow_from_no_known_scaling_are_refused(factors):
    with pytest.raises(ConversionError, match=r"rope_freqs.weight that is not that of Llama 3.1"):
        rope_scaling(header("llama", {}, factors), config_of("llama"), "m.gguf")


def test_a_model_without_a_rotary_embedding_scales_nothing():
    config = AutoConfig.for_model("gpt2")
    assert rope_scaling(header("gpt2", {}), config, "m.gguf") == {}
    check_config(header("gpt2", {}), config, "m.gguf")
