"""The exponent codec: the exponents of floats in two steps of two and three bits, the rest as it is.

Trained weights use few exponents: three of them cover three quarters of the elements, ten nearly
all. So each element has a 2-bit *first* code, which names one of the three most common exponents of
the chunk or sends to the *second* code, which has 3 bits, exists for those elements only, and names
one of the next seven or sends to a plain byte, the *third*. That is 2.7 bits where the entropy is
2.6, and no bit depends on the one before: the place of an element's second code is the number of
first codes before it that were sent on, which a GPU counts by one prefix sum over a warp. For each
block of 4,096 elements the chunk stores both counts, so a warp decodes a block by itself.

To split an element, its 32-bit word is rotated left by one bit: then every element, of one, two or
four bytes, begins with its exponent (the sign went round to the end of a neighbour, and comes back
by rotating right). What follows the exponent is stored in planes of 16, 8, 4, 2 and 1 bits.

An encoded chunk, little-endian, every part at a multiple of 16 bytes, so that all offsets follow
from three numbers of the header:

    header      64 bytes: magic, format, decoded bytes, second codes, thirds, ten exponents
    rest        a plane for each of the format's widths, the widest first: the low bits come first
    first       a plane of 2 bits
    directory   for each block: second codes and thirds in the blocks before it, two 32-bit numbers
    second      a triple stream
    third       bytes

The functions here are the reference for the kernels in kernels/, and the way on a CPU.
"""

import struct
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from sllm_node.codec.planes import (
    Bytes,
    align,
    pack,
    pack_triples,
    plane_bytes,
    triples_bytes,
    unpack,
    unpack_triples,
)
from sllm_node.core.errors import CodecError

BLOCK: Final = 4096
"""Elements that one warp decodes."""
HEADER_BYTES: Final = 64
DECODED_BYTES_MAX: Final = 1 << 28

_MAGIC: Final = b"SLX1"
_HEADER: Final = struct.Struct("<4sB3xQII10s30x")
_FIRST: Final = 3
"""Exponents that a first code names; as a code: look at the second one."""
_NAMED: Final = 10
"""Exponents that have a code."""
_IS_ESCAPED: Final = np.array((0, 0, 0, 1), np.uint8)
_SAMPLE: Final = 1 << 16
"""Elements that choose the exponents of a chunk."""


@dataclass(frozen=True, slots=True)
class FloatFormat:
    """How the bits of a float lie, the sign apart."""

    name: str
    """Of the codec, as an index has it."""
    number: int
    """In headers."""
    width: int
    """Bytes of an element."""
    exponent_bits: int
    rest: tuple[int, ...]
    """Widths of the planes for the other bits, which add up to them."""

    @property
    def shift(self) -> int:
        """Bits after the exponent in a rotated element."""
        return 8 * self.width - self.exponent_bits

    @property
    def least_bits(self) -> int:
        """Bits that an element takes at least: the first code and what is no exponent."""
        return 2 + self.shift


BF16: Final = FloatFormat("exp-bf16", 1, 2, 8, (8,))
F16: Final = FloatFormat("exp-f16", 2, 2, 5, (8, 2, 1))
F32: Final = FloatFormat("exp-f32", 3, 4, 8, (16, 8))
F8_E4M3: Final = FloatFormat("exp-f8e4m3", 4, 1, 4, (4,))
F8_E5M2: Final = FloatFormat("exp-f8e5m2", 5, 1, 5, (2, 1))
FORMATS: Final = {f.name: f for f in (BF16, F16, F32, F8_E4M3, F8_E5M2)}


@dataclass(frozen=True, slots=True)
class _Header:
    seconds: int
    thirds: int
    named: Bytes
    """The ten exponents."""


@dataclass(frozen=True, slots=True)
class _Places:
    """Where the parts of an encoded chunk begin, and where it ends."""

    rest: tuple[int, ...]
    first: int
    directory: int
    second: int
    third: int
    end: int


