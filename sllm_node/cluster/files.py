"""The fetching side of files between peers: the whole cluster as one remote of this node's store.

The store knows it under one name (`checkpoint.cards.PEERS`) and reads it as any other remote, piece by
piece, with the index's digests. For each piece a sender is chosen anew, among the peers that have all of
that version: so when one dies, goes or is busy, another takes over in the middle of a load. The choice is
the event loop's, and so is making a request; bytes and their tags are the fetching threads'.
"""

import asyncio
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from threading import Event
from typing import Final, TypeVar

from sllm_node.checkpoint.cards import PEERS, Cards
from sllm_node.checkpoint.given import index_digest
from sllm_node.checkpoint.index import INDEX_FILE, TensorIndex
from sllm_node.cluster.file_link import Answer, Call, Links
from sllm_node.cluster.file_messages import RANGE_BYTES, AskFile, FileHead, FileRefused
from sllm_node.cluster.packing import pack
from sllm_node.cluster.peers import Peers
from sllm_node.cluster.senders import BUSY_S, Senders, Version
from sllm_node.cluster.trust import Trust
from sllm_node.core.clock import Clock
from sllm_node.core.errors import (
    PeerUnreachableError,
    RemoteError,
    RemoteUnreachableError,
    SllmError,
)
from sllm_node.core.metrics import Metrics
from sllm_node.core.types import ModelId, NodeId

_BUSY_MAX: Final = 1000
"""Times in a row that peers may be busy, with `BUSY_S` in between."""
_LOOP_S: Final = 10.0
"""A thread waits so long for the event loop."""
_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class Sender:
    """Whom to ask for a file, and for which version."""

    peer: NodeId
    digest: str
    """Of the index; empty: whatever it has."""
    wait_s: float = 0.0
    """It is busy, and so are all others."""


