"""Names and shapes against the ones that transformers' own loading gives."""

from contextlib import ExitStack

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from transformers.core_model_loading import (
    Chunk,
    Concatenate,
    MergeModulelist,
    Transpose,
    WeightConverter,
)

from sllm_node.checkpoint.layout import TensorSpec
from sllm_node.convert.convert import ConvertOptions, convert
from sllm_node.convert.mapping import Group, GroupRunner, group_sources, kept_in_fp32
from sllm_node.convert.plan import PlannedTensor, plan_tensors, tensor_bytes
from sllm_node.convert.safetensors import open_weights
from sllm_node.convert.sources import FolderSource
from sllm_node.convert.tensors import MemoryTensor, SourceTensor
from sllm_node.core.errors import ConversionError
from sllm_node.engine.weights import TORCH_DTYPES
from tests.models import FAMILIES, make_model, make_source


def names_in_order(model):
    """Return the model's tensors, tied ones once."""
    names = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        names.setdefault(id(tensor), name)
    return tuple(names.values())


def converted(folder, model, dtype=None):
    """Return the tensors that a conversion of `folder` would write, in the names of `model`."""
    with ExitStack() as files:
        source = FolderSource(folder, "source", open_weights(folder, files))
        plan = plan_tensors(model, names_in_order(model), source, dtype, "source")
        runner = GroupRunner(model)
        found = {}
        for planned in plan.tensors:
            data = b"".join(bytes(piece) for piece in tensor_bytes(planned, runner))
            spec = planned.spec
            flat = torch.frombuffer(bytearray(data), dtype=TORCH_DTYPES[spec.dtype])
            found[spec.name] = flat.reshape(spec.shape)
    return found | {alias: found[name] for alias, name in plan.aliases}


def assert_same(found, model):
    wanted = model.state_dict()
    assert found.keys() == wanted.keys()
    assert [n for n, t in wanted.items() if found[n].dtype != t.dtype] == []
    assert [n for n, t in wanted.items() if not torch.equal(found[n], t)] == []


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_every_family_comes_out_as_from_pretrained_loads_it(tmp_path, family):
    make_source(tmp_path, family)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert_same(converted(tmp_path, model), model)


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_experts_are_stacked_by_copying_one_after_another(tmp_path, family):
    make_source(tmp_path, family, "bfloat16")
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    counts = []
    with ExitStack() as files:
        tensors = open_weights(tmp_path, files)
        for group in group_sources(model, tensors, "source").values():
            counts += [len(group.parts() or ())] if group.converter is not None else []
    assert counts == [4] * 4
    assert_same(converted(tmp_path, model), model)


def test_a_stack_of_experts_is_never_in_memory(tmp_path):
    class Streamed(MemoryTensor):
        def read_into(self, view):
            raise AssertionError("read as a whole")

    operations = [MergeModulelist(dim=0), Concatenate(dim=1)]
    converter = WeightConverter(["gate", "up"], "both", operations=operations)
    gates, ups = torch.arange(24.0).view(3, 2, 4), -torch.arange(12.0).view(3, 1, 4)
    sources: dict[str, list[SourceTensor]] = {
        name: [Streamed(name, tensor) for tensor in tensors]
        for name, tensors in (("gate", gates), ("up", ups))
    }
    group = Group("both", converter, sources)
    planned = PlannedTensor(TensorSpec("both", "F32", (3, 3, 4)), group)
    data = b"".join(bytes(piece) for piece in tensor_bytes(planned, GroupRunner(None)))
    found = torch.frombuffer(bytearray(data), dtype=torch.float32).view(3, 3, 4)
    assert torch.equal(found, torch.cat([gates, ups], dim=1))


@pytest.mark.parametrize(("family", "prefix"), [("gpt2", "transformer."), ("opt", "model."), ("llama", "model.")])  # fmt: skip
def test_a_checkpoint_of_the_base_model_is_understood(tmp_path, family, prefix):
    make_source(tmp_path, family, tie_word_embeddings=True)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    bare = {name.removeprefix(prefix): tensor for name, tensor in stored.items()}
    assert bare.keys() != stored.keys()
    save_file(bare, tmp_path / "model.safetensors")
    assert_same(converted(tmp_path, model), model)


