"""Builds a transformers module without weights, and learns from a dry run what it will ask for.

The module stands on torch's meta device; weights come later, as views of the store's bytes. The dry
run is a forward pass of four tokens over nothing: it shows in which order the parameters are
needed, how many keys and values each layer keeps, and whether the architecture does anything that
our step loop would not do right.

Building a module changes globals of the process (default dtype, random state): never beside a step.
"""

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from torch.overrides import TorchFunctionMode
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, AutoModelForCausalLM
from transformers.initialization import no_init_weights
from typing_extensions import override

from sllm_node.core.errors import UnsupportedArchitectureError
from sllm_node.engine.attention import (
    ATTENTION,
    MASKED,
    AttentionCall,
    UnknownAttentionOptionError,
    attention_step,
)

BUILDING: Final = threading.Lock()
"""Held while a module is built or initialised: one at a time in this process."""
SUPPORTED: Final[tuple[str, ...]] = (
    "CohereForCausalLM", "DeepseekV2ForCausalLM", "DeepseekV3ForCausalLM", "Dots1ForCausalLM",
    "Ernie4_5_MoeForCausalLM", "FlexOlmoForCausalLM", "GPT2LMHeadModel", "GPTNeoXForCausalLM",
    "Gemma2ForCausalLM", "Gemma3ForCausalLM", "GemmaForCausalLM", "Glm4MoeForCausalLM",
    "Glm4MoeLiteForCausalLM", "GraniteForCausalLM", "GraniteMoeForCausalLM",
    "GraniteMoeSharedForCausalLM", "LlamaForCausalLM", "MiniMaxM2ForCausalLM",
    "MistralForCausalLM", "MixtralForCausalLM", "OPTForCausalLM", "Olmo2ForCausalLM",
    "OlmoeForCausalLM", "Phi3ForCausalLM", "PhiForCausalLM", "PhimoeForCausalLM",
    "Qwen2ForCausalLM", "Qwen2MoeForCausalLM", "Qwen3ForCausalLM", "Qwen3MoeForCausalLM",
    "SmolLM3ForCausalLM", "StableLmForCausalLM", "Starcoder2ForCausalLM",
)  # fmt: skip
"""Architectures whose tokens the tests compare with `generate()`."""

_STATIC_ROPE: Final = frozenset({"default", "linear", "llama3", "yarn"})
"""Rotary embeddings that depend on a token's own position only, not on the longest in the batch.
PhiMoE scales any but the default one by how long that is."""
_DRY_TOKENS: Final = 4
_EXPERTS: Final = "grouped_mm"
"""How mixtures of experts are computed: the tokens of a step sorted by expert, one product for each
expert that has some, the weights where they lie and the sums of a token in one order. Of what
transformers has, the only way that takes no memory for copies of experts and waits for no device."""

Model = Any
"""A transformers PreTrainedModel; its package is untyped here."""


@dataclass(frozen=True, slots=True)
class LayerShape:
    """What one attention layer keeps of each token."""

    kv_heads: int
    key_size: int
    value_size: int
    window: int | None = None
    """A token is looked at by itself and the `window - 1` tokens after it; None: by all."""


def read_config(directory: Path) -> Any:
    """Return the transformers config of the checkpoint in `directory`."""
    return AutoConfig.from_pretrained(str(directory), trust_remote_code=False)


def check_supported(config: Any, source: str) -> None:
    """Refuse what the step loop can't serve, as far as the config tells.

    Raises:
        UnsupportedArchitectureError: naming the architecture, and what about it is in the way.
    """
    name = architecture(config)
    if name not in SUPPORTED:
        raise UnsupportedArchitectureError(source, name, SUPPORTED)
    if name != (found := causal_class(config)):
        runs = found or "no causal language model"
        problem = f"a config of type {config.model_type}, which transformers runs as {runs}"
        raise UnsupportedArchitectureError(source, f"{name} with {problem}", SUPPORTED)
    for problem in _problems(config):
        raise UnsupportedArchitectureError(source, f"{name} with {problem}", SUPPORTED)


def architecture(config: Any) -> str:
    """Return the class name of the model that `config` describes, as transformers spells it."""
    found, names = causal_class(config), getattr(config, "architectures", None)
    if isinstance(names, list) and names:
        names = names[0]
    if not isinstance(names, str) or not names:
        return found or type(config).__name__
    # The hub has PhiMoEForCausalLM where transformers has PhimoeForCausalLM.
    return found if found and found.lower() == names.lower() else names


def causal_class(config: Any) -> str | None:
    """Return the name of the causal language model of `config`'s type, if it has one."""
    found = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    return None if found is None else str(found.__name__)


def build_skeleton(directory: Path) -> Model:
    """Return the module of the checkpoint in `directory`, on meta, with our attention.

    Raises:
        UnsupportedArchitectureError: our step loop can't serve it.
    """
    config = read_config(directory)
    check_supported(config, str(directory))
    model = build_module(config, ATTENTION)
    _serve_only(model.config)
    _check_layers(model, str(directory))
    return model


def _serve_only(config: Any) -> None:
    """Let the model of `config` compute logits our way and nothing else, whatever it asks for."""
    # There is no padding here; with a padding token some models look for it in every batch.
    config.pad_token_id = None
    # What training looks at: a loss to balance experts, the states of all layers.
    config.output_router_logits = False
    config.output_hidden_states = False
    config.return_dict = True
    config._experts_implementation = _EXPERTS  # noqa: SLF001 - what its own setter sets