class PeerFiles:
    """The files of all peers, as `store.remote_fetch.Files`; `open` and `close` on the event loop."""

    def __init__(
        self, cards: Cards, peers: Peers, trust: Trust, clock: Clock, metrics: Metrics
    ) -> None:
        self.name = PEERS
        self.senders = Senders(peers.me)
        self.last: dict[ModelId, NodeId] = {}
        """Whom each model's bytes were asked of last."""
        self._cards = cards
        self._peers = peers
        self._trust = trust
        self._clock = clock
        self._received = metrics.files_received_bytes
        self._links = Links(trust.client_tls, peers.cluster.timing.dead_s)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._digests: dict[ModelId, tuple[TensorIndex, str]] = {}
        self._closed = Event()

    def open(self) -> None:
        """Let threads ask."""
        self._loop = asyncio.get_running_loop()

    def close(self) -> None:
        """Ask nobody any more."""
        self._loop = None
        self._closed.set()
        self._links.close()

    # --- in threads ---------------------------------------------------------------------------

    def models(self) -> tuple[str, ...]:
        """Return nothing: cards are made when they are needed (`cluster.fetching`)."""
        return ()

    def read_all(self, path: str, limit: int, stop: Event) -> bytes:
        """Return a whole file, of the version of the model's card.

        Raises:
            RemoteError: it can't be had, or is larger than `limit`.
        """
        model, _, name = path.partition("/")
        sender = self._on_loop(partial(self._choose, ModelId(model), path))
        digest = "" if name == INDEX_FILE else sender.digest
        return self.read_from(Sender(sender.peer, digest), path, limit, stop)[0]

    def read_from(
        self, sender: Sender, path: str, limit: int, stop: Event | None = None
    ) -> tuple[bytes, tuple[str, ...]]:
        """Return a whole file that `sender` has; with an index, the names of its texts.

        Raises:
            RemoteError: it can't be had, or is larger than `limit`.
        """
        data, total, busy = bytearray(), 1, 0
        texts: tuple[str, ...] = ()
        while len(data) < total:
            with self._asked(sender, path, len(data), RANGE_BYTES) as answer:
                if answer is None:
                    (stop or self._closed).wait(BUSY_S)
                    busy = self._still_busy(busy, path)
                    continue
                assert isinstance(answer.head, FileHead)
                total, texts = answer.head.total, answer.head.texts
                if not 0 < answer.head.size <= RANGE_BYTES or total > limit:
                    raise RemoteError(self.name, path, f"has more than {limit} bytes")
                piece = memoryview(bytearray(answer.head.size))
                for _ in answer.into(piece):
                    pass
                data += piece
        return bytes(data), texts

    def read_some(self, path: str, view: memoryview, offset: int, stop: Event) -> Iterator[int]:
        """Fill `view` from byte `offset` of a file; yield how many bytes came each time.

        Raises:
            RemoteError: the rest can't be had now.
        """
        model, done, busy = ModelId(path.partition("/")[0]), 0, 0
        while done < len(view) and not stop.is_set():
            piece = view[done : done + RANGE_BYTES]
            sender = self._on_loop(partial(self._choose, model, path))
            if sender.wait_s and stop.wait(sender.wait_s):
                return
            with self._asked(sender, path, offset + done, len(piece)) as answer:
                if answer is None:
                    busy = self._still_busy(busy, path)
                    continue
                for count in answer.into(piece):
                    self._received.labels(sender.peer).inc(count)
                    done += count
                    yield count
                    if stop.is_set():
                        return
            busy = 0

    def _still_busy(self, times: int, path: str) -> int:
        if times == _BUSY_MAX:
            raise RemoteUnreachableError(self.name, path, "all senders send to others")
        return times + 1

    @contextmanager
    def _asked(self, sender: Sender, path: str, first: int, size: int) -> Iterator[Answer | None]:
        """Ask one peer and give its answer; None: it is busy. What goes wrong is the peer's fault."""
        model, _, name = path.partition("/")
        ask = AskFile(model, name, sender.digest, first, size)
        call = self._on_loop(partial(self._call, ask, sender.peer, path))
        try:
            with self._links.ask(call) as answer:
                told = answer.head
                if isinstance(told, FileRefused) and told.reason != "busy":
                    raise PeerUnreachableError(sender.peer, f"it refuses the file: {told.reason}")
                if isinstance(told, FileRefused):
                    self._on_loop(partial(self._note_busy, sender.peer))
                yield None if isinstance(told, FileRefused) else answer
        except RemoteError:
            raise
        except SllmError as error:
            self._on_loop(partial(self._note_failed, sender.peer))
            raise RemoteUnreachableError(self.name, path, str(error)) from error

    def _on_loop(self, act: Callable[[], _T]) -> _T:
        """Return what `act` returns on the event loop.

        Raises:
            RemoteUnreachableError: this node leaves, or its event loop stands.
        """
        done: Future[_T] = Future()

        def run() -> None:
            try:
                done.set_result(act())
            except BaseException as error:  # noqa: BLE001 - raised in the thread
                done.set_exception(error)

        loop = self._loop
        if loop is None:
            raise RemoteUnreachableError(self.name, "files", "this node leaves the cluster")
        try:
            loop.call_soon_threadsafe(run)
            return done.result(_LOOP_S)
        except TimeoutError as error:
            problem = f"this node's event loop did not answer for {_LOOP_S:.0f} s"
            raise RemoteUnreachableError(self.name, "files", problem) from error

    # --- on the event loop --------------------------------------------------------------------

    def digest_of(self, model: ModelId, index: TensorIndex) -> str:
        """Return the digest of a card's index."""
        known = self._digests.get(model)
        if known is None or known[0] is not index:
            known = self._digests[model] = (index, index_digest(index))
        return known[1]

    def _choose(self, model: ModelId, path: str) -> Sender:
        """Return whom to ask for bytes of the model's card now."""
        index = self._cards.index_of(model)
        if index is None:
            raise RemoteUnreachableError(self.name, path, "its card is gone")
        version, now = Version.of(index), self._clock.now()
        found = self.senders.ranked(self._peers.view, model, version, now)
        if not found:
            is_there = self.senders.holders(self._peers.view, model, version)
            problem = "no node that lives has all of it"
            if is_there:
                problem = "no node gives it at the moment"
            raise RemoteUnreachableError(self.name, path, problem)
        wait_s, peer = found[0]
        self.last[model] = peer
        return Sender(peer, self.digest_of(model, index), wait_s)

    def _call(self, ask: AskFile, peer: NodeId, path: str) -> Call:
        address = self._peers.address(peer)
        if address is None or self._loop is None:
            raise RemoteUnreachableError(self.name, path, f"{peer} is not in the cluster any more")
        return Call(peer, address, self._trust.send(pack(ask), peer))

    def _note_busy(self, peer: NodeId) -> None:
        self.senders.is_busy(peer, self._clock.now())

    def _note_failed(self, peer: NodeId) -> None:
        self.senders.failed(peer, self._clock.now())
