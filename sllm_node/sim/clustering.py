"""Builds a simulated cluster: models in order of popularity, nodes, and what lies on NVMe at the start."""

import math

from sllm_node.core.types import ModelId
from sllm_node.sim.description import Description
from sllm_node.sim.hardware import Model, Node, make_node


def make_models(described: Description, *, is_encoded: bool) -> tuple[list[Model], list[float]]:
    """Return the models and how popular each is.

    Ranks go round the groups, so that every size has popular models and rare ones.
    """
    ranked = sorted(
        (i / group.count, place, i)
        for place, group in enumerate(described.models)
        for i in range(group.count)
    )
    models: list[Model] = []
    weights: list[float] = []
    for number, (_, place, i) in enumerate(ranked):
        group = described.models[place]
        stored = math.ceil(group.size * described.codec.ratio) if is_encoded else int(group.size)
        share = math.ceil((group.size + group.kv) / group.devices)
        models.append(
            Model(
                number, ModelId(f"{group.name}-{i}"), int(group.size), stored, share, group.devices,
                group.slots, group.prefill_s_per_token, group.prefill_s, group.token_s,
            )
        )  # fmt: skip
        weights.append(group.weight / (number + 1) ** described.popularity.zipf)
    return models, weights


def contexts(described: Description, models: list[Model]) -> list[int]:
    """Return the context of each model."""
    by_group = {group.name: group.context for group in described.models}
    return [by_group[model.id.rsplit("-", 1)[0]] for model in models]


def make_nodes(described: Description, models: list[Model], weights: list[float]) -> list[Node]:
    """Return the nodes with checkpoints spread over their NVMe.

    As in the paper: round-robin, popular models more often, until the room is used up; each at least
    `copies` times.
    """
    nodes = [make_node(group, i) for group in described.nodes for i in range(group.count)]
    total = sum(weights)
    room = sum(node.nvme.free for node in nodes)
    cursor = 0
    for model, weight in zip(models, weights, strict=True):
        wanted = int(room * weight / total / model.decoded)
        cursor = _spread(nodes, model, max(described.popularity.copies, wanted), cursor)
    return nodes


def _spread(nodes: list[Node], model: Model, copies: int, cursor: int) -> int:
    """Put copies of a model on the next nodes with room; return where to go on."""
    left = min(copies, len(nodes))
    for step in range(len(nodes)):
        if not left:
            break
        node = nodes[(cursor + step) % len(nodes)]
        if node.nvme.free >= model.decoded:
            node.nvme.add(model)
            left -= 1
    return (cursor + copies) % len(nodes)