@pytest.mark.parametrize(
    ("family", "leftovers"),
    [
        ("llama", ["model.layers.0.self_attn.rotary_emb.inv_freq"]),
        ("gpt2", ["h.0.attn.bias", "h.1.attn.masked_bias"]),
        ("gpt_neox", ["gpt_neox.layers.0.attention.bias", "gpt_neox.layers.0.attention.masked_bias"]),
    ],
)  # fmt: skip
def test_leftovers_that_transformers_knows_are_ignored(tmp_path, family, leftovers):
    make_source(tmp_path, family)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    save_file(stored | {name: torch.ones(4) for name in leftovers}, tmp_path / "model.safetensors")
    assert_same(converted(tmp_path, model), model)


def edited(folder, edit, family="llama", **overrides):
    """Make a source, let `edit` change its tensors, and return the model it should give."""
    make_source(folder, family, **overrides)
    model = AutoModelForCausalLM.from_pretrained(folder)
    stored = load_file(folder / "model.safetensors")
    edit(stored)
    save_file(stored, folder / "model.safetensors")
    return model


@pytest.mark.parametrize(
    ("edit", "problem"),
    [
        (lambda t: t.pop("model.norm.weight"), "lacks tensors of the model: model.norm.weight"),
        (lambda t: t.update(stray=torch.ones(1)), "no place for: stray"),
        (lambda t: t.update({"model.norm.weight": torch.ones(3)}), r"model.norm.weight has shape \(3,\), the model wants \(64,\)"),
        (lambda t: t.update({"norm.weight": torch.ones(64)}), "are both model.norm.weight"),
    ],
)  # fmt: skip
def test_tensors_that_do_not_fit_the_model_are_named(tmp_path, edit, problem):
    model = edited(tmp_path, edit)
    with pytest.raises(ConversionError, match=problem):
        converted(tmp_path, model)


@pytest.mark.parametrize(
    ("lost", "problem"),
    [
        ("experts.3.w", "experts.gate_up_proj has 3 parts, the model wants 4"),
        ("experts.3.w1", "gate_up_proj: can't be made of .*experts.0.w1"),
        ("w3", "gate_up_proj: can't be made of .*experts.0.w1"),
    ],
)
def test_experts_that_are_missing_are_named(tmp_path, lost, problem):
    def edit(tensors):
        for name in [name for name in tensors if lost in name and ".0.block" in name]:
            del tensors[name]

    model = edited(tmp_path, edit, "mixtral")
    with pytest.raises(ConversionError, match=problem):
        converted(tmp_path, model)


@pytest.mark.parametrize("part", ["w1", "w2"])
def test_an_expert_of_another_shape_is_named(tmp_path, part):
    name = f"model.layers.1.block_sparse_moe.experts.2.{part}.weight"

    def edit(tensors):
        tensors[name] = tensors[name][:-1].clone()

    model = edited(tmp_path, edit, "mixtral")
    with pytest.raises(ConversionError, match=rf"{name} has shape .*, the model wants"):
        converted(tmp_path, model)


def test_an_expert_that_is_transposed_is_named(tmp_path):
    name = "model.layers.1.block_sparse_moe.experts.2.w1.weight"

    def edit(tensors):
        tensors[name] = tensors[name].T.contiguous()

    model = edited(tmp_path, edit, "mixtral")
    with pytest.raises(ConversionError, match=rf"{name} has shape \(64, 128\) and .*w3"):
        converted(tmp_path, model)


def test_a_tied_tensor_may_be_stored_under_either_name(tmp_path):
    def edit(tensors):
        tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")

    model = edited(tmp_path, edit, "llama_tied")
    assert_same(converted(tmp_path, model), model)


def test_a_tied_tensor_may_be_stored_twice(tmp_path):
    def edit(tensors):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()

    model = edited(tmp_path, edit, "llama_tied")
    assert_same(converted(tmp_path, model), model)


@pytest.mark.parametrize("change", [torch.Tensor.neg, torch.Tensor.half])
def test_tied_tensors_that_differ_are_refused_with_what_to_do(tmp_path, change):
    def edit(tensors):
        tensors["lm_head.weight"] = change(tensors["model.embed_tokens.weight"])

    model = edited(tmp_path, edit, "llama_tied")
    with pytest.raises(ConversionError, match=r"differ.*set tie_word_embeddings to false"):
        converted(tmp_path, model)


def test_a_tensor_that_is_not_in_the_models_dtype_is_cast_to_it(tmp_path):
    def edit(tensors):
        tensors["model.norm.weight"] = tensors["model.norm.weight"].float()

    model = edited(tmp_path, edit, dtype="bfloat16")
    assert_same(converted(tmp_path, model), model)


