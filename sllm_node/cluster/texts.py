"""Tokenizers of models that only peers have: fetched once, kept on disk, read like any other.

With its tokenizer a node takes requests for a model that it does not have: the prompt becomes tokens
here, and whoever serves it is sent tokens. So a session can go on anywhere.
"""

import asyncio
import hashlib
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Generic

import msgspec

from sllm_node.checkpoint.cards import TEXT_FILES
from sllm_node.cluster import text_folders
from sllm_node.cluster.packing import pack
from sllm_node.cluster.serving import DESCRIBE
from sllm_node.cluster.state import HeldModel
from sllm_node.cluster.transport import Client
from sllm_node.cluster.wire import (
    Describe,
    Described,
    Failed,
    error_of,
    unpack_described,
    unpack_record,
)
from sllm_node.core.errors import MessageFormatError, MessageTooLargeError, SllmError
from sllm_node.core.types import NodeId
from sllm_node.schedule.ports import CodecT

log = logging.getLogger(__name__)

_TEXTS_MAX: Final = 256 << 20
"""Bytes of one model's texts."""
_KEPT_MAX: Final = 64
"""Tokenizers held in memory; those asked for longest ago go."""


@dataclass(frozen=True, slots=True)
class Known(Generic[CodecT]):
    """What is known of a model that lies elsewhere."""

    codec: CodecT
    context_tokens: int


class Texts(Generic[CodecT]):
    """Tokenizers by what peers tell of their checkpoints."""

    def __init__(
        self,
        folder: Path,
        client: Client,
        load_codec: Callable[[Path], Awaitable[CodecT]],
        silence_s: float,
        limit: int,
    ) -> None:
        """`limit`: bytes of all that is kept in `folder`."""
        self._folder = folder
        self._limit = limit
        self._client = client
        self._load_codec = load_codec
        self._silence_s = silence_s
        self._known: dict[str, asyncio.Task[Known[CodecT]]] = {}

    async def get(self, held: HeldModel, holders: list[NodeId]) -> Known[CodecT]:
        """Return the tokenizer and limit of a checkpoint that `holders` have.

        Raises:
            SllmError: none of them gave it, or it can't be used.
        """
        key = _key(held)
        task = self._known.pop(key, None)
        if task is None or (task.done() and (task.cancelled() or task.exception() is not None)):
            task = asyncio.create_task(self._fetch(held, holders, key), name=f"texts {held.model}")
        self._known[key] = task
        ended = [one for one, fetching in self._known.items() if fetching.done()]
        for one in ended[: max(0, len(self._known) - _KEPT_MAX)]:
            del self._known[one]
        return await asyncio.shield(task)

    def get_now(self, held: HeldModel) -> Known[CodecT] | None:
        """Return it if it is here already."""
        task = self._known.get(_key(held))
        is_here = task is not None and task.done() and not task.cancelled()
        return task.result() if task is not None and is_here and not task.exception() else None

    async def close(self) -> None:
        """Stop what is under way."""
        for task in self._known.values():
            task.cancel()
        await asyncio.gather(*self._known.values(), return_exceptions=True)

    async def _fetch(self, held: HeldModel, holders: list[NodeId], key: str) -> Known[CodecT]:
        assert holders
        folder = self._folder / key
        if (kept := await self._kept(held, folder)) is not None:
            return kept
        failure: SllmError | None = None
        for peer in holders:
            try:
                head, files = await self._ask(peer, held.model)
            except SllmError as error:
                failure = error
                continue
            await asyncio.to_thread(text_folders.write, folder, head.context_tokens, files)
            await self._make_room()
            codec = await self._load_codec(folder)
            log.info("tokenizer fetched", extra={"model": held.model, "peer": peer})
            return Known(codec, head.context_tokens)
        assert failure is not None
        raise failure

    async def _kept(self, held: HeldModel, folder: Path) -> Known[CodecT] | None:
        """Return what lies on the disk from an earlier life; None: nothing that can be used."""
        context_tokens = await asyncio.to_thread(text_folders.read, folder)
        if context_tokens is None:
            return None
        try:
            codec = await self._load_codec(folder)
        except SllmError as error:  # perhaps a peer has better ones by now
            log.warning(
                "kept tokenizer can't be read", extra={"model": held.model, "error": str(error)}
            )
            return None
        log.info("tokenizer read", extra={"model": held.model})
        return Known(codec, context_tokens)

    async def _make_room(self) -> None:
        found = await asyncio.to_thread(text_folders.look, self._folder)
        busy = [key for key, task in self._known.items() if not task.done()]
        for name in text_folders.surplus(found, list(self._known), busy, self._limit):
            await asyncio.to_thread(text_folders.remove, self._folder / name)

    async def _ask(self, peer: NodeId, model: str) -> tuple[Described, dict[str, bytes]]:
        async with self._client.stream(
            peer, DESCRIBE, pack(Describe(model)), self._silence_s
        ) as frames:
            first = await anext(frames, None)
            if first is None:
                raise MessageFormatError("an answer without frames")
            head = _head(first)
            data = bytearray()
            wanted = sum(size for _, size in head.files)
            if wanted > _TEXTS_MAX or min((size for _, size in head.files), default=0) < 0:
                raise MessageTooLargeError(wanted, _TEXTS_MAX)
            async for frame in frames:
                data += frame
                if len(data) > wanted:
                    break
        if len(data) != wanted:
            raise MessageFormatError(f"texts of {len(data)} bytes, and {wanted} were announced")
        return head, _split(head, bytes(data))


def _head(frame: bytes) -> Described:
    try:
        return unpack_described(frame)
    except MessageFormatError:
        record = unpack_record(frame)
        if isinstance(record, Failed):
            raise error_of(record) from None
        raise


def _split(head: Described, data: bytes) -> dict[str, bytes]:
    files, at = {}, 0
    for name, size in head.files:
        if name not in TEXT_FILES:
            raise MessageFormatError(f"a text named {name!r}")
        files[name] = data[at : at + size]
        at += size
    return files


def _key(held: HeldModel) -> str:
    """Return a name for a checkpoint's texts: another conversion has another."""
    parts: Any = (held.model, held.created, held.bytes_decoded)
    return hashlib.sha256(msgspec.msgpack.encode(parts)).hexdigest()[:32]
