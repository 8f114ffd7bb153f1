"""Steps of Llama's kind of model without its module's forward pass: few launches a layer.

Theory of operation. transformers' forward pass of one token launches some forty small kernels a layer,
each of which takes longer to start than to run. Here a layer is six operations (`decode_ops`): norm and
q, k, v; rotation and KV write; attention; o with residual; norm and gated unit; down with residual. The
module stays the owner of all weights; `FusedDecoder.of` finds them by the structure of its class, and
returns None for classes that do anything else. Rotary angles come from the module's own rotary
embedding, so that scaled ones are right.

All tensors of a decode step have fixed places, `Scratch`, so that a CUDA graph can be captured of it;
steps with pieces of prompts (`mixed`) bring their own.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

import torch

from sllm_node.engine.decode_kernels import (
    Angles,
    GatedUnit,
    Heads,
    KvSlots,
    Matrix,
    RmsNorm,
)
from sllm_node.engine.decode_ops import DecodeOps, FusedLayer, Linear
from sllm_node.engine.kv import KvCache
from sllm_node.engine.paged_attention import KvTables, Scoring
from sllm_node.engine.skeleton import LayerShape

_PLAIN: Final = frozenset({
    "LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM",
    "Phi3ForCausalLM", "GemmaForCausalLM",
})  # fmt: skip
"""Classes whose layers are what this module computes, and nothing else."""
_GELU: Final = frozenset({"gelu_pytorch_tanh", "gelu_new"})


@dataclass(frozen=True, slots=True)
class DecodeInputs:
    """What a step of R rows is told, one token a session; rows without a session have length 0."""

    ids: torch.Tensor  # (R,) int32
    positions: torch.Tensor  # (R,) int32
    slots: torch.Tensor  # (R,) int32, -1 for rows without a session
    tables: torch.Tensor  # (R, blocks) int32
    lengths: torch.Tensor  # (R,) int32, with the new token


@dataclass(frozen=True, slots=True)
class Scratch:
    """Memory of a step of R rows; one layer uses it after the other."""

    hidden: torch.Tensor  # (R, hidden)
    packed: torch.Tensor  # (R, (heads + 2 kv heads) * size): queries, keys, values
    attended: torch.Tensor  # (R, heads * size)
    gated: torch.Tensor  # (R, inner size of the gated unit)
    logits: torch.Tensor  # (R, vocabulary)


Tokens = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""Of T tokens: ids, positions, and slots of int32."""
Piece = Callable[[], object]
Attend = Callable[[int, FusedLayer, torch.Tensor, torch.Tensor], None]
"""For the layer of a number, with keys and values in the cache: sets what is attended to by queries.
Both are the same tensors for all layers of a step."""


