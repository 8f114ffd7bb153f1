"""Which chunk of the pinned pool holds what: the DRAM tier's ledger, as one pure object.

A checkpoint is a row of *units*, each as many file chunks of one shard as fit into a pool chunk. A
unit is EMPTY, FILLING (a chunk is taken, a reader writes to it), or FILLED. A filled unit is *held*
while a copy reads it. Bytes here are those of the files: encoded ones stay encoded in DRAM.

A load takes chunks one by one: a free one; else one of another model, taken from the tail of the
least recently used model that isn't pinned or loading, so that a victim stays partly cached and
eviction is by bytes; else one of its own that was copied already, the latest unit first, so that a
model larger than the pool streams through it and keeps its head for the next time. None is the
answer when all that is left is in flight: whoever asked waits until something is given back.

Chunks can be lent for something that is no checkpoint: free ones, else other models', as a load takes them.
Of what pins leave, two chunks stay for loads, as many as any load needs. A model that is pinned, or brought while
it is, after a loan may take these: so while chunks are lent, pinned models give up to a load what exceeds that.
"""

from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import Enum
from typing import Final

from sllm_node.checkpoint.index import FileChunk, TensorIndex
from sllm_node.codec.names import RAW
from sllm_node.core.types import ModelId
from sllm_node.device.base import ChunkJobs
from sllm_node.store.grouping import check_chunks, grouped

LOAD_CHUNKS: Final = 2
"""What a load needs at least: one chunk is read while the other is copied."""


@dataclass(frozen=True, slots=True)
class Unit:
    """What one chunk of the pool holds, one read brings, one copy moves."""

    index: int
    shard: int
    offset: int
    """In the file."""
    size: int
    """In the file and in the pool."""
    device_offset: int
    device_size: int
    """Decoded; what it takes on a device."""
    is_encoded: bool = False
    """Whether some of its chunks have to be decoded."""
    numbers: tuple[int, int] = (0, 0)
    """Of its file chunks in the shard: the first one, and the one behind the last."""
    source: TensorIndex | None = field(default=None, compare=False, repr=False)
    whole: dict[bool, ChunkJobs] = field(default_factory=dict, compare=False, repr=False)
    """What a decoder has to do when all of it goes to one device; with digests, and without."""

    @property
    def device_end(self) -> int:
        """Where it ends on a device."""
        return self.device_offset + self.device_size

    @property
    def chunks(self) -> tuple[FileChunk, ...]:
        """What lies in it, in order; made anew, since a model has tens of thousands."""
        if self.source is None:
            return ()
        return self.source.chunks_of(self.shard, *self.numbers, self.offset)


def units_of(index: TensorIndex, chunk_bytes: int) -> tuple[Unit, ...]:
    """Cut a checkpoint into units for a pool whose chunks are `chunk_bytes`.

    Raises:
        CheckpointFormatError: raw file chunks do not fill a pool chunk evenly, or an encoded one is
            larger.
    """
    check_chunks(index, chunk_bytes)
    units: list[Unit] = []
    base, step = 0, index.chunk_bytes
    for number, shard in enumerate(index.shards):
        places = index.chunk_offsets(number)
        for first, last in grouped(places, chunk_bytes):
            start, end = first * step, min(last * step, shard.size)
            units.append(
                Unit(
                    index=len(units),
                    shard=number,
                    offset=places[first],
                    size=places[last] - places[first],
                    device_offset=base + start,
                    device_size=end - start,
                    is_encoded=any(codec != RAW for codec in shard.codecs[first:last]),
                    numbers=(first, last),
                    source=index,
                )
            )
        base += shard.size
    return tuple(units)


class UnitState(Enum):
    """What the DRAM tier has of a unit."""

    EMPTY = "empty"
    FILLING = "filling"
    FILLED = "filled"


@dataclass(slots=True)
class _Slot:
    state: UnitState = UnitState.EMPTY
    chunk: int = -1
    holds: int = 0
    is_damaged: bool = False
    """It was given up while copies read it: the last one empties it."""


@dataclass(slots=True)
class _Row:
    units: tuple[Unit, ...]
    slots: list[_Slot]
    loads: int = 0
    is_pinned: bool = False
    filled_bytes: int = 0
    tail: int = -1
    """No unit behind this one is filled: where the search for a victim begins."""
    verified: set[int] = field(default_factory=set)
    copied: set[int] = field(default_factory=set)
    """The load under way has copied them: they may be given up for later units of the model."""


