"""The tensor index: which bytes of which shard hold each tensor, and the digest of every chunk.

`tensor_index.json` is the last file of a checkpoint to be written. Offsets count from the start of
a shard file; on a device the shards lie one after another, so a tensor begins at
`shard_base(entry.shard) + entry.offset`. What `from_json` returns is consistent: shards are whole
pages, tensors are aligned, in bounds and do not overlap, and there is one digest for each chunk.

Version 1 has shards of raw bytes. In version 2 each file chunk has a codec of its own. Tensors lie
where they would without codecs: places, sizes and `chunk_bytes` count decoded bytes. In the file the
encoded chunks lie one after another, each padded to whole pages; a digest covers what is stored,
padding included.
"""

import math
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate, pairwise
from typing import Annotated, Final

import msgspec
from msgspec import Meta

from sllm_node.codec.chunks import CODECS
from sllm_node.codec.exponent import DECODED_BYTES_MAX
from sllm_node.codec.names import EXPONENT, RAW
from sllm_node.core.errors import CheckpointFormatError
from sllm_node.core.units import PAGE

INDEX_FILE: Final = "tensor_index.json"
VERSION: Final = 1
ENCODED_VERSION: Final = 2
CODEC: Final = RAW
NO_ARCHITECTURE: Final = "none"
"""What an index says of tensors that are no model: they can be loaded, not served."""
TENSOR_ALIGNMENT: Final = 256
"""Bytes; what CUDA's allocator gives, so that a view is as aligned as a tensor of its own."""
DTYPE_BYTES: Final[dict[str, int]] = {
    "BOOL": 1, "U8": 1, "I8": 1, "U16": 2, "I16": 2, "U32": 4, "I32": 4, "U64": 8, "I64": 8,
    "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "F16": 2, "BF16": 2, "F32": 4, "F64": 8,
}  # fmt: skip
"""Bytes of an element, by the names that safetensors uses."""
FLOAT_DTYPES: Final = frozenset(name for name in DTYPE_BYTES if "F" in name)