def _places(layout: FloatFormat, count: int, seconds: int, thirds: int) -> _Places:
    offset = HEADER_BYTES
    rest = []
    for bits in layout.rest:
        rest.append(offset)
        offset += plane_bytes(count, bits)
    first = offset
    directory = first + plane_bytes(count, 2)
    second = directory + align(-(-count // BLOCK) * 8)
    third = second + triples_bytes(seconds)
    return _Places(tuple(rest), first, directory, second, third, third + align(thirds))


def encode(layout: FloatFormat, data: memoryview) -> Bytes:
    """Return `data` encoded; its size is a multiple of 4 bytes.

    Whatever the bytes are, `decode` gives them back; how small they get depends on them.
    """
    assert len(data) % 4 == 0
    assert len(data) <= DECODED_BYTES_MAX
    words = np.frombuffer(data, "<u4")
    elements = (words << 1 | words >> 31).view(f"<u{layout.width}")
    exponents = (elements >> layout.shift).astype(np.uint8)
    named = _common(exponents)
    symbols = _symbols(named, exponents)
    escaped = np.flatnonzero(symbols >= _FIRST)
    later = symbols[escaped]
    third = escaped[later == _NAMED]
    places = _places(layout, len(elements), len(escaped), len(third))
    encoded = np.zeros(places.end, np.uint8)
    counts = (layout.number, len(data), len(escaped), len(third))
    encoded[:HEADER_BYTES] = np.frombuffer(_HEADER.pack(_MAGIC, *counts, bytes(named)), np.uint8)
    _pack_rest(layout, elements, places, encoded)
    symbols[escaped] = _FIRST
    pack(symbols, 2, encoded[places.first : places.directory])
    directory = _directory(len(elements), escaped, third)
    encoded[places.directory : places.directory + len(directory)] = directory
    pack_triples((later - 2 & 7).astype(np.uint8), encoded[places.second : places.third])
    encoded[places.third : places.third + len(third)] = exponents[third]
    return encoded


def decode(layout: FloatFormat, encoded: Bytes, size: int) -> Bytes:
    """Return the `size` bytes that `encoded` stands for; what follows its end is not looked at.

    Raises:
        CodecError: it is damaged.
    """
    decoded = np.empty(size, np.uint8)
    decode_into(layout, encoded, decoded)
    return decoded


def decode_into(layout: FloatFormat, encoded: Bytes, decoded: Bytes) -> None:
    """Fill `decoded`, aligned to 4 bytes, with what `encoded` stands for.

    Raises:
        CodecError: it is damaged; `decoded` is as it was.
    """
    size = len(decoded)
    header = _read_header(layout, encoded, size)
    count = size // layout.width
    places = _places(layout, count, header.seconds, header.thirds)
    if places.end > len(encoded):
        raise CodecError(layout.name, f"it needs {places.end} bytes and has {len(encoded)}")
    first = encoded[places.first : places.first + -(-count // 4)]
    escaped = np.flatnonzero(_each_first(first, _IS_ESCAPED)[:count].view(np.bool_))
    second = unpack_triples(encoded[places.second : places.third], header.seconds)
    third = np.flatnonzero(second == 0)
    if len(escaped) != header.seconds or len(third) != header.thirds:
        raise CodecError(layout.name, "its header does not count the codes that it has")
    directory = _directory(count, escaped, escaped[third])
    if not np.array_equal(encoded[places.directory :][: len(directory)], directory):
        raise CodecError(layout.name, "its directory is not that of its codes")
    later = np.take(np.concatenate((header.named[:1], header.named[_FIRST:])), second)
    later[third] = encoded[places.third : places.third + header.thirds]
    exponents = _each_first(first, header.named[: _FIRST + 1])[:count]
    exponents[escaped] = later
    elements = exponents.astype(f"<u{layout.width}")
    elements <<= layout.shift
    _unpack_rest(layout, encoded, places, elements)
    words = elements.view("<u4")
    np.bitwise_or(words >> 1, words << 31, out=decoded[: size // 4 * 4].view("<u4"))


def _each_first(first: Bytes, values: Bytes) -> Bytes:
    """Return for each 2-bit code of a plane the one of four `values`."""
    codes = np.arange(256)[:, None] >> np.array((0, 2, 4, 6)) & 3
    return np.take(values[codes].view("<u4")[:, 0], first).view(np.uint8)


def _common(exponents: Bytes) -> Bytes:
    """Return the ten most common exponents, those of a sample if there are many elements."""
    step = max(1, len(exponents) // _SAMPLE)
    counts = np.bincount(exponents[::step], minlength=256)
    return np.argsort(-counts, kind="stable")[:_NAMED].astype(np.uint8)


def _symbols(named: Bytes, exponents: Bytes) -> Bytes:
    """Return for each exponent its number among the named ones, or how many these are."""
    numbers = np.full(256, _NAMED, np.uint8)
    numbers[named] = np.arange(_NAMED, dtype=np.uint8)
    if len(exponents) % 2:
        return np.take(numbers, exponents)
    pairs = numbers.astype("<u2")[:, None] << 8 | numbers  # two at once: twice as fast
    return np.take(pairs.reshape(-1), exponents.view("<u2")).view(np.uint8)


def _directory(count: int, escaped: npt.NDArray[np.intp], third: npt.NDArray[np.intp]) -> Bytes:
    """Return for each block how many are escaped, and third, in the blocks before it.

    A kernel finds its place by these numbers.
    """
    starts = np.arange(0, count, BLOCK)
    before = np.searchsorted(escaped, starts), np.searchsorted(third, starts)
    return np.stack(before, axis=1).astype("<u4").reshape(-1).view(np.uint8)


def _pack_rest(
    layout: FloatFormat, elements: npt.NDArray[Any], places: _Places, encoded: Bytes
) -> None:
    done = 0
    for bits, start in zip(layout.rest, places.rest, strict=True):
        values = (elements >> done).astype(f"<u{max(1, bits // 8)}")
        if bits < 8:
            values &= (1 << bits) - 1
        pack(values, bits, encoded[start : start + plane_bytes(len(elements), bits)])
        done += bits


def _unpack_rest(
    layout: FloatFormat, encoded: Bytes, places: _Places, elements: npt.NDArray[Any]
) -> None:
    done = 0
    for bits, start in zip(layout.rest, places.rest, strict=True):
        plane = encoded[start : start + plane_bytes(len(elements), bits)]
        values = unpack(plane, bits, len(elements))
        elements |= values.astype(elements.dtype) << done if done else values
        done += bits


def _read_header(layout: FloatFormat, encoded: Bytes, size: int) -> _Header:
    if len(encoded) < HEADER_BYTES:
        raise CodecError(layout.name, f"{len(encoded)} bytes hold no header")
    magic, number, decoded, seconds, thirds, named = _HEADER.unpack(
        encoded[:HEADER_BYTES].tobytes()
    )
    if magic != _MAGIC or number != layout.number:
        raise CodecError(layout.name, "the header is of no such chunk")
    if decoded != size:
        raise CodecError(layout.name, f"it holds {decoded} bytes where {size} are expected")
    if not thirds <= seconds <= size // layout.width:
        raise CodecError(layout.name, "its header counts more codes than elements")
    return _Header(seconds, thirds, np.frombuffer(named, np.uint8))
