"""One run after another: policies by name, each over the same requests and the same cluster."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, TextIO

from sllm_node.sim.clustering import contexts, make_models, make_nodes
from sllm_node.sim.description import Description
from sllm_node.sim.journal import Journal
from sllm_node.sim.ours import Ours
from sllm_node.sim.paper import ServerlessLLM, Shepherd
from sllm_node.sim.plain import LeastLoaded, Serverless
from sllm_node.sim.policy import Mechanisms, Policy
from sllm_node.sim.preempting import OursPreempting
from sllm_node.sim.report import Report, make_report
from sllm_node.sim.simulation import Simulation
from sllm_node.sim.trace import Row, arrivals

_ALL: Final = Mechanisms(codec=True, peers=True, clone=True, keep_alive=True, resume=True)
_PAPER: Final = Mechanisms()
MECHANISMS: Final = {
    "own": None,
    "paper": _PAPER,
    "keep": Mechanisms(keep_alive=True),
    "ours": _ALL,
}
"""What nodes can do: each policy's own; or the same for all: the paper's, with keep-alive, ours."""


@dataclass(frozen=True, slots=True)
class Contestant:
    """A policy and the mechanisms of its nodes."""

    make: Callable[[Simulation, int], Policy]
    mechanisms: Mechanisms
    what: str


CONTESTANTS: Final = {
    "ours": Contestant(lambda s, _: Ours(s), _ALL, "this project"),
    "ours-without-moves": Contestant(
        lambda s, _: Ours(s, may_move=False), _ALL, "ours, but running sessions stay where they are"
    ),
    "ours-preempting": Contestant(
        lambda s, _: OursPreempting(s), _ALL, "ours, but running sessions are stopped, not moved"
    ),
    "serverlessllm": Contestant(lambda s, _: ServerlessLLM(s), _PAPER, "the paper's"),
    "shepherd": Contestant(lambda s, _: Shepherd(s), _PAPER, "locality and preemption"),
    "serverless": Contestant(Serverless, _PAPER, "a random free device"),
    "least-loaded": Contestant(lambda s, _: LeastLoaded(s), _PAPER, "the least loaded node"),
}


def run(
    described: Description, rows: Sequence[Row], name: str, seed: int, events: TextIO | None = None,
    mechanisms: Mechanisms | None = None,
) -> Report:  # fmt: skip
    """Simulate one policy, with its own mechanisms or the given ones, and return what came of it."""
    contestant = CONTESTANTS[name]
    mechanisms = mechanisms or contestant.mechanisms
    models, weights = make_models(described, is_encoded=mechanisms.codec)
    nodes = make_nodes(described, models, weights)
    journal = Journal(events)
    simulation = Simulation(described, models, nodes, mechanisms, seed, journal)
    requests = arrivals(rows, weights, contexts(described, models), seed)
    simulation.run(contestant.make(simulation, seed), requests)
    return make_report(name, seed, journal, described.limits.startup_s)
