"""Fetches ranges of a remote's files straight into memory: pieces side by side, each tried again.

A range is cut into pieces, which the remote's own threads fetch at the same time: one connection
rarely fills a link, and `fetch_threads` is then the limit of a remote, whatever asks it. A piece
that was cut off goes on where it ended. What came is checked against the index before anybody may
use it; bytes that stay wrong mean that the remote has another checkpoint now, or a damaged one.
"""

from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass
from threading import Event
from typing import Final, Protocol

from sllm_node.checkpoint.catalog import Checkpoint
from sllm_node.checkpoint.digest import chunk_digest
from sllm_node.checkpoint.index import INDEX_FILE, from_json
from sllm_node.core.errors import (
    CheckpointFormatError,
    RemoteChangedError,
    RemoteChecksumError,
    RemoteError,
    RemoteNotFoundError,
    RemoteUnreachableError,
    SllmError,
)
from sllm_node.core.metrics import Metrics
from sllm_node.core.types import ModelId
from sllm_node.store.remote_transport import backoff_s

PIECE_BYTES: Final = 4 << 20
"""Of one request: long enough for a connection to get to its speed, short enough to be many."""
INDEX_BYTES_MAX: Final = 1 << 30


class Files(Protocol):
    """The files of one remote; `store.remote_transport` has them over HTTP and S3."""

    name: str

    def read_all(self, path: str, limit: int, stop: Event) -> bytes: ...

    def read_some(self, path: str, view: memoryview, offset: int, stop: Event) -> Iterable[int]: ...

    def models(self) -> tuple[str, ...]: ...


class Remote:
    """One remote: its files, its threads, its counts."""

    def __init__(self, files: Files, *, threads: int, retries: int, metrics: Metrics) -> None:
        self.name = files.name
        self.files = files
        self.on_changed: Callable[[ModelId], None] = lambda model: None
        """Called, in any thread, before an error tells that the remote has another checkpoint."""
        self._retries = retries
        self._threads = ThreadPoolExecutor(threads, f"sllm-fetch-{files.name}")
        self._bytes = metrics.remote_bytes.labels(files.name)
        self._retried = metrics.remote_retries.labels(files.name)
        self._failures = metrics.remote_failures

    def fetch(
        self, checkpoint: Checkpoint, shard: int, view: memoryview, offset: int, stop: Event
    ) -> None:
        """Fill `view` with whole file chunks of `shard` from byte `offset`, checked.

        Raises:
            InterruptedError: `stop` was set.
            RemoteError: the bytes can't be had.
            RemoteChangedError: the remote has another checkpoint under that name.
            RemoteChecksumError: it sends wrong bytes.
        """
        try:
            self._fetch_checked(Range(checkpoint, shard, offset), view, stop)
        except (RemoteUnreachableError, RemoteChecksumError, RemoteChangedError) as error:
            self._count(error)
            raise
        except RemoteError as error:
            self._count(error)
            with suppress(RemoteError, InterruptedError):
                self._check_index(checkpoint, shard, stop)
            raise

    def close(self) -> None:
        """End the threads; nothing may be under way."""
        self._threads.shutdown(wait=True)

    # --- in a caller's thread -----------------------------------------------------------------

    def _fetch_checked(self, where: "Range", view: memoryview, stop: Event) -> None:
        wrong = [(0, len(view))]
        for attempt in range(self._retries + 1):
            if attempt:
                self._retried.inc()
            self._fetch_pieces(where, view, wrong, stop)
            wrong = where.wrong_chunks(view)
            if not wrong:
                return
            self._check_index(where.checkpoint, where.shard, stop)
        start, size = wrong[0]
        name = where.checkpoint.index.shards[where.shard].name
        offset = where.offset + start
        raise RemoteChecksumError(self.name, where.checkpoint.model, name, offset, size)

    def _fetch_pieces(
        self, where: "Range", view: memoryview, wanted: list[tuple[int, int]], stop: Event
    ) -> None:
        """Fetch the (start, size) of `wanted`; returns, or raises, when no thread writes any more."""
        failed = Event()
        pieces: list[Future[None]] = []
        for begin, size in wanted:
            for start in range(begin, begin + size, PIECE_BYTES):
                piece = view[start : min(start + PIECE_BYTES, begin + size)]
                pieces.append(
                    self._threads.submit(self._fetch_piece, where, piece, start, stop, failed)
                )
        wait(pieces)
        errors = [error for piece in pieces if (error := piece.exception()) is not None]
        if stop.is_set():
            raise InterruptedError(0, "the load was cancelled")
        if errors:
            raise errors[0]

    def _fetch_piece(
        self, where: "Range", view: memoryview, start: int, stop: Event, failed: Event
    ) -> None:
        """Fill `view`; each attempt goes on where the last one ended."""
        done, attempts = 0, 0
        try:
            while done < len(view) and not stop.is_set() and not failed.is_set():
                before = done
                try:
                    offset = where.offset + start + done
                    for count in self.files.read_some(where.path, view[done:], offset, stop):
                        done += count
                        self._bytes.inc(count)
                except RemoteUnreachableError:
                    attempts = attempts + 1 if done == before else 1  # a slow one is no dead one
                    if attempts > self._retries:
                        raise
                    self._retried.inc()
                    stop.wait(backoff_s(attempts))
        except BaseException:
            failed.set()
            raise

    def _check_index(self, checkpoint: Checkpoint, shard: int, stop: Event) -> None:
        """Raise if the remote's index is another one by now."""
        try:
            data = self.files.read_all(f"{checkpoint.model}/{INDEX_FILE}", INDEX_BYTES_MAX, stop)
            is_same = from_json(data, checkpoint.model) == checkpoint.index
        except (RemoteNotFoundError, CheckpointFormatError):
            is_same = False
        except RemoteUnreachableError:
            if stop.is_set():
                raise InterruptedError(0, "the load was cancelled") from None
            raise
        if not is_same:
            self.on_changed(checkpoint.model)
            name = checkpoint.index.shards[shard].name
            raise RemoteChangedError(self.name, checkpoint.model, name)

    def _count(self, error: SllmError) -> None:
        self._failures.labels(self.name, error.code).inc()


@dataclass(frozen=True, slots=True)
class Range:
    """Where the bytes of a view come from."""

    checkpoint: Checkpoint
    shard: int
    offset: int

    @property
    def path(self) -> str:
        return f"{self.checkpoint.model}/{self.checkpoint.index.shards[self.shard].name}"

    def wrong_chunks(self, view: memoryview) -> list[tuple[int, int]]:
        """Return (start, size) in `view` of the file chunks whose digest is not the index's."""
        wrong = []
        for chunk in self.checkpoint.index.chunks_within(self.shard, self.offset, len(view)):
            start = chunk.offset - self.offset
            if chunk_digest(view[start : start + chunk.size]) != chunk.digest:
                wrong.append((start, chunk.size))
        return wrong
