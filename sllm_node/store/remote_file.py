"""A shard at a remote as the loader sees it: a read is the fetch, and what it fetched stays.

The loader reads units into its chunks as from any other file. What is on NVMe already is read from
there; the rest comes from the remote straight into the chunk, is checked, and is written behind.
"""

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

from sllm_node.checkpoint.catalog import ShardIdentity
from sllm_node.store.reader import FileSystem, ShardFile
from sllm_node.store.remote_fetch import Range, Remote
from sllm_node.store.remote_partial import Partial, Run


class RemoteShardFile:
    """An open shard of a partial; used from several threads."""

    def __init__(self, partial: Partial, shard: int, remote: Remote, local: ShardFile) -> None:
        self.fetched_bytes = 0
        """What this file had the remote send."""
        self.partial = partial
        self._shard = shard
        self._remote = remote
        self._local = local
        self._stop = threading.Event()
        self._counting = threading.Lock()

    def read_into(self, view: memoryview, offset: int) -> int:
        for run, piece in self._runs(view, offset):
            if not run.is_here or self._is_read(run, piece):
                continue
            if self.partial.lose(run):
                self._fetch(run, piece)  # damaged here, and whole at the remote
            else:  # somebody else does that for parts of it: past the disk, then
                checkpoint = self.partial.checkpoint
                self._remote.fetch(checkpoint, run.shard, piece, run.offset, self._stop)
        return len(view)

    def _is_read(self, run: Run, view: memoryview) -> bool:
        """Read what is here; tell whether it is what the index says."""
        count = self._local.read_into(view, run.offset)
        where = Range(self.partial.checkpoint, run.shard, run.offset)
        return count == run.size and not where.wrong_chunks(view)

    def bring(self, view: memoryview, offset: int) -> None:
        """Fetch what is missing of a range; `view` is room for it."""
        for _ in self._runs(view, offset):
            pass

    def _runs(self, view: memoryview, offset: int) -> Iterator[tuple[Run, memoryview]]:
        """Yield the runs of a range and their places in `view`, filled where they were missing."""
        done = 0
        while done < len(view):
            run = self.partial.take(self._shard, offset + done, len(view) - done, self._stop)
            piece = view[done : done + run.size]
            if not run.is_here:
                self._fetch(run, piece)
            yield run, piece
            done += run.size

    def _fetch(self, run: Run, view: memoryview) -> None:
        checkpoint = self.partial.checkpoint
        try:
            self._remote.fetch(checkpoint, run.shard, view, run.offset, self._stop)
        except BaseException:
            self.partial.give_up(run)
            raise
        with self._counting:
            self.fetched_bytes += run.size
        self.partial.keep(run, view)

    def identity(self) -> ShardIdentity:
        """Return the identity that the shard keeps when its checkpoint is complete."""
        found = self._local.identity()
        expected = self.partial.checkpoint.identities[self._shard]
        return ShardIdentity(found.device, found.inode, expected.mtime_ns, found.size)

    def stop(self) -> None:
        """Let reads under way end soon, with an error."""
        self._stop.set()
        self.partial.wake()

    def close(self) -> None:
        self._local.close()
        self.partial.leave()


class Partials(Protocol):
    """Where a partial and its remote are found by the folder of a card."""

    def at(self, card: Path) -> tuple[Partial, Remote] | None: ...

    def completed(self, card: Path) -> Path:
        """Return the folder of the checkpoint that the card at `card` became."""


class RemoteFileSystem:
    """Opens shards at remotes by the path of their card, and all others as `local` does."""

    def __init__(self, cards: Path, partials: Partials, local: FileSystem) -> None:
        self._cards = cards
        self._partials = partials
        self._local = local

    def open(self, path: Path) -> ShardFile:
        if path.parent.parent != self._cards:
            return self._local.open(path)
        found = self._partials.at(path.parent)
        if found is None or not found[0].enter():
            return self._local.open(self._partials.completed(path.parent) / path.name)
        partial, remote = found
        names = [shard.name for shard in partial.checkpoint.index.shards]
        try:
            return RemoteShardFile(partial, names.index(path.name), remote, self._local.open(path))
        except BaseException:
            partial.leave()
            raise
