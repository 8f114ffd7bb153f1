"""Models that only peers have, made known to this node's store: their cards, and what `status` shows.

A card is made when a load here, or a pull, is decided, and not before: what peers have is in the view. It
shows while a peer that lives can send the rest, or while its model is in use here; else the model counts
as not being here, and requests for it wait for those who have it.
"""

import asyncio
import logging
from collections.abc import Callable
from typing import Any, Final

from sllm_node.checkpoint.cards import PEERS, TEXT_FILES
from sllm_node.checkpoint.catalog import Catalog
from sllm_node.checkpoint.given import index_digest
from sllm_node.checkpoint.index import INDEX_FILE, from_json
from sllm_node.cluster.files import PeerFiles, Sender
from sllm_node.cluster.peers import Peers
from sllm_node.cluster.senders import Version
from sllm_node.core.clock import Clock
from sllm_node.core.errors import ModelNotFoundError, RemoteError, SllmError, StorageWriteError
from sllm_node.core.names import is_model_name
from sllm_node.core.types import ModelId, NodeId
from sllm_node.schedule.estimate import MovingAverage
from sllm_node.store.remote import RemoteTier
from sllm_node.store.remote_fetch import INDEX_BYTES_MAX

log = logging.getLogger(__name__)

SETUP_S: Final = 0.1
"""What a load from a peer takes at least before its first byte, as placement counts it: a card is made."""
_RETRIES: Final = 4
_TEXT_BYTES_MAX: Final = 256 << 20


class Fetching:
    """The cards of peers' models."""

    def __init__(
        self,
        catalog: Catalog,
        tier: RemoteTier,
        files: PeerFiles,
        peers: Peers,
        clock: Clock,
        is_hosted: Callable[[ModelId], bool],
    ) -> None:
        """`is_hosted`: whether a model takes device memory here, or is on its way."""
        self._catalog = catalog
        self._tier = tier
        self._cards = tier.cards
        self._files = files
        self._peers = peers
        self._clock = clock
        self._is_hosted = is_hosted
        self._making: dict[ModelId, asyncio.Task[None]] = {}
        self._setup = MovingAverage(SETUP_S)

    def start(self) -> None:
        """Let the store load from peers."""
        self._files.open()
        threads = self._peers.cluster.limits.files_at_once
        self._tier.join(self._files, threads=threads, retries=_RETRIES, offers=self._offers)

    async def close(self) -> None:
        """Ask nobody any more; loads under way end with an error."""
        self._files.close()
        for task in self._making.values():
            task.cancel()
        await asyncio.gather(*self._making.values(), return_exceptions=True)

    @property
    def setup_s(self) -> float:
        """Return what a load from a peer takes before its first byte."""
        return round(max(SETUP_S, self._setup.value), 2)

    def is_here(self, model: str) -> bool:
        """Tell whether this node knows a model: on its disk, or by a card."""
        try:
            self._catalog.get(ModelId(model))
        except ModelNotFoundError:
            return False
        except SllmError:  # it lies here and is damaged, which is told where it is used
            return True
        return True

    async def ensure(self, model: str) -> None:
        """Know `model`: if it is not here, by a card that is made of a peer's.

        Raises:
            ModelNotFoundError: no peer has all of it.
            SllmError: nobody gave index and texts, or they can't be kept.
        """
        name = ModelId(model)
        if self.is_here(name):
            return
        task = self._making.get(name)
        if task is None:
            task = asyncio.create_task(self._make(name), name=f"card {model}")
            self._making[name] = task
            task.add_done_callback(lambda _: self._making.pop(name, None))
        await asyncio.shield(task)

    async def _make(self, model: ModelId) -> None:
        began = self._clock.now()
        failure: SllmError = ModelNotFoundError(model, self._catalog.models())
        if not is_model_name(model):  # a peer may tell of anything, and this becomes a folder
            raise failure
        for _, peer in self._files.senders.ranked(self._peers.view, model, None, began):
            try:
                await asyncio.to_thread(self._write, model, peer)
            except SllmError as error:
                failure = error
                continue
            self._setup.observe(self._clock.now() - began)
            self._peers.look()
            log.info("checkpoint of a peer", extra={"model": model, "peer": peer})
            return
        raise failure

    def _write(self, model: ModelId, peer: NodeId) -> None:
        """Make the card, in a thread; one of the same index keeps the bytes that have come."""
        where = f"{model}/{INDEX_FILE}"
        index, names = self._files.read_from(Sender(peer, ""), where, INDEX_BYTES_MAX)
        sender = Sender(peer, index_digest(from_json(index, f"node {peer}: {where}")))
        if any(name not in TEXT_FILES for name in names):
            raise RemoteError(PEERS, where, f"{peer} tells of texts that none may have: {names}")
        known = self._cards.root / model / INDEX_FILE
        try:
            if self._cards.remote_of(model) and known.is_file() and known.read_bytes() == index:
                self._cards.move(model, PEERS)
                return
            read = self._files.read_from
            texts = {name: read(sender, f"{model}/{name}", _TEXT_BYTES_MAX)[0] for name in names}
            self._cards.write(model, PEERS, {**texts, INDEX_FILE: index})
        except OSError as error:
            path = str(error.filename or known)
            raise StorageWriteError(path, error.strerror or str(error)) from error

    def _offers(self, model: ModelId) -> bool:
        """Tell whether a peers' card is of use; asked by threads, too."""
        return self._is_hosted(model) or bool(self._able(model))

    def _able(self, model: ModelId) -> list[NodeId]:
        """Return the peers that have all of a card's version."""
        index = self._cards.index_of(model)
        if index is None:
            return []
        found = self._files.senders.holders(self._peers.view, model, Version.of(index))
        return [peer for _, peer in found]

    def status(self) -> dict[str, Any]:
        """Return the cluster as `status` shows remotes: the cards, and who sends each."""
        shown = [m for m in self._cards.models() if self._cards.remote_of(m) == PEERS]
        last = self._files.last
        return {
            "name": PEERS, "url": "nodes of the cluster", "state": "ok", "problem": None,
            "models": shown, "not_offered": [],
            "senders": {m: sorted(self._able(m), key=lambda p: (p != last.get(m), p)) for m in shown},
        }  # fmt: skip
