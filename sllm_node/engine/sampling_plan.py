"""How the rows of a step are drawn, as one buffer of bytes for the device, and back to `Drawn`.

Rows become a few flat arrays behind each other in one buffer, so that a device gets them by one
copy; what the device has drawn comes back as one array. The sizes of the arrays are the `Variant`:
it alone decides which operations `draw` launches and with which shapes, so steps of one variant can
share a CUDA graph. Only rows that draw are in the arrays, first those without filters; arrays that
are padded repeat their first element, which then is computed, and written, more than once.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from sllm_node.engine.adjustments import Adjustments, is_adjusted
from sllm_node.engine.sampling import Drawn, SamplingRow

Bytes = npt.NDArray[np.uint8]
Arrays = dict[str, npt.NDArray[Any]]

ADJUSTED_MIN: Final = 256
"""Padded, there are as many adjusted logits as this times a power of two."""
_TEMPERATURE_MIN: Final = 1e-5


@dataclass(frozen=True, slots=True)
class Field:
    """One array of the buffer: bytes `start` to `end`."""

    name: str
    dtype: str
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class Variant:
    """The sizes of a step; they decide the operations that draw it."""

    rows: int
    """Of the logits, padding included."""
    plain: int
    """Rows that draw without filters."""
    filtered: int
    """Rows that draw after top-k, top-p or min-p."""
    adjusted: int
    """Logits that penalties or biases change."""
    told: int
    """Rows whose log probabilities are wanted."""
    top: int
    """Most likely tokens that are told with each of these."""

    def fields(self) -> Iterator[Field]:
        """Yield the arrays in their order; eight-byte numbers first, so all are aligned."""
        drawn = self.plain + self.filtered
        start = 0
        for name, dtype, count in (
            ("row", "int64", drawn), ("seed", "int64", drawn), ("index", "int64", drawn),
            ("top_k", "int64", self.filtered), ("top_p", "float64", self.filtered),
            ("min_p", "float64", self.filtered), ("told", "int64", self.told),
            ("position", "int64", self.adjusted), ("temperature", "float32", drawn),
            ("factor", "float32", self.adjusted), ("minus", "float32", self.adjusted),
            ("bias", "float32", self.adjusted),
        ):  # fmt: skip
            end = start + count * np.dtype(dtype).itemsize
            yield Field(name, dtype, start, end)
            start = end

    @property
    def size(self) -> int:
        """Of the buffer, in bytes."""
        return max(field.end for field in self.fields())


class SamplingPlan:
    """How to draw one step's tokens.

    `padded` is the number of rows of the logits when there are more than `rows`; every other size
    is then rounded up as well, so that there are few variants.
    """

    def __init__(
        self, rows: Sequence[SamplingRow], vocabulary: int, padded: int | None = None
    ) -> None:
        assert padded is None or padded >= len(rows)
        assert all(row.adjustments or not is_adjusted(row.parameters) for row in rows), (
            "a row lacks its adjustments"
        )
        self._count = len(rows)
        self._wanted = [
            (i, min(row.logprobs, vocabulary))
            for i, row in enumerate(rows)
            if row.logprobs is not None
        ]
        plain = [i for i, row in enumerate(rows) if _draws(row) and not _filters(row)]
        filtered = [i for i, row in enumerate(rows) if _draws(row) and _filters(row)]
        adjusted = [
            (i, row.adjustments.within(vocabulary))
            for i, row in enumerate(rows)
            if row.adjustments is not None
        ]
        self.variant = _variant(
            self._count,
            (len(plain), len(filtered)),
            sum(len(a.tokens) for _, a in adjusted),
            [top for _, top in self._wanted],
        )
        if padded is not None:
            self.variant = _rounded_up(self.variant, padded, vocabulary)
        plain = _filled_up(plain, self.variant.plain)
        filtered = _filled_up(filtered, self.variant.filtered)
        told = _filled_up([i for i, _ in self._wanted], self.variant.told)
        self._arrays: Arrays = {
            **_drawing(rows, plain + filtered),
            **_filtering([rows[i] for i in filtered], vocabulary),
            **_adjusting(adjusted, vocabulary, self.variant.adjusted),
            "told": np.array(told, np.int64),
        }

    def write(self, buffer: Bytes) -> None:
        """Fill `buffer`, of `variant.size` bytes, aligned to 8; it may be pinned."""
        for field in self.variant.fields():
            buffer[field.start : field.end].view(field.dtype)[:] = self._arrays[field.name]

    def buffer(self) -> Bytes:
        """Return the plan in memory of its own."""
        made = np.empty(self.variant.size, np.uint8)
        self.write(made)
        return made

    def read(self, packed: npt.NDArray[np.int64]) -> list[Drawn]:
        """Return what was drawn for each row, from what `draw` returned, once it is here."""
        variant = self.variant
        found = [Drawn(token) for token in packed[: self._count].tolist()]
        if not variant.told:
            return found
        shape = (variant.told, variant.top)
        ends = np.cumsum([variant.rows, variant.told, variant.told * variant.top])
        _, own, best, bits = np.split(packed, ends)
        logprobs = _floats(own).tolist()
        names, values = best.reshape(shape), _floats(bits).reshape(shape)
        for k, (i, top) in enumerate(self._wanted):
            if found[i].token >= 0:
                pairs = zip(names[k, :top].tolist(), values[k, :top].tolist(), strict=True)
                found[i] = Drawn(found[i].token, logprobs[k], tuple(pairs))
        return found


def _draws(row: SamplingRow) -> bool:
    return row.parameters.temperature > 0


def _filters(row: SamplingRow) -> bool:
    p = row.parameters
    return bool(p.top_k) or p.top_p < 1 or p.min_p > 0


def _variant(rows: int, drawn: tuple[int, int], adjusted: int, tops: list[int]) -> Variant:
    return Variant(rows, *drawn, adjusted, len(tops), max(tops, default=0))


def _rounded_up(exact: Variant, rows: int, vocabulary: int) -> Variant:
    """Return the variant for padded steps: of each group all rows or none."""
    return Variant(
        rows,
        rows if exact.plain else 0,
        rows if exact.filtered else 0,
        max(ADJUSTED_MIN, _power(exact.adjusted)) if exact.adjusted else 0,
        rows if exact.told else 0,
        min(_power(exact.top), vocabulary) if exact.top else 0,
    )


def _power(count: int) -> int:
    return 1 << (count - 1).bit_length()


def _filled_up(rows: list[int], size: int) -> list[int]:
    return rows + rows[:1] * (size - len(rows))


def _drawing(rows: Sequence[SamplingRow], chosen: list[int]) -> Arrays:
    drawn = [rows[i] for i in chosen]
    seeds = np.array([row.parameters.seed for row in drawn], np.uint64)
    temperatures = [max(row.parameters.temperature, _TEMPERATURE_MIN) for row in drawn]
    return {
        "row": np.array(chosen, np.int64),
        "seed": seeds.view(np.int64),
        "index": np.array([row.index for row in drawn], np.int64),
        "temperature": np.array(temperatures, np.float32),
    }


def _filtering(rows: list[SamplingRow], vocabulary: int) -> Arrays:
    top_k = [min(row.parameters.top_k or vocabulary, vocabulary) for row in rows]
    return {
        "top_k": np.array(top_k, np.int64),
        "top_p": np.array([row.parameters.top_p for row in rows], np.float64),
        "min_p": np.array([row.parameters.min_p for row in rows], np.float64),
    }


def _adjusting(adjusted: list[tuple[int, Adjustments]], vocabulary: int, size: int) -> Arrays:
    flat: Arrays = {
        "position": _joined([i * vocabulary + a.tokens for i, a in adjusted], np.int64),
        "factor": _joined([a.factors for _, a in adjusted], np.float32),
        "minus": _joined([a.minus for _, a in adjusted], np.float32),
        "bias": _joined([a.biases for _, a in adjusted], np.float32),
    }
    return {
        name: np.concatenate([array, np.repeat(array[:1], size - len(array))])
        for name, array in flat.items()
    }


def _joined(arrays: list[npt.NDArray[Any]], dtype: type) -> npt.NDArray[Any]:
    return np.concatenate([np.empty(0, dtype), *arrays])


def _floats(bits: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
    return bits.astype(np.int32).view(np.float32)
