"""Sizes in bytes, as people write them and as machines align them."""

import re
from fractions import Fraction
from typing import Final

KIB: Final = 1 << 10
MIB: Final = 1 << 20
GIB: Final = 1 << 30
PAGE: Final = 4 * KIB
"""The alignment that O_DIRECT asks of file offsets, sizes and buffers, in bytes."""

_FACTORS: Final = {
    "": 1, "b": 1,
    "kib": KIB, "mib": MIB, "gib": GIB, "tib": 1 << 40,
    "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12,
}  # fmt: skip
LARGEST_SIZE: Final = (1 << 63) - 1
"""What a file or a memory can have at most."""
_DIGITS_MAX: Final = 30
_SIZE: Final = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([a-zA-Z]*)\s*")


def align_up(value: int, alignment: int) -> int:
    """Return the smallest multiple of `alignment` that is not below `value`."""
    return -(-value // alignment) * alignment


def parse_size(text: str | int) -> int:
    """Return the bytes that `text` names: `"16MiB"`, `"1.5 GB"`, `4096`.

    Raises:
        ValueError: the text names no size, or not a whole number of bytes.
    """
    if isinstance(text, int):
        if isinstance(text, bool) or text < 0:
            raise ValueError(f"{text!r} is no size in bytes")
        return _bounded(text)
    match = _SIZE.fullmatch(text)
    if match is None or match[2].lower() not in _FACTORS:
        raise ValueError(f'{text[:40]!r} is no size; write a number with a unit, as in "16MiB"')
    if len(match[1]) > _DIGITS_MAX:
        return _bounded(LARGEST_SIZE + 1)
    size = Fraction(match[1]) * _FACTORS[match[2].lower()]
    if size.denominator != 1:
        raise ValueError(f"{text!r} is not a whole number of bytes")
    return _bounded(int(size))


def _bounded(size: int) -> int:
    if size > LARGEST_SIZE:
        raise ValueError(f"is no size of a machine: above {format_size(LARGEST_SIZE)}")
    return size


def format_size(size: float) -> str:
    """Return `size` bytes in the largest binary unit that leaves one digit before the point."""
    for factor, unit in ((1 << 40, "TiB"), (GIB, "GiB"), (MIB, "MiB"), (KIB, "KiB")):
        if abs(size) >= factor:
            return f"{size / factor:.1f} {unit}"
    return f"{size:.0f} B"


def format_count(count: int) -> str:
    """Return a count of things in thousands, millions or billions, three digits of it."""
    for factor, unit in ((10**9, "billion"), (10**6, "million"), (10**3, "thousand")):
        if count >= factor:
            return f"{count / factor:.3g} {unit}"
    return str(count)


def format_rate(bytes_per_s: float) -> str:
    """Return a bandwidth in decimal GB/s or MB/s, the unit that links and disks are sold in."""
    if bytes_per_s >= 1e9:
        return f"{bytes_per_s / 1e9:.2f} GB/s"
    return f"{bytes_per_s / 1e6:.1f} MB/s"
