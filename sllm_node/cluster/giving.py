"""The sending side of files between peers: a node gives others what all of lies on its disk.

A request is for one range of one file of one version. Under a key, a thread reads, tags and writes all of
it past the event loop, to a descriptor of the connection. Under TLS the connection is the loop's: threads
read, ahead by one batch, and it writes frames small enough that streams of tokens get their turns in between.
So many ranges are sent at once as the cluster file allows; who is told `busy` asks again or elsewhere.
"""

import asyncio
import logging
import os
import select
import socket
import threading
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Final

from sllm_node.checkpoint.cards import TEXT_FILES
from sllm_node.checkpoint.catalog import Checkpoint, changed_shard
from sllm_node.checkpoint.given import Given, file_of
from sllm_node.checkpoint.index import INDEX_FILE
from sllm_node.cluster.file_messages import (
    FILE,
    FRAME_BYTES,
    RANGE_BYTES,
    AskFile,
    FileHead,
    FileRefused,
    Refused,
    unpack_ask,
)
from sllm_node.cluster.frames import FrameWriter
from sllm_node.cluster.packing import pack
from sllm_node.cluster.transport import Handler, Reply
from sllm_node.core.metrics import Metrics
from sllm_node.core.types import ModelId, NodeId

log = logging.getLogger(__name__)

_LOOK_S: Final = 0.5
"""A thread whose peer takes nothing looks this often whether it is still to write."""
_BATCH_FRAMES: Final = 4
"""Made by one job of a thread."""


class Giving:
    """What answers requests for files."""

    def __init__(self, given: Given, at_once: int, metrics: Metrics) -> None:
        self._given = given
        self._at_once = at_once
        self._metrics = metrics
        self._threads = ThreadPoolExecutor(at_once, "sllm-give")
        self.under_way = 0
        """Ranges that are being sent."""

    def handlers(self) -> Mapping[str, Handler]:
        """Return what answers peers."""
        return {FILE: self.file}

    def close(self) -> None:
        """End the threads when they have let their files go; nothing is asked any more."""
        self._threads.shutdown(wait=False)

    async def file(self, sender: NodeId, payload: bytes, reply: Reply) -> None:
        """Send a range of a file, or why not."""
        ask = unpack_ask(payload)
        found = "busy" if self.under_way >= self._at_once else self._find(ask)
        if isinstance(found, str):
            self._metrics.files_refused.labels(found).inc()
            await reply.send(pack(FileRefused(found)))
            return
        self.under_way += 1
        try:
            await self._send(ask, found, reply)
        finally:
            self.under_way -= 1
        if ask.name == INDEX_FILE:
            log.info("checkpoint given", extra={"model": ask.model, "peer": sender})

    def _find(self, ask: AskFile) -> tuple[Checkpoint, Path] | Refused:
        """Return where the file lies, and of which checkpoint, or what is wrong with the request."""
        checkpoint = self._given.checkpoint(ModelId(ask.model))
        if checkpoint is None:
            return "absent"
        if ask.digest and ask.digest != self._given.digest(checkpoint):
            return "other"
        if ask.first < 0 or not 0 < ask.size <= RANGE_BYTES:
            return "range"
        path = file_of(checkpoint, ask.name)
        return "absent" if path is None else (checkpoint, path)

    async def _send(self, ask: AskFile, found: tuple[Checkpoint, Path], reply: Reply) -> None:
        loop = asyncio.get_running_loop()
        sending = _Sending(*found, ask, reply.writer)
        try:
            opened = await loop.run_in_executor(self._threads, sending.open)
            if not isinstance(opened, FileHead):
                self._metrics.files_refused.labels(opened).inc()
                await reply.send(pack(FileRefused(opened)))
                return
            head = pack(opened)
            reply.response.content_length = sending.bytes_framed(len(head))
            await reply.send(head)
            if (connection := await reply.descriptor()) is not None:
                sending.take(connection)
                write = partial(sending.write_all, reply.silence_s)
                await loop.run_in_executor(self._threads, write)
            else:
                await self._pass_on(sending, reply)
            self._metrics.files_sent_bytes.inc(opened.size)
        finally:
            sending.stop()
            try:
                self._threads.submit(sending.close)
            except RuntimeError:  # the node leaves
                sending.close()

    async def _pass_on(self, sending: "_Sending", reply: Reply) -> None:
        """Write on the event loop what threads make, a batch ahead."""
        loop = asyncio.get_running_loop()
        coming = loop.run_in_executor(self._threads, sending.batch)
        try:
            while frames := await coming:
                coming = loop.run_in_executor(self._threads, sending.batch)
                for frame in frames:
                    await reply.pass_on(frame)
        finally:
            coming.cancel()


