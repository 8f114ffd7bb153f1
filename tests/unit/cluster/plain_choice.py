"""The choice of a node as it was before it was bounded: every way on every node, then the rules. Slow, and plain.

What is quick now has to choose what this chooses.
"""

from sllm_node.cluster.candidate import Kind
from sllm_node.cluster.choice import Choice, _is_as_good, _queue
from sllm_node.cluster.placement import decide, explain, ways_on


def plain_choose(view, request, me, now, excluded=frozenset(), gain_s=None):
    """Return what `choose` returns."""
    decision = decide(view, request, now, may_move=gain_s is not None)
    best = getattr(decision, "best", None)
    if best is None or best.node in excluded or best.kind is Kind.MIGRATE:
        best = _best(explain(view, request, now), excluded, gain_s)
    if best is None:
        return _queue(view, request.model, me, excluded)
    if best.node != me and me not in excluded:
        mine = ways_on(view, request, me, now)
        there = best
        best = next((candidate for candidate in mine if _is_as_good(candidate, there)), best)
    return Choice(best.node, best.kind.name.lower(), best.reason, best)


def _best(candidates, excluded, gain_s):
    left = [candidate for candidate in candidates if candidate.node not in excluded]
    staying = [c for c in left if c.kind is not Kind.MIGRATE]
    best = min(staying, key=lambda candidate: candidate.key, default=None)
    if gain_s is None:
        return best
    ways = [c for c in left if c.kind is Kind.MIGRATE and _can_move(c, excluded)]
    moving = min(ways, key=lambda candidate: candidate.key, default=None)
    if moving is None or (best and moving.startup_s + gain_s > best.startup_s):
        return best
    if best and moving.key > best.key:  # no sooner, and no gain is asked for: this took it where
        return best  # some other way that is not allowed was sooner
    return moving


def _can_move(candidate, excluded):
    return not any(m.to.node in excluded or m.to.node == candidate.node for m in candidate.moves)
