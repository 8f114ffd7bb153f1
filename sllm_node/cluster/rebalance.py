"""Which requests that wait on a node are given back, since another node has places. Pure.

A request is placed where it starts soonest by what is known then. Later a place may be free elsewhere while
it still waits here, behind others or for another model's turn. So who has waited for `after_s` (noise of a
moment moves nobody) goes back to its entry and is placed anew, the longest waiting first; but of the places
that others have free, and where it fits, at most half (one at least) are counted on, as all who are overfull
see the same ones.
Who waits for a load under way stays: its work would be lost. Sessions that run are not touched, nor those
that move here and run elsewhere meanwhile: they move for a drain, an operator, or to make room (`vacate`).
"""

from collections import Counter
from collections.abc import Iterable
from collections.abc import Set as AbstractSet
from dataclasses import dataclass

from sllm_node.cluster.view import ClusterView
from sllm_node.core.types import ModelId, NodeId, SessionId, Weights


@dataclass(frozen=True, slots=True)
class Waiter:
    """A session that waits here."""

    session: SessionId
    model: ModelId
    waited_s: float
    tokens: int = 0
    """For so many a node must have room."""
    weights: Weights | None = None
    """What it began with elsewhere."""


def given_back(
    view: ClusterView, me: NodeId, waiters: Iterable[Waiter], after_s: float,
    kept: AbstractSet[ModelId] = frozenset(),
) -> list[SessionId]:  # fmt: skip
    """Return who is to be placed anew; not those of the models in `kept`."""
    chosen: list[SessionId] = []
    given: Counter[ModelId] = Counter()
    free: dict[tuple[ModelId, AbstractSet[NodeId]], int] = {}
    for waiter in sorted(waiters, key=lambda one: (-one.waited_s, one.session)):
        model = waiter.model
        if waiter.waited_s < after_s or model in kept:
            continue
        excluded = view.unfit(model, waiter.tokens, waiter.weights) | {me}
        if (model, excluded) not in free:
            free[model, excluded] = places(view, model, excluded)
        if given[model] < (free[model, excluded] + 1) // 2:
            given[model] += 1
            chosen.append(waiter.session)
    return chosen


def places(view: ClusterView, model: ModelId, excluded: AbstractSet[NodeId]) -> int:
    """Return how many sessions of a model other nodes than these could take at once."""
    return sum(
        max(0, replica.free_slots)
        for name in view.resident(model)
        if name not in excluded and not view.nodes[name].state.is_draining
        for replica in view.nodes[name].by_model[model]
        if replica.ready_s <= 0 and not replica.is_leaving
    )