def build_module(config: Any, attention: str | None = None) -> Model:
    """Return the causal language model that `config` describes, on meta, as transformers makes it.

    `attention` is an implementation that transformers knows; None: its default.
    """
    chosen = {} if attention is None else {"attn_implementation": attention}
    with BUILDING, torch.device("meta"), no_init_weights():
        model = AutoModelForCausalLM.from_config(
            config, dtype=config.dtype or torch.float32, **chosen
        )
    model.tie_weights()
    model.eval()
    return model


def forward_order(model: Model) -> tuple[str, ...]:
    """Return the tensors of `model` in the order in which the forward pass first needs them.

    Parameters and persistent buffers, by their names in `state_dict()`; of tied ones the name that
    comes first there. What the dry run does not touch (experts that it is not routed to) follows in
    the order of registration.
    """
    names = _names(model)
    recorder = _FirstUse(names)
    with recorder:
        _dry_run(model, _ShapeRecorder())
    return (*recorder.used, *(n for n in names.values() if n not in recorder.used))


def registration_order(model: Model) -> tuple[str, ...]:
    """Return the tensors of `model` in the order in which it was built; of tied ones the first."""
    return tuple(_names(model).values())


def _names(model: Model) -> dict[int, str]:
    names: dict[int, str] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        names.setdefault(id(tensor), name)
    return names


def layer_shapes(model: Model) -> tuple[LayerShape, ...]:
    """Return what each attention layer of `model` keeps of a token, first layer first."""
    recorder = _ShapeRecorder()
    _dry_run(model, recorder)
    return tuple(shape for _, shape in recorder.layers)


def common_window(shapes: Sequence[LayerShape]) -> int | None:
    """Return how many tokens the layer that looks back farthest sees; None: one sees all."""
    windows = [shape.window for shape in shapes if shape.window is not None]
    return max(windows) if len(windows) == len(shapes) else None


class _FirstUse(TorchFunctionMode):
    """Notes the order in which known tensors are first given to a torch function."""

    def __init__(self, names: dict[int, str]) -> None:
        super().__init__()
        self._names = names
        self.used: dict[str, None] = {}

    @override
    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: Sequence[Any] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        for argument in (*args, *(kwargs or {}).values()):
            name = self._names.get(id(argument))
            if name is not None:
                self.used.setdefault(name)
        return func(*args, **(kwargs or {}))


class _ShapeRecorder:
    """Answers attention calls with nothing, and notes what they asked for."""

    def __init__(self) -> None:
        self.layers: list[tuple[int, LayerShape]] = []

    def attend(self, call: AttentionCall) -> torch.Tensor:
        _, heads, key_size = call.key.shape
        shape = LayerShape(heads, key_size, call.value.shape[-1], call.window)
        self.layers.append((call.layer, shape))
        return call.query.new_empty(*call.query.shape[:2], call.value.shape[-1])


def _dry_run(model: Model, recorder: _ShapeRecorder, **inputs: torch.Tensor) -> None:
    ids = _dry_tokens()
    with torch.inference_mode(), attention_step(recorder), _experts_by_shape(model.config):
        model(input_ids=ids, position_ids=ids, use_cache=False, logits_to_keep=1, **inputs)


def _dry_tokens() -> torch.Tensor:
    return torch.zeros((1, _DRY_TOKENS), dtype=torch.long, device="meta")


@contextmanager
def _with_masks(config: Any) -> Iterator[None]:
    """Let the model of `config` build masks, from which its layers learn their windows."""
    config._attn_implementation = MASKED  # noqa: SLF001
    try:
        yield
    finally:
        config._attn_implementation = ATTENTION  # noqa: SLF001


@contextmanager
def _experts_by_shape(config: Any) -> Iterator[None]:
    """Let mixtures of experts run as batched products, the one way that needs no data."""
    config._experts_implementation = "batched_mm"  # noqa: SLF001
    try:
        yield
    finally:
        config._experts_implementation = _EXPERTS  # noqa: SLF001


def _check_layers(model: Model, source: str) -> None:
    """Refuse models that call our attention otherwise than once per layer, in order.

    Layers have the windows of their masks from then on.
    """
    name = type(model).__name__
    recorder = _ShapeRecorder()
    try:
        # With a mask for padding, of which there is none, nobody looks for sequences in positions.
        with _with_masks(model.config):
            _dry_run(model, recorder, attention_mask=torch.ones_like(_dry_tokens()))
    except UnknownAttentionOptionError as error:
        problem = f"{name} with attention option {error}"
        raise UnsupportedArchitectureError(source, problem, SUPPORTED) from error
    layers = [layer for layer, _ in recorder.layers]
    if layers != list(range(model.config.num_hidden_layers)):
        problem = f"{name} with attention in layers {layers}"
        raise UnsupportedArchitectureError(source, problem, SUPPORTED)


def _problems(config: Any) -> Iterable[str]:
    """Yield what a config asks for that would be served wrongly."""
    if getattr(config, "quantization_config", None):
        yield "quantised weights"
    for rope in _rope_types(config):
        if rope not in _STATIC_ROPE or (config.model_type == "phimoe" and rope != "default"):
            yield f"rotary embedding {rope!r}"
    if getattr(config, "is_causal", True) is False:
        yield "attention that is not causal"
    if getattr(config, "use_bidirectional_attention", False):
        yield "bidirectional attention"
    if getattr(config, "add_cross_attention", False):
        yield "cross attention"


def _rope_types(config: Any) -> list[str]:
    """Return the rotary embeddings named: one for all layers, or one per kind of layer."""
    parameters = getattr(config, "rope_parameters", None) or {}
    if "rope_type" in parameters:
        return [str(parameters["rope_type"])]
    nested = [p for p in parameters.values() if isinstance(p, dict)]
    return [str(p.get("rope_type", "default")) for p in nested]
