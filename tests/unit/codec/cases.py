"""Bytes that a codec must give back, and ways to damage what it made of them."""

import numpy as np

from sllm_node.codec import exponent
from sllm_node.codec.exponent import BLOCK, FORMATS
from sllm_node.codec.planes import pack_triples, unpack_triples

FORMAT_NAMES = tuple(FORMATS)


def numbers(layout, count, seed=0, scale=0.02):
    """Return `count` Gaussian elements as bytes."""
    drawn = np.random.default_rng(seed).standard_normal(count) * scale
    if layout.width == 4:
        return drawn.astype("<f4").tobytes()
    if layout is exponent.F16:
        return drawn.astype("<f2").tobytes()
    if layout is exponent.BF16:
        return (drawn.astype("<f4").view("<u4") >> 16).astype("<u2").tobytes()
    halves = (drawn * 64).astype("<f2").view("<u2")
    return (halves >> (8 if layout is exponent.F8_E5M2 else 7)).astype(np.uint8).tobytes()


def every_pattern(layout):
    """Return every bit pattern of an element: NaNs, infinities, denormals and zeros among them."""
    if layout.width == 4:  # every upper half, with a lower half that tells them apart
        upper = np.arange(1 << 16, dtype="<u4")
        return (upper << 16 | upper ^ 0x5A5A).astype("<u4").tobytes()
    return np.arange(1 << 8 * layout.width, dtype=f"<u{layout.width}").tobytes()


def exponents(layout, wanted):
    """Return elements with the exponents `wanted` and other bits that vary."""
    wanted = np.asarray(wanted, np.uint64)
    below = 8 * layout.width - 1 - layout.exponent_bits
    other = np.random.default_rng(1).integers(0, 1 << below, len(wanted), dtype=np.uint64)
    sign = (np.arange(len(wanted), dtype=np.uint64) % 3 == 0).astype(np.uint64)
    bits = sign << (8 * layout.width - 1) | wanted << below | other
    return bits.astype(f"<u{layout.width}").tobytes()


def cases(layout):
    """Return name → bytes."""
    most = 1 << layout.exponent_bits
    noise = np.random.default_rng(2).integers(0, 256, 5 * BLOCK, np.uint8).tobytes()
    found = {
        "empty": b"",
        "one word": noise[:4],
        "three words": noise[:12],
        "every pattern": every_pattern(layout),
        "shuffled": bytes(np.random.default_rng(3).permutation(np.frombuffer(noise, np.uint8))),
        "zeros": bytes(3 * BLOCK * layout.width),
        "ones": b"\xff" * (2 * BLOCK * layout.width),
        "constant": noise[:4] * BLOCK,
        "uniform exponents": exponents(layout, np.arange(3 * BLOCK) % most),
        "only second codes": exponents(layout, 3 + np.arange(2 * BLOCK) % 7),
        "all thirds but a sample": _hidden(layout),
        "gaussian": numbers(layout, 9 * BLOCK + 516),
        "mixed scales": b"".join(numbers(layout, 700, i, 2.0**-i) for i in range(0, 24, 2)),
    }
    for count in (4, 508, 512, 516, BLOCK - 4, BLOCK, BLOCK + 4, 8 * BLOCK + 4):
        found[f"{count} elements"] = numbers(layout, count, count)
    return {name: data[: len(data) // 4 * 4] for name, data in found.items()}


def _hidden(layout):
    """Return elements of which those looked at for a table have other exponents than the rest."""
    count = 1 << 17
    kinds = np.full(count, (1 << layout.exponent_bits) - 1)
    kinds[::2] = np.arange(count // 2) % 10
    return exponents(layout, kinds)


def with_unused_codes(layout, encoded, size):
    """Return `encoded` with second codes before the first, which header and directory both count."""
    header = exponent._read_header(layout, encoded, size)
    count, more = size // layout.width, 8
    old = exponent._places(layout, count, header.seconds, header.thirds)
    new = exponent._places(layout, count, header.seconds + more, header.thirds)
    made = np.zeros(new.end, np.uint8)
    made[: old.second] = encoded[: old.second]
    made[16:20] = np.array([header.seconds + more], "<u4").view(np.uint8)
    made[old.directory : old.second].view("<u4")[: 2 * -(-count // BLOCK) : 2] += more
    codes = unpack_triples(encoded[old.second : old.third], header.seconds)
    padded = np.concatenate((np.ones(more, np.uint8), codes))
    pack_triples(padded, made[new.second : new.third])
    made[new.third :] = encoded[old.third : old.end]
    return made


def damaged(encoded, random):
    """Return `encoded` with a few bytes changed, or cut."""
    made = bytearray(encoded)
    kind = random.integers(0, 4)
    if kind == 0:
        return bytes(made[: int(random.integers(0, len(made) + 1)) // 16 * 16])
    low, high = ((0, 64), (16, 24), (64, max(65, len(made))))[kind - 1]
    for _ in range(int(random.integers(1, 12))):
        made[int(random.integers(low, high)) % len(made)] = int(random.integers(0, 256))
    return bytes(made)