class FusedDecoder:
    """The steps of one module."""

    def __init__(self, model: Any, layers: Sequence[FusedLayer], ops: DecodeOps) -> None:
        self._embedding = model.model.embed_tokens
        self._rotary = model.model.rotary_emb
        self._layers = tuple(layers)
        self._norm = _norm(model.model.norm)
        self._head = _linear(model.lm_head)
        self.ops = ops

    @classmethod
    def of(cls, model: Any, shapes: Sequence[LayerShape], ops: DecodeOps) -> "FusedDecoder | None":
        """Return the decoder of a module whose weights are bound; None: it is of another kind.

        `shapes`: what its layers keep, as the dry run has found.
        """
        if type(model).__name__ not in _PLAIN or len(_devices(model)) != 1:
            return None
        pairs = zip(model.model.layers, shapes, strict=True)
        layers = [_layer(layer, shape) for layer, shape in pairs]
        whole = [layer for layer in layers if layer is not None and ops.takes(layer)]
        alike = {(layer.heads, layer.kv_heads, layer.head_size) for layer in whole}
        is_whole = len(whole) == len(layers) and len(alike) == 1
        return cls(model, whole, ops) if is_whole else None

    def widths(self) -> tuple[int, ...]:
        """Return how many numbers a row has in each tensor of `Scratch`."""
        layer = self._layers[0]
        queries, keys = layer.heads * layer.head_size, layer.kv_heads * layer.head_size
        hidden, inner = self._embedding.weight.shape[1], layer.unit.gate.shape[0]
        return (hidden, queries + 2 * keys, queries, inner, self.vocabulary)

    @property
    def vocabulary(self) -> int:
        """Logits of a row."""
        return int(self._head[0].shape[0])

    @property
    def heads(self) -> int:
        """Query heads of a layer."""
        return self._layers[0].heads

    @property
    def has_windows(self) -> bool:
        """Whether any layer looks at a window only."""
        return any(layer.scoring.window is not None for layer in self._layers)

    @property
    def dtype(self) -> torch.dtype:
        """Of weights and scratch memory."""
        dtype: torch.dtype = self._head[0].dtype
        return dtype

    def step(
        self, inputs: DecodeInputs, cache: KvCache, block_tokens: int, memory: Scratch
    ) -> torch.Tensor:
        """Return the logits of each row, (R, vocabulary); keys and values go to the cache."""

        def attend(
            number: int, layer: FusedLayer, query: torch.Tensor, attended: torch.Tensor
        ) -> None:
            keys, values = cache.keys[number], cache.values[number]
            tables = KvTables(keys, values, inputs.tables, inputs.lengths, block_tokens)
            self.ops.attend(query, tables, layer.scoring, attended)

        tokens = (inputs.ids, inputs.positions, inputs.slots)
        self.run(self.pieces(tokens, cache, memory), memory, attend)
        self._logits(memory.hidden, memory.logits)
        return memory.logits

    def pieces(self, inputs: Tokens, cache: KvCache, memory: Scratch) -> list[Piece]:
        """Return what a step does before, between and behind the attentions of its layers.

        Each has to run once in turn. All read and write the same addresses every time, but for what
        they allocate; the first makes rotary angles, which stay while any of them does.
        """
        angles: list[Angles] = []

        def begin() -> None:
            memory.hidden.copy_(self._embedding(inputs[0]))
            rotary = self._rotary(memory.hidden[None], position_ids=inputs[1][None])
            angles[:] = [Angles(rotary[0][0], rotary[1][0])]

        def piece(number: int) -> None:
            begin() if number == 0 else self._leave(self._layers[number - 1], memory)
            if number < len(self._layers):
                kept = KvSlots(cache.keys[number], cache.values[number], inputs[2])
                self._enter(self._layers[number], angles[0], kept, memory)

        return [partial(piece, number) for number in range(len(self._layers) + 1)]

    def run(self, pieces: Sequence[Piece], memory: Scratch, attend: Attend) -> None:
        """Bring a step's tokens through all layers, in `memory.hidden`."""
        heads, size = self.heads, self._layers[0].head_size
        query = memory.packed[:, : heads * size].view(-1, heads, size)
        attended = memory.attended.view(query.shape)
        for number, layer in enumerate(self._layers):
            pieces[number]()
            attend(number, layer, query, attended)
        pieces[-1]()

    def logits_of(self, memory: Scratch, rows: torch.Tensor) -> torch.Tensor:
        """Return the logits of some `rows` of a step that has run."""
        logits = memory.logits.new_empty(len(rows), self.vocabulary)
        self._logits(memory.hidden.index_select(0, rows), logits)
        return logits

    def scratch(self, tokens: int, attending: int, device: torch.device) -> Scratch:
        """Return memory for so many tokens, without logits.

        `attending`: rows for queries and what they see, the tokens' first; at least as many.
        """
        counts = (tokens, attending, attending, tokens, 0)
        made = [
            torch.empty(count, width, dtype=self.dtype, device=device)
            for count, width in zip(counts, self.widths(), strict=True)
        ]
        return Scratch(*made)

    def _enter(self, layer: FusedLayer, angles: Angles, kept: KvSlots, memory: Scratch) -> None:
        """Compute queries, keys and values of a layer, rotate them; keep keys and values."""
        counts = (layer.heads, layer.kv_heads, layer.kv_heads)
        sizes = [count * layer.head_size for count in counts]
        outputs = torch.split(memory.packed[: len(memory.hidden)], sizes, 1)
        matrices = [
            Matrix(weight, output, bias)
            for (weight, bias), output in zip(layer.qkv, outputs, strict=True)
        ]
        self.ops.linear(memory.hidden, matrices, norm=layer.attention_norm)
        query, key, value = (
            output.view(-1, count, layer.head_size)
            for output, count in zip(outputs, counts, strict=True)
        )
        self.ops.rotate_and_keep(Heads(query, key, value), angles, kept, layer.head_norms)

    def _leave(self, layer: FusedLayer, memory: Scratch) -> None:
        """Compute what follows the attention of a layer."""
        hidden, attended = memory.hidden, memory.attended[: len(memory.hidden)]
        weight, bias = layer.out
        self.ops.linear(attended, [Matrix(weight, hidden, bias)], residual=hidden)
        self.ops.gated_linear(hidden, layer.unit, memory.gated, layer.unit_norm)
        weight, bias = layer.down
        self.ops.linear(memory.gated, [Matrix(weight, hidden, bias)], residual=hidden)

    def _logits(self, hidden: torch.Tensor, logits: torch.Tensor) -> None:
        weight, bias = self._head
        self.ops.linear(hidden, [Matrix(weight, logits, bias)], norm=self._norm)