_DIMENSIONS_MAX: Final = 32
_Count = Annotated[int, Meta(ge=0)]
_Digest = Annotated[str, Meta(pattern="^[0-9a-f]{16}$")]


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """Where one tensor lies."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    shard: int
    """Index into `TensorIndex.shards`."""
    offset: int
    """From the start of the shard."""
    size: int


@dataclass(frozen=True, slots=True)
class Shard:
    """One file of tensor bytes, raw or encoded."""

    name: str
    size: int
    """A multiple of 4 KiB."""
    digests: tuple[int, ...]
    """xxh3_64 of each chunk; the last chunk may be shorter."""
    codecs: tuple[str, ...] = ()
    """Of each chunk; none: all are raw."""
    stored: tuple[int, ...] = ()
    """Bytes that each chunk takes in the file, whole pages; none: as many as decoded."""

    @property
    def file_size(self) -> int:
        """Bytes of the file; `size` counts what it decodes to."""
        return sum(self.stored) if self.codecs else self.size


class FileChunk(msgspec.Struct, frozen=True, gc=False):
    """The bytes of a shard under one digest, which decode by themselves.

    A model has tens of thousands, so they are made fast and none of the collector's.
    """

    shard: int
    offset: int
    """In the file, a multiple of 4 KiB."""
    size: int
    """In the file, too."""
    digest: int
    codec: str
    start: int
    """Where it decodes to, from the start of the shard as it lies on a device."""
    decoded_size: int


@dataclass(frozen=True, slots=True)
class TensorIndex:
    """Everything that a loader must know of a checkpoint."""

    version: int
    model: str
    """The name given at conversion."""
    architecture: str
    """Class of the model; `NO_ARCHITECTURE` for a plain dict of tensors."""
    dtype: str
    """The float dtype that holds most bytes."""
    context_tokens: int
    chunk_bytes: int
    """What a digest covers."""
    created: int
    """Unix time of the conversion."""
    shards: tuple[Shard, ...]
    tensors: tuple[TensorEntry, ...]
    """In the order in which the forward pass needs them."""
    aliases: tuple[tuple[str, str], ...] = ()
    """Tied tensors: (name, name of the stored tensor)."""
    codec: str = CODEC

    @property
    def size(self) -> int:
        """Bytes of all shards, which is what the checkpoint takes on a device."""
        return sum(shard.size for shard in self.shards)

    @property
    def file_size(self) -> int:
        """Bytes of all shard files."""
        return sum(shard.file_size for shard in self.shards)

    @property
    def is_encoded(self) -> bool:
        """Whether some chunk has to be decoded."""
        return self.codec != RAW

    def file_chunks(self, shard: int) -> tuple[FileChunk, ...]:
        """Return the file chunks of `shard` in order."""
        return self.chunks_within(shard, 0, self.shards[shard].file_size)

    def chunks_within(self, shard: int, offset: int, size: int) -> tuple[FileChunk, ...]:
        """Return the file chunks of a range of the shard's file, which begins and ends with some."""
        if self.shards[shard].stored:
            places = self.chunk_offsets(shard)
            first, last = bisect_left(places, offset), bisect_left(places, offset + size)
        else:
            first = offset // self.chunk_bytes
            last = chunk_count(offset + size, self.chunk_bytes)
        return self.chunks_of(shard, first, last, offset)

    def chunk_offsets(self, shard: int) -> Sequence[int]:
        """Return where the chunks of `shard` begin in its file, and where the last one ends."""
        found = self.shards[shard]
        if found.stored:
            return _offsets(found.stored)
        return (*range(0, found.size, self.chunk_bytes), found.size)

    def chunks_of(self, shard: int, first: int, last: int, offset: int) -> tuple[FileChunk, ...]:
        """Return chunks [first, last) of `shard`, which begin at `offset` of its file."""
        found, step = self.shards[shard], self.chunk_bytes
        starts = range(first * step, last * step, step)
        sizes = [min(step, found.size - start) for start in starts]
        stored: Sequence[int] = found.stored[first:last] or sizes
        codecs = found.codecs[first:last] or (RAW,) * len(sizes)
        offsets, digests = accumulate(stored, initial=offset), found.digests[first:last]
        columns = zip(offsets, stored, digests, codecs, starts, sizes, strict=False)
        return tuple(FileChunk(shard, *row) for row in columns)

    def shard_base(self, shard: int) -> int:
        """Return where `shard` begins when the shards lie one after another."""
        return sum(before.size for before in self.shards[:shard])

    @property
    def is_model(self) -> bool:
        """Whether these are the weights of a model, and not a plain dict of tensors."""
        return self.architecture != NO_ARCHITECTURE

    def tensors_in(self, shard: int, offset: int, size: int) -> tuple[str, ...]:
        """Return the names of the tensors that have bytes in this range of a shard."""
        return tuple(
            entry.name
            for entry in self.tensors
            if entry.shard == shard
            and entry.size > 0
            and entry.offset < offset + size
            and offset < entry.offset + entry.size
        )


@lru_cache(maxsize=64)
def _offsets(stored: tuple[int, ...]) -> tuple[int, ...]:
    """Return where chunks of these sizes begin, and where the last one ends."""
    return tuple(accumulate(stored, initial=0))


def shard_name(number: int) -> str:
    """Return the file name of shard `number`."""
    return f"shard-{number:05d}.bin"


