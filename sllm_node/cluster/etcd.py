"""A client of etcd's JSON gateway (v3), as far as a directory needs one: leases, keys, watches.

Any of the endpoints will do. A call that gets no answer is made at the next one, once at each; the
one that answered last is asked first, and a watch goes with it: it is cut when calls move on, because
a server that answers no calls may send no changes either, without saying so. A call may be made
twice; all of them are such that the second changes nothing, or loses a comparison.

The gateway writes 64-bit numbers as strings and bytes in base64.
"""

import asyncio
import ssl
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Final, Self, TypeVar

import aiohttp
import msgspec

from sllm_node.cluster.directory_keys import Entry, Head
from sllm_node.cluster.etcd_messages import (
    Answer,
    Event,
    Fault,
    KeptLine,
    Pair,
    Watched,
    WatchLine,
    base64_of,
    end_of,
)
from sllm_node.core.errors import (
    EtcdCompactedError,
    EtcdDeniedError,
    EtcdError,
    EtcdLeaseError,
    EtcdUnreachableError,
)
from sllm_node.core.units import MIB

PAGE: Final = 1000
"""Keys of one answer."""
_READS_MAX: Final = 3
"""Of everything, when compaction comes between two pages."""
_UNREACHABLE: Final = frozenset((1, 4, 14))
"""gRPC's codes for: cancelled, too late, unavailable."""
_DENIED: Final = frozenset((7, 16))
_UNAUTHENTICATED: Final = 16
_ERRORS: Final[dict[int, type[EtcdError]]] = {5: EtcdLeaseError}
_OUT_OF_RANGE: Final = 11
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class EtcdOptions:
    """Where etcd is and how to speak to it."""

    endpoints: tuple[str, ...]
    """As in https://10.0.0.1:2379."""
    prefix: str = "/sllm/"
    """Before all our keys; ends in a slash."""
    user: str | None = None
    password: str = field(default="", repr=False)
    tls: ssl.SSLContext | None = None
    timeout_s: float = 5.0
    """For an answer of one endpoint."""
    answer_bytes: int = 16 * MIB
    """The most of one answer, and of one message of a watch."""

    def __post_init__(self) -> None:
        assert self.endpoints and self.prefix.endswith("/") and self.timeout_s > 0  # noqa: PT018


class _NoAnswerError(Exception):
    """This endpoint does not answer; another one may."""


