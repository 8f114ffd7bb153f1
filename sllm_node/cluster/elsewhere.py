"""Models that this node does not have: which peers have them, and their tokenizers."""

from collections.abc import Awaitable, Callable
from typing import Generic

from sllm_node.cluster import shown
from sllm_node.cluster.peers import Peers
from sllm_node.cluster.retries import UNREACHABLE
from sllm_node.cluster.state import HeldModel
from sllm_node.cluster.texts import Texts
from sllm_node.core.clock import Clock
from sllm_node.core.types import ModelId, ModelStatus, NodeId
from sllm_node.schedule.ports import CodecT


class Elsewhere(Generic[CodecT]):
    """What the peers tell of models, those included that can't be asked now."""

    def __init__(
        self,
        peers: Peers,
        texts: Texts[CodecT],
        clock: Clock,
        changed: Callable[[float], Awaitable[bool]],
        patience_s: float,
    ) -> None:
        """`changed` waits for news of the cluster, at most so long, and tells whether there were any."""
        self.texts = texts
        self._peers = peers
        self._clock = clock
        self._changed = changed
        self._patience_s = patience_s

    def names(self) -> set[ModelId]:
        """Return the models of all nodes that tell of some."""
        names = {name for node in self._peers.view.nodes.values() for name in node.held}
        return names | {held.model for state in self._peers.absent() for held in state.models}

    def find(self, model: ModelId) -> tuple[HeldModel | None, list[NodeId]]:
        """Return the newest checkpoint of a model that peers have, and who has it.

        Of a model that only peers have which can't be asked now, they are those.
        """
        told = self._told(model) or self._told_by_absent(model)
        if not told:
            return None, []
        newest = max(held.created for held, _ in told)
        mine = [(held, name) for held, name in told if held.created == newest]
        return mine[0][0], [name for _, name in mine]

    def _told(self, model: ModelId) -> list[tuple[HeldModel, NodeId]]:
        return [
            (node.held[model], name)
            for name, node in sorted(self._peers.view.nodes.items())
            if name != self._peers.me and model in node.held
        ]

    def _told_by_absent(self, model: ModelId) -> list[tuple[HeldModel, NodeId]]:
        return [
            (held, state.node)
            for state in self._peers.absent()
            for held in state.models
            if held.model == model
        ]

    def status(self, model: ModelId) -> ModelStatus | None:
        """Return how a model of peers stands; None: they have none of that name."""
        held, _ = self.find(model)
        return None if held is None else shown.status_elsewhere(self._peers.view, held)

    def is_absent(self, model: ModelId, tokens: int) -> bool:
        """Tell whether only peers have a model that can't be asked now, or drain: who wants it may wait.

        `tokens`: where a session can't have so many does not count.
        """
        view = self._peers.view
        small = view.unfit(model, tokens)
        nodes = (node for name, node in view.nodes.items() if name not in small)
        if any(model in node.held and not node.state.is_draining for node in nodes):
            return False
        return self.find(model)[0] is not None

    def is_read(self, model: ModelId) -> bool:
        """Tell whether the tokenizer of a model of peers is here and read."""
        held, _ = self.find(model)
        return held is not None and self.texts.get_now(held) is not None

    def context_limit(self, model: ModelId, here: int | None) -> int | None:
        """Return how many tokens a session can have at the node where most fit; None: nobody has the model.

        `here`: at this node; None: it does not have it. Who can't be asked now counts if nobody else has it.
        """
        told = self._told(model)
        if not told and here is None:
            told = self._told_by_absent(model)
        if not told:
            return here
        most = max(held.context_tokens for held, _ in told)
        known = None if most else self.texts.get_now(told[0][0])  # an older release does not tell
        return max(known.context_tokens if known else most, here or 0)

    async def codec(self, model: ModelId) -> CodecT | None:
        """Return the codec of a model of peers, as patiently as a session waits for a node to run on.

        None: no peer has it, and each had the time to say so: a node that starts knows nobody.

        Raises:
            PeerUnreachableError: nobody who has it could be asked.
        """
        until = self._clock.now() + self._patience_s
        while True:
            held, holders = await self._heard(model)
            if held is None:
                return None
            try:
                return (await self.texts.get(held, holders)).codec
            except UNREACHABLE:
                left_s = until - self._clock.now()
                if left_s <= 0 or not await self._changed(left_s):
                    raise

    async def _heard(self, model: ModelId) -> tuple[HeldModel | None, list[NodeId]]:
        while (found := self.find(model))[0] is None and self._peers.is_listening():
            await self._changed(self._peers.listens_until - self._clock.now())
        return found
