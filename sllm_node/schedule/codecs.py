"""Tokenizers of the models in use: read once, shared by all who ask, kept while there is room."""

import asyncio
from collections import OrderedDict
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Generic

from sllm_node.checkpoint.catalog import Checkpoint, ShardIdentity
from sllm_node.core.errors import LoadFailedError, SllmError
from sllm_node.core.types import ModelId
from sllm_node.schedule.ports import CodecT

_CODECS_MAX: Final = 64
"""A tokenizer takes some 10 to 50 MB of memory."""


@dataclass(frozen=True, slots=True)
class _Entry(Generic[CodecT]):
    identities: tuple[ShardIdentity, ...]
    codec: asyncio.Task[CodecT]


class CodecCache(Generic[CodecT]):
    """One codec for each checkpoint; the least recently used leaves first."""

    def __init__(
        self, load: Callable[[Path], Coroutine[None, None, CodecT]], limit: int = _CODECS_MAX
    ) -> None:
        self._load = load
        self._limit = limit
        self._entries: OrderedDict[ModelId, _Entry[CodecT]] = OrderedDict()

    async def get(self, checkpoint: Checkpoint) -> CodecT:
        """Return the codec of `checkpoint`; concurrent callers share one read.

        Raises:
            LoadFailedError: the files can't be used.
        """
        model = checkpoint.model
        entry = self._entries.get(model)
        if entry is None or entry.identities != checkpoint.identities:
            entry = self._entries[model] = self._start(checkpoint)
        self._entries.move_to_end(model)
        if len(self._entries) > self._limit:
            self._entries.popitem(last=False)  # who waits for it holds it
        try:
            # Shielded: a caller that goes away must not spoil it for the others.
            return await asyncio.shield(entry.codec)
        except SllmError:
            self._drop(model, entry)
            raise
        except Exception as error:
            self._drop(model, entry)
            raise LoadFailedError(model, f"its tokenizer can't be read: {error}") from error

    def has(self, model: ModelId) -> bool:
        """Tell whether a codec of `model` can be had at once."""
        entry = self._entries.get(model)
        return entry is not None and entry.codec.done()

    async def close(self) -> None:
        """Stop the reads under way."""
        reads = [entry.codec for entry in self._entries.values()]
        for read in reads:
            read.cancel()
        await asyncio.gather(*reads, return_exceptions=True)

    def _start(self, checkpoint: Checkpoint) -> _Entry[CodecT]:
        codec = asyncio.create_task(
            self._load(checkpoint.path), name=f"load codec {checkpoint.model}"
        )
        # Looked at even when all callers are gone.
        codec.add_done_callback(lambda done: done.cancelled() or done.exception())
        return _Entry(checkpoint.identities, codec)

    def _drop(self, model: ModelId, entry: _Entry[CodecT]) -> None:
        if self._entries.get(model) is entry:
            del self._entries[model]