class EtcdClient:
    """One node's connections to etcd; an asynchronous context manager."""

    def __init__(self, options: EtcdOptions) -> None:
        self._options = options
        self._current = 0
        self._token: str | None = None
        self._session: aiohttp.ClientSession | None = None
        self._watch: aiohttp.ClientResponse | None = None

    async def __aenter__(self) -> Self:
        tls: ssl.SSLContext | bool = self._options.tls or True
        connector = aiohttp.TCPConnector(ssl=tls, limit=8)
        unlimited = aiohttp.ClientTimeout(total=None)
        self._session = aiohttp.ClientSession(connector=connector, timeout=unlimited)
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        assert self._session is not None
        await self._session.close()

    @property
    def endpoint(self) -> str:
        """Return the endpoint that is asked first."""
        return self._options.endpoints[self._current]

    # --- leases -----------------------------------------------------------------------------------

    async def grant(self, ttl_s: int) -> int:
        """Return a new lease, which lives so long after each `keep_alive`."""
        return (await self._call("lease/grant", {"TTL": ttl_s}, Answer)).lease

    async def keep_alive(self, lease: int) -> bool:
        """Begin the time of a lease anew; False: it is no more."""
        line = await self._call("lease/keepalive", {"ID": str(lease)}, KeptLine)
        if line.result is None:
            self._move_on(self._current)
            raise EtcdUnreachableError(self.endpoint, "a lease can't be renewed")
        return line.result.ttl_s > 0

    async def revoke(self, lease: int) -> None:
        """End a lease, and with it the keys that were put under it.

        Raises:
            EtcdLeaseError: it is no more.
        """
        await self._call("lease/revoke", {"ID": str(lease)}, Answer)

    # --- keys -------------------------------------------------------------------------------------

    async def read(self) -> tuple[Head, tuple[Entry, ...]]:
        """Return every key below the prefix as of one revision, and which that is."""
        for _ in range(_READS_MAX):
            try:
                return await self._read_pages()
            except EtcdCompactedError:
                continue
        raise EtcdError(self.endpoint, "compacts faster than its keys can be read")

    async def get(self, key: str) -> Entry | None:
        """Return one key."""
        answer = await self._call("kv/range", {"key": self._key(key)}, Answer)
        return self._entry(answer.kvs[0]) if answer.kvs else None

    async def put(self, key: str, value: bytes, lease: int = 0) -> None:
        """Put a value; with a lease it goes when that ends.

        Raises:
            EtcdLeaseError: the lease is no more.
        """
        await self._call("kv/put", self._putting(key, value, lease), Answer)

    async def put_if(self, key: str, value: bytes, revision: int, lease: int = 0) -> bool:
        """Put a value where the key is still of that revision (0: there is none); False: it is not."""
        compare = {
            "key": self._key(key),
            "target": "MOD",
            "result": "EQUAL",
            "mod_revision": str(revision),
        }
        body = {
            "compare": [compare],
            "success": [{"request_put": self._putting(key, value, lease)}],
        }
        return (await self._call("kv/txn", body, Answer)).succeeded

    async def delete(self, key: str) -> None:
        """Delete a key, if it is there."""
        await self._call("kv/deleterange", {"key": self._key(key)}, Answer)

    # --- changes ----------------------------------------------------------------------------------

    async def watch(self, revision: int) -> AsyncGenerator[Head | tuple[Entry, ...], None]:
        """Yield how far the server is, once, and then changes from `revision` on, until the stream ends.

        Raises:
            EtcdCompactedError: they can't be had any more.
            EtcdUnreachableError: the stream could not be begun.
        """
        create = {
            "key": base64_of(self._options.prefix.encode()),
            "range_end": base64_of(end_of(self._options.prefix)),
            "start_revision": str(revision),
            "progress_notify": True,
        }
        body = {"create_request": create}
        response = await self._anywhere(lambda: self._post("watch", body))
        self._watch = response
        try:
            async for line in _lines(response, self.endpoint, self._options.answer_bytes):
                told = self._told(line)
                if told is None:
                    return
                if told.created:
                    yield Head(told.header.revision, told.header.raft_term)
                if told.events:
                    yield tuple(self._changed(event) for event in told.events)
        except aiohttp.ClientError:
            return
        finally:
            self._watch = None
            response.close()

    def _told(self, line: bytes) -> Watched | None:
        """Return what a line of a watch says; None: it is the last one."""
        message = self._decode(line, WatchLine)
        told = message.result
        if told is None or message.error is not None:
            return None
        if told.compact_revision:
            raise EtcdCompactedError(self.endpoint, told.compact_revision)
        if told.canceled and "PermissionDenied" in told.cancel_reason:
            raise EtcdDeniedError(self.endpoint, told.cancel_reason)
        if told.canceled:
            self._token = None
            return None
        return told

    def _changed(self, event: Event) -> Entry:
        entry = self._entry(event.kv)
        if event.type != "DELETE":
            return entry
        return Entry(entry.key, None, entry.revision)

    # --- inside -----------------------------------------------------------------------------------

    async def _read_pages(self) -> tuple[Head, tuple[Entry, ...]]:
        end = base64_of(end_of(self._options.prefix))
        begin = self._options.prefix.encode()
        entries: list[Entry] = []
        head: Head | None = None
        while True:
            body = {"key": base64_of(begin), "range_end": end, "limit": str(PAGE)}
            if head is not None:
                body["revision"] = str(head.revision)
            answer = await self._call("kv/range", body, Answer)
            head = head or Head(answer.header.revision, answer.header.raft_term)
            entries += (self._entry(pair) for pair in answer.kvs)
            if not answer.more:
                return head, tuple(entries)
            begin = answer.kvs[-1].key + b"\0"

    def _key(self, key: str) -> str:
        return base64_of((self._options.prefix + key).encode())

    def _entry(self, pair: Pair) -> Entry:
        key = pair.key.decode("utf-8", "replace").removeprefix(self._options.prefix)
        return Entry(key, pair.value, pair.mod_revision)

    def _putting(self, key: str, value: bytes, lease: int) -> dict[str, str]:
        return {"key": self._key(key), "value": base64_of(value), "lease": str(lease)}

    async def _call(self, path: str, body: dict[str, Any], kind: type[T]) -> T:
        async def ask() -> T:
            async with asyncio.timeout(self._options.timeout_s), await self._post(path, body) as r:
                return self._decode(await self._content(r), kind)

        return await self._anywhere(ask)

    async def _anywhere(self, ask: Callable[[], Awaitable[T]]) -> T:
        """Ask each endpoint in turn until one answers."""
        problem = ""
        for _ in self._options.endpoints:
            asked = self._current
            try:
                return await ask()
            except (_NoAnswerError, aiohttp.ClientError, OSError) as error:
                problem = str(error) or f"no answer within {self._options.timeout_s} s"
                self._move_on(asked)
        raise EtcdUnreachableError(", ".join(self._options.endpoints), problem)

    def _move_on(self, asked: int) -> None:
        if self._current != asked:
            return  # another call has
        self._current = (self._current + 1) % len(self._options.endpoints)
        self._token = None
        if self._watch is not None:
            self._watch.close()

    async def _post(self, path: str, body: dict[str, Any]) -> aiohttp.ClientResponse:
        """Return the answer as soon as its status is known to be good; log in where that lacks."""
        if self._options.user is None:
            return await self._post_once(path, body, {})
        for is_last in (False, True):
            self._token = self._token or await self._log_in(self._options.user)
            try:
                return await self._post_once(path, body, {"Authorization": self._token})
            except _TokenError as error:
                self._token = None
                if is_last:
                    raise EtcdDeniedError(self.endpoint, str(error)) from error
        raise AssertionError

    async def _log_in(self, user: str) -> str:
        body = {"name": user, "password": self._options.password}
        try:
            async with await self._post_once("auth/authenticate", body, {}) as response:
                return self._decode(await self._content(response), Answer).token
        except (EtcdUnreachableError, EtcdDeniedError):
            raise
        except EtcdError as error:
            raise EtcdDeniedError(self.endpoint, error.problem) from error

    async def _post_once(
        self, path: str, body: dict[str, Any], headers: dict[str, str]
    ) -> aiohttp.ClientResponse:
        assert self._session is not None, "inside of 'async with'"
        async with asyncio.timeout(self._options.timeout_s):
            response = await self._session.post(
                f"{self.endpoint}/v3/{path}", data=msgspec.json.encode(body), headers=headers
            )
            if response.status == 200:
                return response
            async with response:
                raise self._refusal(response.status, await self._content(response))

    async def _content(self, response: aiohttp.ClientResponse) -> bytes:
        content = bytearray()
        async for piece in response.content.iter_any():
            content += piece
            if len(content) > self._options.answer_bytes:
                problem = f"an answer above {self._options.answer_bytes} bytes"
                raise EtcdError(self.endpoint, problem)
        return bytes(content)

    def _refusal(self, status: int, content: bytes) -> Exception:
        """Return the error that an answer other than 200 stands for."""
        try:
            fault = msgspec.json.decode(content, type=Fault, strict=False)
        except (msgspec.MsgspecError, UnicodeDecodeError):
            return _NoAnswerError(f"{self.endpoint} answers {status}; is it etcd's gateway?")
        if fault.code in _UNREACHABLE:
            return _NoAnswerError(f"{self.endpoint}: {fault.message}")
        if fault.code == _UNAUTHENTICATED and self._options.user is not None:
            return _TokenError(fault.message)
        if fault.code == _OUT_OF_RANGE and "compacted" in fault.message:
            return EtcdCompactedError(self.endpoint, 0)
        is_denied = fault.code in _DENIED or "user name is empty" in fault.message
        kind = EtcdDeniedError if is_denied else _ERRORS.get(fault.code, EtcdError)
        return kind(self.endpoint, fault.message or f"answers {status}")

    def _decode(self, content: bytes, kind: type[T]) -> T:
        try:
            return msgspec.json.decode(content, type=kind, strict=False)
        except (msgspec.MsgspecError, UnicodeDecodeError) as error:
            raise EtcdError(self.endpoint, f"an answer that is none of etcd's: {error}") from error


class _TokenError(Exception):
    """The token of the last login is not taken any more."""


async def _lines(
    response: aiohttp.ClientResponse, endpoint: str, limit: int
) -> AsyncIterator[bytes]:
    """Yield the lines of an answer as they come."""
    rest = bytearray()
    async for piece in response.content.iter_any():
        rest += piece
        *lines, last = rest.split(b"\n")
        for line in lines:
            if line:
                yield bytes(line)
        rest = last
        if len(rest) > limit:
            raise EtcdError(endpoint, f"a message above {limit} bytes")
