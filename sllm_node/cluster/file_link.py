"""The asking side of files between peers, in threads that wait: the bytes come past the event loop.

A request is made on the loop, where sealed messages get their numbers; a thread sends it on a connection
that it has for itself, and the answer's frames go straight to where the bytes are wanted, their tags
checked there. Connections are kept for the next request.
"""

import http.client
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final

from sllm_node.cluster.file_messages import (
    FILE,
    FRAME_BYTES,
    HEAD_BYTES,
    FileHead,
    FileRefused,
    unpack_head,
)
from sllm_node.cluster.frames import FramePuller
from sllm_node.cluster.transport import PREFIX, RECEIVER, problem_of
from sllm_node.cluster.trust import Outgoing
from sllm_node.core.errors import MessageFormatError, PeerDeniedError, PeerUnreachableError
from sllm_node.core.types import NodeId

_TOLD_MAX: Final = 4096
_IDLE_MAX: Final = 64
"""Connections that are kept, of all addresses together: those of nodes that left go with time."""


@dataclass(frozen=True, slots=True)
class Call:
    """A request for a file, ready to be sent once."""

    peer: NodeId
    address: str
    outgoing: Outgoing


class Answer:
    """What a peer sends; read to its end, or `close`."""

    def __init__(self, call: Call, response: http.client.HTTPResponse) -> None:
        self._call = call
        self._response = response
        self._frames = FramePuller(call.outgoing.secret, call.peer, self._read)
        self.head: FileHead | FileRefused = unpack_head(self._frames.next(HEAD_BYTES))

    def into(self, view: memoryview) -> Iterator[int]:
        """Fill `view` with what comes; yield how many bytes came each time.

        Raises:
            PeerUnreachableError: the rest does not come.
            MessageError: it is not to be believed, or is not as long as `view`.
        """
        size = self.head.size if isinstance(self.head, FileHead) else 0
        if size != len(view):
            raise MessageFormatError(f"{size} bytes of a file where {len(view)} are wanted")
        done = 0
        while done < len(view):
            count = self._frames.next_into(view[done : done + FRAME_BYTES])
            done += count
            yield count

    def _read(self, view: memoryview) -> None:
        done = 0
        try:
            while done < len(view):
                count = self._response.readinto(view[done:])
                if not count:
                    raise PeerUnreachableError(self._call.peer, "its answer ended in the middle")
                done += count
        except (OSError, http.client.HTTPException) as error:
            raise _unreachable(self._call, error) from error


class Links:
    """Connections to peers; used from any thread."""

    def __init__(self, tls: ssl.SSLContext | None, silence_s: float) -> None:
        self._tls = tls
        self._silence_s = silence_s
        self._idle: list[tuple[str, http.client.HTTPConnection]] = []
        """With their addresses; used last, kept last."""
        self._lock = threading.Lock()
        self._is_closed = False

    def close(self) -> None:
        """Drop the connections that nobody uses; others go with their answers."""
        with self._lock:
            self._is_closed = True
            idle, self._idle = self._idle, []
        for _, connection in idle:
            connection.close()

    @contextmanager
    def ask(self, call: Call) -> Iterator[Answer]:
        """Ask, and give the answer; leaving it before its end tells the peer to stop.

        Raises:
            PeerUnreachableError: no answer, or not to its end.
            PeerDeniedError: the peer took no message of ours.
            MessageError: the answer is not to be believed.
        """
        connection, response = self._asked(call)
        is_whole = False
        try:
            if response.status != 200:
                raise PeerDeniedError(call.peer, _words_of(call, response))
            yield Answer(call, response)
            is_whole = response.isclosed()
        finally:
            self._keep(call.address, connection, is_whole=is_whole)

    def _asked(self, call: Call) -> tuple[http.client.HTTPConnection, http.client.HTTPResponse]:
        """Send a request; a kept connection may have been closed by the peer, a new one has not."""
        headers = {RECEIVER: call.peer, "Content-Type": "application/octet-stream"}
        while True:
            connection, is_new = self._take(call.address)
            try:
                connection.request("POST", f"{PREFIX}{FILE}", call.outgoing.body, headers)
                return connection, connection.getresponse()
            except (OSError, http.client.HTTPException) as error:
                connection.close()
                if is_new or isinstance(error, TimeoutError):  # silent on one, silent on all
                    raise _unreachable(call, error) from error

    def _take(self, address: str) -> tuple[http.client.HTTPConnection, bool]:
        with self._lock:
            for i in reversed(range(len(self._idle))):
                if self._idle[i][0] == address:
                    return self._idle.pop(i)[1], False
        host, _, port = address.rpartition(":")
        host = host.strip("[]")
        if self._tls is None:
            return http.client.HTTPConnection(host, int(port), timeout=self._silence_s), True
        return (
            http.client.HTTPSConnection(
                host, int(port), timeout=self._silence_s, context=self._tls
            ),
            True,
        )

    def _keep(
        self, address: str, connection: http.client.HTTPConnection, *, is_whole: bool
    ) -> None:
        with self._lock:
            if is_whole and not self._is_closed and connection.sock is not None:
                self._idle.append((address, connection))
                if len(self._idle) <= _IDLE_MAX:
                    return
                _, connection = self._idle.pop(0)
        connection.close()


def _words_of(call: Call, response: http.client.HTTPResponse) -> str:
    """Return what a peer says why it takes no message of ours."""
    try:
        return response.read(_TOLD_MAX).decode(errors="replace")
    except (OSError, http.client.HTTPException) as error:
        raise _unreachable(call, error) from error


def _unreachable(call: Call, error: Exception) -> PeerUnreachableError:
    return PeerUnreachableError(call.peer, problem_of(error, call.address))
