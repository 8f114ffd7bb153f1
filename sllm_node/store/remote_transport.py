"""Bytes of a remote's files, through obstore: HTTP (a peer too) and S3 behind one small class.

obstore is the Python face of Rust's object_store; its calls wait without the interpreter's lock, so
they are made from plain threads. Its own retries are off: ours go on in the middle of a range, are
counted, and stop when the load does.
"""

import configparser
import importlib
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from threading import Event
from typing import Any, Final

import msgspec

from sllm_node.core.config import RemoteConfig
from sllm_node.core.errors import (
    ConfigError,
    RemoteDeniedError,
    RemoteError,
    RemoteNotFoundError,
    RemoteUnreachableError,
)
from sllm_node.core.urls import without_urls

_STREAM_BYTES: Final = 1 << 20
"""Memory of a request under way, beside what the system buffers."""
_TEXT_STREAM_BYTES: Final = 16 << 10
"""Of a whole file: what came of it is kept in such pieces when a request ends early; less counts as nothing."""
_LIST_BYTES_MAX: Final = 1 << 24
_BACKOFF_S: Final = 0.1
_BACKOFF_MAX_S: Final = 5.0
_CONNECT_S: Final = 5.0
_TOOK: Final = re.compile(r" in [0-9.]+\S* - ")
_ANSWER: Final = re.compile(r"(status code: [0-9]{3}[^:]*):.*")
_BEYOND: Final = "status code: 416"
_KIND: Final = re.compile(r"\bkind: (Connect|Timeout)\b")
_KINDS: Final = {"Connect": "no connection to it", "Timeout": "no answer in time"}
EXTRA: Final = "pip install 'sllm-node[remote]'"


@dataclass(slots=True)
class _Text:
    """A file on its way."""

    data: bytearray = field(default_factory=bytearray)
    size: int = 0
    version: tuple[int, str | None] | None = None


class _Listed(msgspec.Struct):
    name: str


class _Listing(msgspec.Struct):
    checkpoints: tuple[_Listed, ...]


class Transport:
    """The files of one remote. Called from threads."""

    def __init__(self, name: str, config: RemoteConfig) -> None:
        self.name = name
        self._config = config
        self._obstore = _import_obstore(name)
        self._store: Any = _make_store(name, config)

    def read_all(self, path: str, limit: int, stop: Event) -> bytes:
        """Return a whole file; one that comes slowly, or is cut off, goes on where it ended.

        Raises:
            RemoteError: it can't be had, or is larger than `limit`.
        """
        text, attempts = _Text(), 0
        while True:
            before = len(text.data)
            try:
                self._read_on(path, text, limit, stop)
                return bytes(text.data)
            except RemoteUnreachableError as error:
                attempts = 1 if len(text.data) > before else attempts + 1
                is_hopeless = error.is_silent and not text.data
                if is_hopeless or attempts > self._config.retries or stop.is_set():
                    raise
                stop.wait(backoff_s(attempts))

    def _read_on(self, path: str, text: "_Text", limit: int, stop: Event) -> None:
        """Add to `text` what lies behind it, as it comes."""
        with self._errors_named(path):
            known = len(text.data)
            options = {"range": (known, text.size)} if known else None
            result = self._obstore.get(self._store, path, options=options)
            text.size = result.meta["size"]
            version = (text.size, result.meta["e_tag"])
            if text.size > limit:
                raise RemoteError(self.name, path, f"has more than {limit} bytes")
            if known and version != text.version:
                text.data.clear()
                raise RemoteUnreachableError(self.name, path, "was replaced while it came")
            text.version = version
            for piece in result.stream(min_chunk_size=_TEXT_STREAM_BYTES):
                text.data += piece
                if stop.is_set():
                    raise RemoteUnreachableError(self.name, path, "is not wanted any more")
        if len(text.data) != text.size:
            problem = f"{len(text.data)} of {text.size} bytes came"
            raise RemoteUnreachableError(self.name, path, problem)

    def read_some(self, path: str, view: memoryview, offset: int, stop: Event) -> Iterator[int]:
        """Fill `view` from byte `offset` of a file; yield how many bytes came each time.

        Raises:
            RemoteError: the rest can't be had now.
        """
        done = 0
        with self._errors_named(path):
            options = {"range": (offset, offset + len(view))}
            result = self._obstore.get(self._store, path, options=options)
            for piece in result.stream(min_chunk_size=_STREAM_BYTES):
                if stop.is_set() or done + len(piece) > len(view):
                    break
                view[done : done + len(piece)] = piece
                done += len(piece)
                yield len(piece)
        if done < len(view) and not stop.is_set():
            raise RemoteUnreachableError(self.name, path, f"{done} of {len(view)} bytes came")

    def models(self) -> tuple[str, ...]:
        """Return the names of the checkpoints at the remote.

        Raises:
            RemoteError: it does not tell.
        """
        if self._config.models:
            return self._config.models
        if self._config.url.startswith("s3:"):
            with self._errors_named("the list of checkpoints"):
                found = self._obstore.list_with_delimiter(self._store)["common_prefixes"]
                return tuple(sorted(prefix.rstrip("/").rsplit("/", 1)[-1] for prefix in found))
        data = self.read_all("", _LIST_BYTES_MAX, Event())
        try:
            return tuple(one.name for one in msgspec.json.decode(data, type=_Listing).checkpoints)
        except msgspec.MsgspecError as error:
            problem = f"it is no peer's list; name them in remotes.{self.name}.models"
            raise RemoteError(self.name, "the list of checkpoints", problem) from error

    @contextmanager
    def _errors_named(self, path: str) -> Iterator[None]:
        """Turn what obstore raises inside into our errors, which stand alone: its own have the URL."""
        known = self._obstore.exceptions
        try:
            yield
        except FileNotFoundError:
            raise RemoteNotFoundError(self.name, path, "is not there") from None
        except (known.PermissionDeniedError, known.UnauthenticatedError) as error:
            problem = f"is refused, see the remote's credentials: {_told(error)}"
            raise RemoteDeniedError(self.name, path, problem) from None
        except known.NotSupportedError:
            problem = "the server sends no ranges of a file (HTTP Range)"
            raise RemoteError(self.name, path, problem) from None
        except (known.BaseError, OSError, ValueError) as error:
            if _BEYOND in str(error):
                problem = "ends before the bytes that it was asked for"
                raise RemoteError(self.name, path, problem) from None
            is_silent = _KIND.search(str(error)) is not None
            raise RemoteUnreachableError(
                self.name, path, _told(error), is_silent=is_silent
            ) from None