class _Sending:
    """One range on its way, in the threads; closed while a batch is made, it waits for it."""

    def __init__(
        self, checkpoint: Checkpoint, path: Path, ask: AskFile, writer: FrameWriter
    ) -> None:
        self._checkpoint = checkpoint
        self._path = path
        self._ask = ask
        self._writer = writer
        self._at = self._end = 0
        self._file = -1
        self._connection: socket.socket | None = None
        self._using = threading.Lock()
        self._is_stopped = False

    def open(self) -> FileHead | Refused:
        """Return what will come, or why nothing will."""
        with self._using:
            return self._open(self._ask, self._path)

    def _open(self, ask: AskFile, path: Path) -> FileHead | Refused:
        if self._is_stopped:  # who asked went away before, and nobody would close it
            return "absent"
        try:
            self._file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError:  # it went in this moment
            return "absent"
        if ask.digest and changed_shard(self._checkpoint) is not None:  # since it was compared
            return "other"
        total = os.fstat(self._file).st_size
        if ask.first >= total:
            return "range"
        self._at, self._end = ask.first, min(total, ask.first + ask.size)
        os.posix_fadvise(self._file, self._at, ask.size, os.POSIX_FADV_WILLNEED)
        texts = _texts(path.parent) if ask.name == INDEX_FILE else ()
        return FileHead(self._end - self._at, total, texts)

    def bytes_framed(self, head_bytes: int) -> int:
        """Return the bytes of the whole answer."""
        count, rest = divmod(self._end - self._at, FRAME_BYTES)
        framed = self._writer.framed_bytes
        return framed(head_bytes) + count * framed(FRAME_BYTES) + (framed(rest) if rest else 0)

    def take(self, connection: int) -> None:
        """Take a descriptor of the connection, to be closed with the file or before."""
        try:
            self._connection = socket.socket(fileno=connection)
        except OSError as error:
            os.close(connection)
            raise ConnectionResetError(str(error)) from error

    def write_all(self, silence_s: float) -> None:
        """Write all frames to the descriptor that was taken, and close it.

        Raises:
            ConnectionResetError: the peer or the file has gone, or it takes nothing for too long.
        """
        assert self._connection is not None
        room = bytearray(self._writer.framed_bytes(FRAME_BYTES))
        with self._using, self._connection as peer:
            while self._file >= 0 and self._at < self._end:
                size = min(FRAME_BYTES, self._end - self._at)
                self._write(peer, self._writer.filled(size, self._fill, room), silence_s)

    def _write(self, peer: socket.socket, frame: memoryview, silence_s: float) -> None:
        ready = select.poll()
        ready.register(peer, select.POLLOUT)
        done, silent_s = 0, 0.0
        while done < len(frame):
            if self._is_stopped or silent_s > silence_s:
                raise ConnectionResetError("nobody waits for it any more, or takes it")
            try:
                done += peer.send(frame[done:])
                silent_s = 0.0
            except BlockingIOError:
                if not ready.poll(1e3 * _LOOK_S):
                    silent_s += _LOOK_S
            except OSError as error:
                raise ConnectionResetError(str(error)) from error

    def stop(self) -> None:
        """Let a thread that writes end soon, and one that has not begun open nothing."""
        self._is_stopped = True

    def batch(self) -> list[memoryview]:
        """Return the next frames; none: that was all.

        Raises:
            ConnectionResetError: the file can't be read; the answer ends in the middle.
        """
        frames: list[memoryview] = []
        with self._using:
            while self._file >= 0 and self._at < self._end and len(frames) < _BATCH_FRAMES:
                size = min(FRAME_BYTES, self._end - self._at)
                frames.append(self._writer.filled(size, self._fill))
        return frames

    def _fill(self, view: memoryview) -> None:
        done = 0
        while done < len(view):
            try:
                count = os.preadv(self._file, [view[done:]], self._at)
            except OSError as error:
                log.warning(
                    "a file can't be read", extra={"path": str(self._path), "error": str(error)}
                )
                raise ConnectionResetError(str(error)) from error
            if not count:
                raise ConnectionResetError("the file became shorter")
            done += count
            self._at += count

    def close(self) -> None:
        """Let file and descriptor go; a second call does nothing."""
        with self._using:
            if self._connection is not None:
                self._connection.close()
            if self._file >= 0:
                os.close(self._file)
                self._file = -1


def _texts(folder: Path) -> tuple[str, ...]:
    return tuple(name for name in TEXT_FILES if _has_bytes(folder / name))


def _has_bytes(path: Path) -> bool:
    try:
        return path.is_file() and path.stat().st_size > 0
    except OSError:
        return False