class Residency:
    """The ledger of a pool of `chunks` chunks. Models are known from `open` to `close`."""

    def __init__(self, chunks: int) -> None:
        self._chunks = chunks
        self._free = list(range(chunks - 1, -1, -1))
        self._in_flight = 0
        self._lent: set[int] = set()
        self._rows: OrderedDict[ModelId, _Row] = OrderedDict()
        """Least recently used first."""

    # --- what can be asked --------------------------------------------------------------------

    @property
    def chunks(self) -> int:
        """Chunks of the pool."""
        return self._chunks

    @property
    def free(self) -> int:
        """Chunks that hold nothing."""
        return len(self._free)

    @property
    def in_flight(self) -> int:
        """Chunks that a reader fills or a copy reads."""
        return self._in_flight

    @property
    def lent(self) -> int:
        """Chunks that are lent."""
        return len(self._lent)

    @property
    def lendable(self) -> int:
        """Chunks that `lend` would lend, one after another."""
        rows = [row for row in self._rows.values() if not (row.loads or row.is_pinned)]
        slots = (slot for row in rows for slot in row.slots)
        idle = sum(slot.state is UnitState.FILLED and not slot.holds for slot in slots)
        most = self._chunks - LOAD_CHUNKS - self._kept() - len(self._lent)
        return max(0, min(most, len(self._free) + idle))

    def models(self) -> tuple[ModelId, ...]:
        """Return the known models, least recently used first."""
        return tuple(self._rows)

    def units(self, model: ModelId) -> tuple[Unit, ...]:
        """Return the units of a known model."""
        return self._rows[model].units

    def bytes_of(self, model: ModelId) -> int:
        """Return how many bytes of `model`'s files are in DRAM."""
        row = self._rows.get(model)
        return row.filled_bytes if row else 0

    def sorted_units(self, model: ModelId) -> tuple[list[Unit], list[Unit]]:
        """Return the units that are in DRAM and those that are not, last ones first."""
        row = self._rows[model]
        cached: list[Unit] = []
        missing: list[Unit] = []
        for slot, unit in zip(reversed(row.slots), reversed(row.units), strict=True):
            (cached if slot.state is UnitState.FILLED else missing).append(unit)
        return cached, missing

    def is_verified(self, model: ModelId, unit: int) -> bool:
        """Tell whether `unit` was read with right checksums since the checkpoint was opened."""
        return unit in self._rows[model].verified

    def is_pinned(self, model: ModelId) -> bool:
        """Tell whether the model may not be evicted from DRAM."""
        row = self._rows.get(model)
        return row is not None and row.is_pinned

    # --- models -------------------------------------------------------------------------------

    def open(self, model: ModelId, units: tuple[Unit, ...]) -> None:
        """Begin to know `model`, of which nothing is in DRAM."""
        assert model not in self._rows
        self._rows[model] = _Row(units, [_Slot() for _ in units])

    def knows(self, model: ModelId) -> bool:
        """Tell whether `model` is open."""
        return model in self._rows

    def close(self, model: ModelId) -> None:
        """Forget `model` and give its chunks back; nothing of it may be in flight."""
        assert self._rows[model].loads == 0
        self.evict(model)
        del self._rows[model]

    def touch(self, model: ModelId) -> None:
        """Make `model` the most recently used."""
        self._rows.move_to_end(model)

    def pin(self, model: ModelId, *, pinned: bool) -> None:
        """Keep what DRAM has of `model`, or don't any more."""
        self._rows[model].is_pinned = pinned

    def evict(self, model: ModelId) -> int:
        """Give up what DRAM has of `model` and isn't in use; return the bytes."""
        row = self._rows[model]
        before = row.filled_bytes
        for unit, slot in enumerate(row.slots):
            if slot.state is UnitState.FILLED and not slot.holds:
                self._empty(row, unit)
        return before - row.filled_bytes

    # --- a load -------------------------------------------------------------------------------

    def begin_load(self, model: ModelId) -> None:
        """A load of `model` begins: nobody else takes its chunks."""
        self.touch(model)
        row = self._rows[model]
        row.loads += 1
        row.copied.clear()

    def end_load(self, model: ModelId) -> None:
        """The load is over, however it ended; nothing of it is in flight."""
        row = self._rows[model]
        assert row.loads > 0
        row.loads -= 1
        self.touch(model)

    def take(self, model: ModelId, unit: int) -> tuple[int, ModelId | None] | None:
        """Take a chunk for `unit`, which becomes FILLING.

        Returns:
            The chunk and the model it was taken from, if from another one; None: all are in use.
        """
        row = self._rows[model]
        slot = row.slots[unit]
        assert slot.state is UnitState.EMPTY
        victim: ModelId | None = None
        if not self._free:
            victim = self._evict_one() or self._evict_for_loan(row)
        if not self._free:
            self._recycle(row)
        if not self._free:
            return None
        slot.chunk = self._free.pop()
        slot.state = UnitState.FILLING
        self._in_flight += 1
        return slot.chunk, victim

    def filled(self, model: ModelId, unit: int, *, verified: bool) -> None:
        """The reader has filled the chunk of `unit`."""
        row = self._rows[model]
        slot = row.slots[unit]
        assert slot.state is UnitState.FILLING
        slot.state = UnitState.FILLED
        self._in_flight -= 1
        row.tail = max(row.tail, unit)
        row.filled_bytes += row.units[unit].size
        if verified:
            row.verified.add(unit)

    def failed(self, model: ModelId, unit: int) -> None:
        """The reader could not: the chunk is free again."""
        row = self._rows[model]
        slot = row.slots[unit]
        assert slot.state is UnitState.FILLING
        self._in_flight -= 1
        self._free.append(slot.chunk)
        row.slots[unit] = _Slot()

    def hold(self, model: ModelId, unit: int) -> int:
        """A copy begins to read `unit`; return its chunk."""
        slot = self._rows[model].slots[unit]
        assert slot.state is UnitState.FILLED
        self._in_flight += slot.holds == 0
        slot.holds += 1
        return slot.chunk

    def unhold(self, model: ModelId, unit: int, *, copied: bool) -> None:
        """The copy of `unit` has ended."""
        row = self._rows[model]
        slot = row.slots[unit]
        assert slot.holds > 0
        slot.holds -= 1
        self._in_flight -= slot.holds == 0
        if copied:
            row.copied.add(unit)
        if slot.is_damaged and not slot.holds:
            self._empty(row, unit)

    def drop(self, model: ModelId, unit: int) -> None:
        """Give `unit` up: what DRAM has of it is damaged."""
        row = self._rows[model]
        row.verified.discard(unit)
        slot = row.slots[unit]
        if slot.holds:
            slot.is_damaged = True
        elif slot.state is UnitState.FILLED:  # and not given up by another copy's end
            self._empty(row, unit)

    # --- loans --------------------------------------------------------------------------------

    def lend(self) -> tuple[int, ModelId | None] | None:
        """Lend a chunk; return it and the model it was taken from, if from one; None: there is none."""
        if len(self._lent) + self._kept() + LOAD_CHUNKS >= self._chunks:
            return None
        victim = None if self._free else self._evict_one()
        if not self._free:
            return None
        chunk = self._free.pop()
        self._lent.add(chunk)
        return chunk, victim

    def take_back(self, chunk: int) -> None:
        """A lent chunk is free again."""
        self._lent.remove(chunk)
        self._free.append(chunk)

    # --- victims ------------------------------------------------------------------------------

    def _kept(self, but: _Row | None = None) -> int:
        """Count the chunks of pinned models `but` one."""
        pinned = [row for row in self._rows.values() if row.is_pinned and row is not but]
        return sum(slot.state is not UnitState.EMPTY for row in pinned for slot in row.slots)

    def _evict_for_loan(self, asks: _Row) -> ModelId | None:
        """Evict a chunk of a pinned model where a loan leaves the load that `asks` too few."""
        if not self._lent or len(self._lent) + self._kept(asks) + LOAD_CHUNKS <= self._chunks:
            return None
        return self._evict_one(pinned=True)

    def _evict_one(self, *, pinned: bool = False) -> ModelId | None:
        for model, row in self._rows.items():
            if not row.loads and row.is_pinned is pinned:
                for unit in self._given_up_in_order(row):
                    self._empty(row, unit)
                    return model
        return None

    def _recycle(self, row: _Row) -> None:
        for unit in self._given_up_in_order(row):
            if unit in row.copied:
                self._empty(row, unit)
                return

    def _given_up_in_order(self, row: _Row) -> Iterator[int]:
        while row.tail >= 0 and row.slots[row.tail].state is UnitState.EMPTY:
            row.tail -= 1
        for unit in range(row.tail, -1, -1):
            slot = row.slots[unit]
            if slot.state is UnitState.FILLED and not slot.holds:
                yield unit

    def _empty(self, row: _Row, unit: int) -> None:
        slot = row.slots[unit]
        assert slot.state is UnitState.FILLED
        assert not slot.holds
        row.filled_bytes -= row.units[unit].size
        row.copied.discard(unit)
        self._free.append(slot.chunk)
        row.slots[unit] = _Slot()