# --- where a module keeps its weights -----------------------------------------------------------


def _layer(layer: Any, shape: LayerShape) -> FusedLayer | None:
    """Return the weights of a layer; None: it has something that is not computed here."""
    attention, mlp = layer.self_attn, layer.mlp
    qkv, unit = _qkv(attention), _unit(mlp)
    if unit is None or shape.key_size != shape.value_size:
        return None
    size = shape.key_size
    norms = (attention.q_norm, attention.k_norm) if hasattr(attention, "q_norm") else None
    return FusedLayer(
        attention_norm=_norm(layer.input_layernorm),
        qkv=qkv,
        head_norms=None if norms is None else (_norm(norms[0]), _norm(norms[1])),
        out=_linear(attention.o_proj),
        unit_norm=_norm(layer.post_attention_layernorm),
        unit=unit,
        down=_linear(mlp.down_proj),
        heads=qkv[0][0].shape[0] // size,
        kv_heads=shape.kv_heads,
        head_size=size,
        scoring=Scoring(attention.scaling, shape.window),
    )


def _qkv(attention: Any) -> tuple[Linear, Linear, Linear]:
    if not hasattr(attention, "qkv_proj"):
        q, k, v = (_linear(getattr(attention, f"{name}_proj")) for name in "qkv")
        return q, k, v
    weight, bias = _linear(attention.qkv_proj)
    keys = attention.num_key_value_heads * attention.head_dim
    sizes = [weight.shape[0] - 2 * keys, keys, keys]
    weights = torch.split(weight, sizes)
    biases = (None, None, None) if bias is None else torch.split(bias, sizes)
    q, k, v = zip(weights, biases, strict=True)
    return q, k, v


def _unit(mlp: Any) -> GatedUnit | None:
    activation = mlp.config.hidden_act
    if activation not in {"silu", *_GELU}:
        return None
    if hasattr(mlp, "gate_up_proj"):
        weight, one = _linear(mlp.gate_up_proj)
        (gate, up), two = weight.chunk(2), None
    else:
        (gate, one), (up, two) = _linear(mlp.gate_proj), _linear(mlp.up_proj)
    if one is not None or two is not None:
        return None
    return GatedUnit(gate, up, gelu=activation in _GELU)


def _norm(module: Any) -> RmsNorm:
    if type(module).__name__ == "GemmaRMSNorm":
        return RmsNorm(module.weight, module.eps, offset=1.0)
    return RmsNorm(module.weight, module.variance_epsilon)


def _linear(module: Any) -> Linear:
    return module.weight, module.bias


def _devices(model: Any) -> set[torch.device]:
    return {parameter.device for parameter in model.parameters()}