def test_float8_tensors_are_kept_as_they_are(tmp_path):
    name = "model.layers.0.mlp.up_proj.weight"

    def edit(tensors):
        tensors[name] = tensors[name].to(torch.float8_e4m3fn)

    model = edited(tmp_path, edit)
    assert converted(tmp_path, model)[name].dtype == torch.float8_e4m3fn
    assert converted(tmp_path, model, "BF16")[name].dtype == torch.bfloat16


def test_parts_of_one_tensor_with_dtypes_that_do_not_join_are_refused(tmp_path):
    def edit(tensors):
        name = next(name for name in tensors if ".experts.1." in name)
        tensors[name] = tensors[name].to(torch.int8)

    model = edited(tmp_path, edit, "mixtral")
    with pytest.raises(ConversionError, match="would be made of F32 and I8"):
        converted(tmp_path, model)


def test_experts_of_several_float_dtypes_are_joined_in_the_models(tmp_path):
    def edit(tensors):
        name = next(name for name in tensors if ".experts.1." in name)
        tensors[name] = tensors[name].bfloat16().float().bfloat16()

    model = edited(tmp_path, edit, "mixtral")
    found = converted(tmp_path, model)
    assert {tensor.dtype for tensor in found.values()} == {torch.float32}


class KeepsNorm:
    """A model that keeps a module in fp32 when it runs in half precision."""

    def _get_dtype_plan(self, dtype):
        return {"norm.*": torch.float32} if dtype == torch.float16 else {}


def test_what_transformers_keeps_in_fp32_is_found_by_its_patterns():
    pattern = kept_in_fp32(KeepsNorm(), torch.float16)
    assert pattern is not None
    assert pattern.search("model.norm.weight")
    assert not pattern.search("model.head.weight")
    assert kept_in_fp32(KeepsNorm(), torch.float32) is None


def test_a_model_in_half_precision_keeps_in_fp32_what_transformers_keeps(tmp_path):
    make_source(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    model._keep_in_fp32_modules = {"norm"}
    found = converted(tmp_path, model, "F16")
    kept = {name for name, tensor in found.items() if tensor.dtype == torch.float32}
    assert kept == {name for name in found if "norm" in name}


def test_a_conversion_from_one_tensor_to_several_runs_once(tmp_path):
    class Counted(MemoryTensor):
        reads = 0

        def read_into(self, view):
            Counted.reads += 1
            super().read_into(view)

    from transformers.core_model_loading import WeightConverter

    from sllm_node.convert.mapping import Group

    converter = WeightConverter("qkv", ["q", "k"], operations=[Chunk(dim=0)])
    group = Group("m.q.weight", converter, {"qkv": [Counted("m.qkv.weight", torch.arange(4.0))]})
    assert group.outputs() == ["m.q.weight", "m.k.weight"]
    runner = GroupRunner(make_model("llama"))
    found = [runner.output(group, name).tolist() for name in group.outputs()]
    assert (found, Counted.reads) == ([[0.0, 1.0], [2.0, 3.0]], 1)
    with pytest.raises(ConversionError, match=r"v.weight: does not come out of m.qkv"):
        runner.output(group, "m.v.weight")


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_a_sharded_source_gives_the_same_checkpoint_as_a_single_file(tmp_path, family):
    options = ConvertOptions(chunk_bytes=4096, shard_bytes=64 * 1024)
    one = make_source(tmp_path / "one", family)
    many = make_source(tmp_path / "many", family, shard_size="100KB")
    assert len(list(many.glob("*.safetensors"))) > 2
    found = [convert(str(f), f.name, tmp_path / "store", options).index for f in (one, many)]
    assert found[0].shards == found[1].shards
    assert found[0].tensors == found[1].tensors


@pytest.mark.parametrize(
    ("shape", "problem"),
    [((2, 4), r"shape \(2, 3\), the model wants \(2, 4\)"), ((4, 3), r"the model wants \(4, 3\)")],
)
def test_a_conversion_that_gives_another_shape_than_the_models_is_refused(shape, problem):
    converter = WeightConverter("a", "b", operations=[Transpose()])
    group = Group("b", converter, {"a": [MemoryTensor("a", torch.ones(3, 2))]})
    planned = PlannedTensor(TensorSpec("b", "F32", shape), group)
    with pytest.raises(ConversionError, match=problem):
        list(tensor_bytes(planned, GroupRunner(make_model("llama"))))
