"""Small numbers packed side by side: the planes that an encoded chunk is made of. Pure numpy.

A plane holds one number of `bits` bits for each element: bytes and halves as they are, narrower ones
packed from the low bits up, so that a thread finds those of eight elements in one aligned word. A
*triple stream* holds 3-bit numbers without gaps, eight in three bytes.
"""

from functools import cache
from typing import Any, Final

import numpy as np
import numpy.typing as npt

Bytes = npt.NDArray[np.uint8]

ALIGNMENT: Final = 16
"""Bytes; every plane begins at a multiple, for the widest load that a GPU has."""


def align(size: int) -> int:
    """Return the smallest multiple of `ALIGNMENT` that is not below `size`."""
    return -(-size // ALIGNMENT) * ALIGNMENT


def plane_bytes(count: int, bits: int) -> int:
    """Return the bytes of a plane for `count` elements, padding included."""
    return align(-(-count // 16) * 16 * bits // 8)


def pack(values: npt.NDArray[Any], bits: int, plane: Bytes) -> None:
    """Write `values`, each below 2**bits, into `plane`, which is zero where they end."""
    if bits >= 8:
        plane[: len(values) * bits // 8] = values.astype(f"<u{bits // 8}", copy=False).view(
            np.uint8
        )
        return
    per_byte = 8 // bits
    padded = np.zeros(-(-len(values) // 8) * 8, np.uint8)
    padded[: len(values)] = values
    words = padded.view(f"<u{per_byte}")
    packed = words.copy()
    for i in range(1, per_byte):
        packed |= words >> ((8 - bits) * i)
    plane[: len(packed)] = packed.astype(np.uint8)


def unpack(plane: Bytes, bits: int, count: int) -> npt.NDArray[Any]:
    """Return the `count` numbers that `pack` wrote."""
    if bits >= 8:
        return plane[: count * bits // 8].view(f"<u{bits // 8}")
    return np.take(_spread(bits), plane[: -(-count * bits // 8)]).view(np.uint8)[:count]


@cache
def _spread(bits: int) -> npt.NDArray[Any]:
    """Return for each packed byte its numbers, one a byte, as one word."""
    packed = np.arange(256)
    numbers = [(packed >> shift & (1 << bits) - 1).astype(np.uint8) for shift in range(0, 8, bits)]
    return np.stack(numbers, axis=1).copy().view(f"<u{8 // bits}")[:, 0]


def triples_bytes(count: int) -> int:
    """Return the bytes of a triple stream of `count` numbers.

    Eight bytes may be read from wherever one of them begins, also from where the next one would.
    """
    return align(-(-3 * count // 32) * 4 + 8)


def pack_triples(values: Bytes, stream: Bytes) -> None:
    """Write `values`, each below 8, into `stream`, which is zero where they end."""
    padded = np.zeros(-(-len(values) // 8) * 8, np.uint8)
    padded[: len(values)] = values
    words = padded.view("<u8")
    words = (words | words >> 5) & 0x003F003F003F003F
    words = (words | words >> 10) & 0x00000FFF00000FFF
    words = (words | words >> 20) & 0xFFFFFF
    packed = words.view(np.uint8).reshape(-1, 8)[:, :3].reshape(-1)
    stream[: -(-3 * len(values) // 8)] = packed[: -(-3 * len(values) // 8)]


def unpack_triples(stream: Bytes, count: int) -> Bytes:
    """Return the `count` numbers that `pack_triples` wrote."""
    groups = -(-count // 8)
    wide = np.zeros((groups, 4), np.uint8)
    wide[:, :3] = stream[: 3 * groups].reshape(groups, 3)
    words = wide.view("<u4")[:, 0]
    halves = np.empty((groups, 2), np.uint16)
    halves[:, 0] = words & 0xFFF
    halves[:, 1] = words >> 12
    return np.take(_spread_triples(), halves.reshape(-1)).view(np.uint8)[:count]


@cache
def _spread_triples() -> npt.NDArray[Any]:
    packed = np.arange(4096)
    numbers = [(packed >> shift & 7).astype(np.uint8) for shift in range(0, 12, 3)]
    return np.stack(numbers, axis=1).copy().view("<u4")[:, 0]