def chunk_count(size: int, chunk_bytes: int) -> int:
    """Return how many chunks cover `size` bytes."""
    return -(-size // chunk_bytes)


def tensor_size(dtype: str, shape: Iterable[int]) -> int:
    """Return the bytes of a tensor; `dtype` is one of `DTYPE_BYTES`."""
    return math.prod(shape) * DTYPE_BYTES[dtype]


# --- JSON ---------------------------------------------------------------------------------------


class _Version(msgspec.Struct):
    version: int


class _JsonShard(msgspec.Struct, forbid_unknown_fields=True, omit_defaults=True):
    name: str
    size: _Count
    digests: tuple[_Digest, ...]
    codecs: tuple[str, ...] = ()
    stored: tuple[_Count, ...] = ()


class _JsonTensor(msgspec.Struct, forbid_unknown_fields=True):
    name: str
    dtype: str
    shape: tuple[_Count, ...]
    shard: _Count
    offset: _Count
    size: _Count


class _JsonIndex(msgspec.Struct, forbid_unknown_fields=True):
    version: int
    model: str
    architecture: str
    dtype: str
    context_tokens: _Count
    codec: str
    chunk_bytes: _Count
    created: int
    shards: tuple[_JsonShard, ...]
    tensors: tuple[_JsonTensor, ...]
    aliases: tuple[tuple[str, str], ...]


def to_json(index: TensorIndex) -> bytes:
    """Return the index as it is stored."""
    shards = tuple(
        _JsonShard(
            shard.name,
            shard.size,
            tuple(f"{digest:016x}" for digest in shard.digests),
            shard.codecs,
            shard.stored,
        )
        for shard in index.shards
    )
    tensors = tuple(
        _JsonTensor(entry.name, entry.dtype, entry.shape, entry.shard, entry.offset, entry.size)
        for entry in index.tensors
    )
    return msgspec.json.encode(
        _JsonIndex(
            version=index.version,
            model=index.model,
            architecture=index.architecture,
            dtype=index.dtype,
            context_tokens=index.context_tokens,
            codec=index.codec,
            chunk_bytes=index.chunk_bytes,
            created=index.created,
            shards=shards,
            tensors=tensors,
            aliases=index.aliases,
        )
    )


def from_json(data: bytes, path: str) -> TensorIndex:
    """Parse and check a stored index; `path` names it in errors.

    Raises:
        CheckpointFormatError: it is not an index, of another version, or contradicts itself.
    """
    try:
        version = msgspec.json.decode(data, type=_Version).version
        if version not in (VERSION, ENCODED_VERSION):
            raise CheckpointFormatError(
                path,
                f"has format version {version}, this release reads {VERSION} and "
                f"{ENCODED_VERSION}; convert again",
            )
        index = _from_wire(msgspec.json.decode(data, type=_JsonIndex))
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise CheckpointFormatError(
            path, f"is no tensor index: {error}; convert it again"
        ) from error
    problem = _contradiction(index)
    if problem is not None:
        raise CheckpointFormatError(path, problem)
    return index


def _from_wire(wire: _JsonIndex) -> TensorIndex:
    return TensorIndex(
        version=wire.version,
        model=wire.model,
        architecture=wire.architecture,
        dtype=wire.dtype,
        context_tokens=wire.context_tokens,
        chunk_bytes=wire.chunk_bytes,
        created=wire.created,
        shards=tuple(
            Shard(
                shard.name,
                shard.size,
                tuple(int(digest, 16) for digest in shard.digests),
                shard.codecs,
                shard.stored,
            )
            for shard in wire.shards
        ),
        tensors=tuple(
            TensorEntry(t.name, t.dtype, t.shape, t.shard, t.offset, t.size) for t in wire.tensors
        ),
        aliases=wire.aliases,
        codec=wire.codec,
    )


# --- checks -------------------------------------------------------------------------------------


def _contradiction(index: TensorIndex) -> str | None:
    """Return the first thing that is wrong with `index`."""
    wanted = EXPONENT if index.version == ENCODED_VERSION else RAW
    if index.codec != wanted:
        return (
            f"has codec {index.codec!r}, this release reads {wanted!r} in version {index.version}"
        )
    if index.context_tokens < 1:
        return "has no context length"
    if index.chunk_bytes < PAGE or index.chunk_bytes % PAGE:
        return f"chunk size {index.chunk_bytes} is not a multiple of {PAGE}"
    if index.is_encoded and index.chunk_bytes > DECODED_BYTES_MAX:
        return f"chunk size {index.chunk_bytes} is more than {DECODED_BYTES_MAX}"
    if not index.shards:
        return "names no shard"
    problems = (
        *(_shard_problem(index, number) for number in range(len(index.shards))),
        *(_tensor_problem(index, entry) for entry in index.tensors),
        _name_problem(index),
        _overlap(index.tensors),
    )
    return next((problem for problem in problems if problem is not None), None)


def _shard_problem(index: TensorIndex, number: int) -> str | None:
    shard = index.shards[number]
    if shard.name != shard_name(number):
        return f"shard {number} has the name {shard.name!r}"
    if shard.size < PAGE or shard.size % PAGE:
        return f"{shard.name}: size {shard.size} is not a multiple of {PAGE}"
    wanted = chunk_count(shard.size, index.chunk_bytes)
    if len(shard.digests) != wanted:
        return f"{shard.name}: {len(shard.digests)} digests for {wanted} chunks"
    problem = _codec_problem(index, number)
    return problem and f"{shard.name}: {problem}"


def _codec_problem(index: TensorIndex, number: int) -> str | None:
    shard = index.shards[number]
    wanted = len(shard.digests) if index.is_encoded else 0
    if len(shard.codecs) != wanted or len(shard.stored) != wanted:
        return f"{len(shard.codecs)} codecs and {len(shard.stored)} sizes for {wanted} chunks"
    # Not by `file_chunks`, which finds chunks by the sizes that are to be checked here.
    columns = zip(shard.codecs, shard.stored, strict=True)
    for place, (codec, stored) in enumerate(columns):
        decoded = min(index.chunk_bytes, shard.size - place * index.chunk_bytes)
        if codec not in CODECS:
            return f"unknown codec {codec!r}"
        if stored < PAGE or stored % PAGE or stored > decoded:
            return f"a chunk of {decoded} bytes is stored in {stored}"
        if codec == RAW and stored != decoded:
            return f"a raw chunk of {decoded} bytes is stored in {stored}"
    return None


def _tensor_problem(index: TensorIndex, entry: TensorEntry) -> str | None:
    problem = _place_problem(index, entry)
    if entry.dtype not in DTYPE_BYTES:
        problem = f"unknown dtype {entry.dtype!r}"
    elif len(entry.shape) > _DIMENSIONS_MAX:
        problem = f"{len(entry.shape)} dimensions"
    elif entry.size != tensor_size(entry.dtype, entry.shape):
        problem = f"{entry.size} bytes contradict its shape and dtype"
    return problem and f"tensor {entry.name}: {problem}"


def _place_problem(index: TensorIndex, entry: TensorEntry) -> str | None:
    if entry.shard >= len(index.shards):
        return f"there is no shard {entry.shard}"
    if entry.offset % TENSOR_ALIGNMENT:
        return f"offset {entry.offset} is not aligned"
    if entry.offset + entry.size > index.shards[entry.shard].size:
        return "ends beyond its shard"
    return None


def _name_problem(index: TensorIndex) -> str | None:
    stored = {entry.name for entry in index.tensors}
    if len(stored) != len(index.tensors):
        return "two tensors have one name"
    aliases = dict(index.aliases)
    if len(aliases) != len(index.aliases) or not stored.isdisjoint(aliases):
        return "an alias has the name of another tensor"
    if not stored.issuperset(aliases.values()):
        return "an alias names a tensor that is not stored"
    return None


def _overlap(tensors: tuple[TensorEntry, ...]) -> str | None:
    placed = sorted((entry for entry in tensors if entry.size), key=lambda e: (e.shard, e.offset))
    for before, after in pairwise(placed):
        if before.shard == after.shard and before.offset + before.size > after.offset:
            return f"tensors {before.name} and {after.name} overlap"
    return None
