"""Requests between nodes over HTTP: `Client` asks, `Listener` answers; all HTTP between nodes is here.

A node listens for its peers on a socket of its own, at its address in the cluster file, because TLS
asks there for certificates that clients of the public port don't have. `POST /peer/v1/WHAT` carries a
request that `trust` makes and checks; the answer is a stream of frames (`frames`). What is refused
before its sender is known is answered with a status and a sentence, which nobody believes: it is shown.

Connections are pooled and kept; a request has one for itself, so closing it in the middle of an answer
tells the other side to stop, at once and without a message.
"""

import asyncio
import os
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from typing import Any, Final

import aiohttp
from aiohttp import web

from sllm_node.cluster.auth import ENVELOPE_BYTES
from sllm_node.cluster.frames import FrameReader, FrameWriter, only
from sllm_node.cluster.refusals import CERTIFICATE
from sllm_node.cluster.trust import NOT_FOR_ADDRESS, REQUEST_LIMIT, Trust
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
_TURNS: Final = 4
"""Of the event loop, in which what was written on an idle connection has left."""
_EXPIRED: Final = 10
"""What OpenSSL calls X509_V_ERR_CERT_HAS_EXPIRED."""
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
            if (reason := _certificate_problem(error)) is not None:
                raise PeerDeniedError(peer, CERTIFICATE + reason) from error
            raise PeerUnreachableError(peer, problem_of(error, address)) from error


async def _frames(response: aiohttp.ClientResponse, reader: FrameReader) -> AsyncIterator[bytes]:
    async for data in response.content.iter_any():
        for frame in reader.feed(data):
            yield frame
    if not reader.is_between:
        raise MessageFormatError("an answer was cut off in the middle of a frame")


def _certificate_problem(error: Exception) -> str | None:
    """Return why certificates kept a connection from coming to be; None: something else did."""
    cause: BaseException | None = error
    if isinstance(error, aiohttp.ClientConnectorCertificateError):
        cause = error.certificate_error
    elif isinstance(error, aiohttp.ClientConnectorError):
        cause = error.os_error
    if isinstance(cause, ssl.SSLCertVerificationError):
        if cause.verify_code in NOT_FOR_ADDRESS:
            return "its certificate is for another address; see [[nodes]] and 'sllm-node cluster check'"
        if cause.verify_code == _EXPIRED:
            return "its certificate has expired; 'sllm-node cluster check' says more"
        return "its certificate is of another authority; compare trust.ca_file of both nodes"
    if isinstance(cause, OSError) and "ALERT" in str(cause) and "SSL" in str(cause):
        return "it refuses our certificate; compare trust.ca_file of both nodes"
    return None


def problem_of(error: Exception, address: str) -> str:
    """Return what went wrong, without the peer's address: clients are told it, too."""
    cause = error.os_error if isinstance(error, aiohttp.ClientConnectorError) else error
    if isinstance(error, TimeoutError):
        return "no answer in time"
    if (
        isinstance(cause, OSError)
        and not isinstance(cause, ssl.SSLError)
        and (cause.errno or 0) > 0
    ):
        return os.strerror(cause.errno or 0).lower()
    text = str(cause)
    host = address.rpartition(":")[0].strip("[]")
    return text if text and host not in text else type(cause).__name__


class Reply:
    """The answer to one request, frame by frame."""

    def __init__(self, http: web.Request, secret: bytes | None, silence_s: float) -> None:
        self._http = http
        self.writer = FrameWriter(secret)
        self.silence_s = silence_s
        """A peer that takes no bytes for so long is dropped."""
        self.response = web.StreamResponse()

    async def send(self, payload: bytes) -> None:
        """Send a frame; a peer that takes no bytes for too long is dropped."""
        await self.pass_on(self.writer.frame(payload))

    async def pass_on(self, frame: bytes | memoryview) -> None:
        """Send a frame that `writer` made, perhaps in a thread; it is the connection's from now on."""
        async with asyncio.timeout(self.silence_s):
            if not self.response.prepared:
                await self.response.prepare(self._http)
            await self.response.write(frame)

    async def descriptor(self) -> int | None:
        """Return a descriptor of the connection, the caller's to close, for a thread to write frames to.

        All that was sent before has left. None: frames must go through `pass_on`, as TLS is the event
        loop's, or not all has left.
        """
        transport = self._http.transport
        if transport is None or transport.is_closing():
            raise ConnectionResetError("the peer has gone away")
        if transport.get_extra_info("ssl_object") is not None:
            return None
        for _ in range(_TURNS):
            if not transport.get_write_buffer_size():
                break
            await asyncio.sleep(0)
        if transport.is_closing():  # meanwhile
            raise ConnectionResetError("the peer has gone away")
        if transport.get_write_buffer_size():
            return None
        return os.dup(transport.get_extra_info("socket").fileno())

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
