"""Nodes that die and come back, and disks that are slow for a while."""

from dataclasses import replace
from typing import TYPE_CHECKING, Final

import numpy as np

from sllm_node.sim.description import Description
from sllm_node.sim.hardware import Node

if TYPE_CHECKING:
    from sllm_node.sim.simulation import Simulation

_HOUR_S: Final = 3600.0


class Faults:
    """The faults of a simulation."""

    def __init__(self, simulation: "Simulation", described: Description, seed: int) -> None:
        self._simulation = simulation
        self._described = described
        self._rng = np.random.default_rng([seed, 5])

    def plan(self, until_s: float) -> None:
        """Push all faults: those of the file, then those drawn at random."""
        nodes = {str(node.id): node for node in self._simulation.nodes.values()}
        for fault in self._described.faults:
            node = nodes[fault.node]
            if fault.slow_nvme is None:
                self._simulation.push(fault.at_s, self._crash, node, fault.lasts_s)
                continue
            self._simulation.push(fault.at_s, self._slow, node, fault.slow_nvme)
            self._simulation.push(fault.at_s + fault.lasts_s, self._slow, node, 1 / fault.slow_nvme)
        chaos = self._described.chaos
        if not chaos.crashes_per_node_hour:
            return
        for node in nodes.values():
            at = 0.0
            while (
                at := at + float(self._rng.exponential(_HOUR_S / chaos.crashes_per_node_hour))
            ) < until_s:
                self._simulation.push(at, self._crash, node, chaos.restart_s)

    def _slow(self, node: Node, factor: float) -> None:
        node.rates = replace(node.rates, nvme=node.rates.nvme * factor)
        self._simulation.journal.note(self._simulation.now, "nvme", node.id, f"{factor:g}")

    def _crash(self, node: Node, lasts_s: float) -> None:
        simulation = self._simulation
        if not node.is_up:
            return
        simulation.journal.note(simulation.now, "crash", node.id)
        node.is_up = False
        replicas = list(node.replicas.values())
        lost = [session for r in replicas for session in (*r.sessions.values(), *r.waiting)]
        followers = [target for replica in replicas for target in replica.followers]
        for replica in replicas:
            replica.waiting.clear()
            simulation.loading.forget(replica)
        node.dram.clear()
        for device in node.devices:
            device.free, device.link_until = device.total, 0.0
        node.nvme_until = node.link_until = node.sends_until = 0.0
        simulation.changed(node)
        for session in lost:
            simulation.interrupt(session, keeps_tokens=simulation.mechanisms.resume)
        for session in lost:
            simulation.place(session)
        for target in followers:
            simulation.mover.go_on(target)
        for replica in replicas:
            for moving in replica.leaving:
                simulation.mover.return_places(moving)
        simulation.push(simulation.now + lasts_s, self._restart, node)

    def _restart(self, node: Node) -> None:
        node.is_up = True
        node.boot += 1
        self._simulation.journal.note(self._simulation.now, "restart", node.id)
        self._simulation.changed(node)
        self._simulation.retry()
