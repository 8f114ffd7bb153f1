"""Requests between nodes over HTTP: `Client` asks, `Listener` answers; the only aiohttp in this package.

A node listens for its peers on a socket of its own, at its address in the cluster file, because TLS
asks there for certificates that clients of the public port don't have. `POST /peer/v1/WHAT` carries a
request that `trust` makes and checks; the answer is a stream of frames (`frames`). What is refused
before its sender is known is answered with a status and a sentence, which nobody believes: it is shown.

Connections are pooled and kept; a request has one for itself, so closing it in the middle of an answer
tells the other side to stop, at once and without a message.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from typing import Any, Final

import aiohttp
from aiohttp import web

from sllm_node.cluster.auth import ENVELOPE_BYTES
from sllm_node.cluster.frames import FrameReader, FrameWriter, only
from sllm_node.cluster.trust import REQUEST_LIMIT, Trust
from sllm_node.cluster.wire import VERSION
from sllm_node.core.errors import (
    ListenError,
    MessageError,
    MessageFormatError,
    MessageTooLargeError,
    PeerDeniedError,
    PeerUnreachableError,
    SllmError,
)
from sllm_node.core.types import NodeId

PREFIX: Final = f"/peer/{VERSION}/"
RECEIVER: Final = "x-sllm-receiver"
_READ_S: Final = 30.0
"""For the body of a request to come."""
_TOLD_MAX: Final = 4096
"""Bytes read of an answer that is no answer."""
Addresses = Callable[[NodeId], str | None]
"""host:port of a peer; None: it is not in the cluster file any more."""


class Client:
    """Asks peers."""

    def __init__(self, trust: Trust, addresses: Addresses) -> None:
        self._trust = trust
        self._addresses = addresses
        self._scheme = "http" if trust.client_tls is None else "https"
        connector = aiohttp.TCPConnector(
            limit=0, ssl=trust.client_tls or False, keepalive_timeout=60.0
        )
        self._http = aiohttp.ClientSession(connector=connector, auto_decompress=False)

    async def close(self) -> None:
        """Drop all connections."""
        await self._http.close()

    async def ask(self, peer: NodeId, what: str, payload: bytes, silence_s: float) -> bytes:
        """Return the one frame of the answer.

        Raises:
            PeerUnreachableError: no answer, or none for so long.
            PeerDeniedError: the peer took no message of ours.
            MessageError: the answer is not to be believed.
        """
        async with self.stream(peer, what, payload, silence_s) as frames:
            return only([frame async for frame in frames])

    @asynccontextmanager
    async def stream(
        self, peer: NodeId, what: str, payload: bytes, silence_s: float
    ) -> "AsyncIterator[AsyncIterator[bytes]]":
        """Ask, and give the frames of the answer as they come; leaving early tells the peer to stop.

        Raises: as `ask`; the iterator, too.
        """
        address = self._addresses(peer)
        if address is None:
            raise PeerUnreachableError(peer, "it is not in the cluster file")
        outgoing = self._trust.send(payload, peer)
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=silence_s, sock_read=silence_s)
        try:
            async with self._http.post(
                f"{self._scheme}://{address}{PREFIX}{what}",
                data=outgoing.body, headers={RECEIVER: peer}, timeout=timeout,
                allow_redirects=False,
            ) as response:  # fmt: skip
                if response.status != 200:
                    told = await response.content.read(_TOLD_MAX)
                    raise PeerDeniedError(peer, told.decode(errors="replace"))
                try:
                    yield _frames(response, FrameReader(outgoing.secret, peer))
                finally:
                    if not response.content.is_eof():
                        response.close()
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise PeerUnreachableError(peer, str(error) or type(error).__name__) from error


async def _frames(response: aiohttp.ClientResponse, reader: FrameReader) -> AsyncIterator[bytes]:
    async for data in response.content.iter_any():
        for frame in reader.feed(data):
            yield frame
    if not reader.is_between:
        raise MessageFormatError("an answer was cut off in the middle of a frame")


class Reply:
    """The answer to one request, frame by frame."""

    def __init__(self, http: web.Request, secret: bytes | None, silence_s: float) -> None:
        self._http = http
        self._writer = FrameWriter(secret)
        self._silence_s = silence_s
        self.response = web.StreamResponse()

    async def send(self, payload: bytes) -> None:
        """Send a frame; a peer that takes no bytes for too long is dropped."""
        async with asyncio.timeout(self._silence_s):
            if not self.response.prepared:
                await self.response.prepare(self._http)
            await self.response.write(self._writer.frame(payload))

    async def end(self) -> None:
        """Send what tells that nothing more comes."""
        if not self.response.prepared:
            await self.response.prepare(self._http)
        await self.response.write_eof()


Handler = Callable[[NodeId, bytes, Reply], Awaitable[None]]
"""Answers a request of a node; a MessageError is answered as one."""


class Listener:
    """Answers peers, from `start` to `close`."""

    def __init__(
        self,
        trust: Trust,
        handlers: Mapping[str, Handler],
        silence_s: float,
        on_refused: Callable[[MessageError], None],
    ) -> None:
        self._trust = trust
        self._silence_s = silence_s
        self._on_refused = on_refused
        app = web.Application(client_max_size=REQUEST_LIMIT + ENVELOPE_BYTES)
        for what, handler in handlers.items():
            app.router.add_post(PREFIX + what, self._answering(handler))
        self._runner = web.AppRunner(
            app, handler_cancellation=True, access_log=None, shutdown_timeout=1.0
        )

    async def start(self, address: str) -> None:
        """Listen at host:port.

        Raises:
            ListenError: the address can't be had.
        """
        host, _, port = address.rpartition(":")
        host = host.strip("[]")
        await self._runner.setup()
        tls = self._trust.server_tls
        try:
            await web.TCPSite(self._runner, host, int(port), ssl_context=tls, backlog=1024).start()
        except OSError as error:
            await self.close()
            raise ListenError(host, int(port), error.strerror or str(error)) from error

    async def close(self) -> None:
        """Stop, and drop the connections that are left."""
        await self._runner.cleanup()

    def _answering(self, handler: Handler) -> Callable[[web.Request], Awaitable[Any]]:
        async def answer(http: web.Request) -> web.StreamResponse:
            try:
                async with asyncio.timeout(_READ_S):
                    body = await _body(http)
                found = self._trust.receive(
                    body, http.headers.get(RECEIVER, ""), _certificate(http)
                )
                reply = Reply(http, found.secret, self._silence_s)
                await handler(found.sender, found.payload, reply)
                await reply.end()
            except (TimeoutError, ConnectionResetError):  # it is slow, or has gone away
                return _abort(http)
            except MessageError as error:
                self._on_refused(error)
                return web.Response(status=403, text=f"{error.code}: {error}")
            except SllmError as error:
                return web.Response(status=500, text=f"{error.code}: {error}")
            return reply.response

        return answer


async def _body(http: web.Request) -> bytes:
    try:
        return await http.read()
    except web.HTTPRequestEntityTooLarge as error:
        limit = REQUEST_LIMIT + ENVELOPE_BYTES
        raise MessageTooLargeError(http.content_length or limit + 1, limit) from error


def _certificate(http: web.Request) -> Any:
    transport = http.transport
    tls = None if transport is None else transport.get_extra_info("ssl_object")
    return None if tls is None else tls.getpeercert()


def _abort(http: web.Request) -> web.Response:
    if http.transport is not None:
        http.transport.abort()
    return web.Response(status=408)