def backoff_s(attempts: int) -> float:
    """Return how long to wait after so many requests in a row that brought nothing."""
    return min(_BACKOFF_S * (1 << min(attempts, 10)), _BACKOFF_MAX_S)


def _told(error: Exception) -> str:
    """Return what an error of obstore says, without addresses, times and what the server sent."""
    if (kind := _KIND.search(str(error))) is not None:
        return _KINDS[kind[1]]
    first = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return _ANSWER.sub(r"\1", _TOOK.sub(" - ", without_urls(first)))


def _import_obstore(name: str) -> Any:
    try:
        importlib.import_module("obstore.store")
        importlib.import_module("obstore.exceptions")
        return importlib.import_module("obstore")
    except ImportError as error:
        problem = f"remotes.{name}: remotes need the extra 'remote': {EXTRA}"
        raise ConfigError("config", (problem,)) from error


def _make_store(name: str, config: RemoteConfig) -> Any:
    stores = importlib.import_module("obstore.store")
    limit = timedelta(seconds=config.timeout_s)
    connect = timedelta(seconds=min(_CONNECT_S, config.timeout_s))
    client: dict[str, Any] = {"timeout": limit, "connect_timeout": connect, "allow_http": True}
    retry = {"max_retries": 0, "retry_timeout": limit}
    try:
        if not config.url.startswith("s3:"):
            if config.key_file is not None:
                key = Path(config.key_file).read_text(encoding="utf-8").strip()
                client["default_headers"] = {"Authorization": f"Bearer {key}"}
            url = config.url.rstrip("/")
            return stores.HTTPStore.from_url(url, client_options=client, retry_config=retry)
        return stores.S3Store.from_url(
            config.url, config=_s3_options(config), client_options=client, retry_config=retry
        )
    except Exception as error:  # noqa: BLE001 - told in our words
        problem = f"remotes.{name}: can't be used: {_told(error)}"
        raise ConfigError("config", (problem,)) from None


def _s3_options(config: RemoteConfig) -> dict[str, Any]:
    """Return what the config says; the rest comes from the AWS_ variables or the machine's role."""
    options: dict[str, Any] = {"virtual_hosted_style_request": config.endpoint is None}
    if config.endpoint is not None:
        options["endpoint"] = config.endpoint
    if config.region is not None:
        options["region"] = config.region
    if config.anonymous:
        options["skip_signature"] = True
    if config.credentials_file is not None:
        parser = configparser.ConfigParser()
        parser.read_string(Path(config.credentials_file).read_text(encoding="utf-8"))
        section = parser["default"]
        options["access_key_id"] = section["aws_access_key_id"]
        options["secret_access_key"] = section["aws_secret_access_key"]
        if "aws_session_token" in section:
            options["session_token"] = section["aws_session_token"]
    return options
