"""Which pieces of which checkpoints lie in a device's memory: the top tier's ledger, one pure object.

A checkpoint, or its part on this device, is a *row* of equal pieces. A piece is EMPTY (addresses
without memory), MAPPED (memory, bytes on their way) or FILLED. A row that is *held* (a replica
stands on it, or a load fills it) keeps what it has. A row that isn't held is a cache: its pieces
stay until somebody needs the memory, and the next load brings only those that are gone.

Victims are the rows that were held longest ago, from the tail on and only as many pieces as are
needed: the head of a model is what its next load needs first.
"""

from collections import OrderedDict
from dataclasses import dataclass
from enum import Enum

from sllm_node.core.types import ModelId


class PieceState(Enum):
    """What is behind the addresses of a piece."""

    EMPTY = "empty"
    MAPPED = "mapped"
    FILLED = "filled"


@dataclass(slots=True)
class _Row:
    start: int
    end: int
    piece_bytes: int
    states: list[PieceState]
    grain: int
    holds: int = 0
    memory: int = 0
    """Bytes behind its pieces: asked for all rows at every turn, so it is counted."""

    def bytes_of(self, piece: int) -> int:
        """Memory that the piece takes; the last one is rounded up to the device's granularity."""
        left = self.end - self.start - piece * self.piece_bytes
        return min(self.piece_bytes, -(-left // self.grain) * self.grain)

    def content_of(self, piece: int) -> tuple[int, int]:
        """Bytes [start, end) of the checkpoint that belong in the piece."""
        start = self.start + piece * self.piece_bytes
        return start, min(start + self.piece_bytes, self.end)


class Arena:
    """The rows of one device whose memory comes in multiples of `granularity` bytes."""

    def __init__(self, granularity: int) -> None:
        self._grain = granularity
        self._rows: OrderedDict[ModelId, _Row] = OrderedDict()
        """Held longest ago first."""

    # --- what can be asked --------------------------------------------------------------------

    def knows(self, model: ModelId) -> bool:
        """Tell whether `model` has a row here."""
        return model in self._rows

    def is_row(self, model: ModelId, start: int, end: int) -> bool:
        """Tell whether `model` has a row here, for these bytes."""
        row = self._rows.get(model)
        return row is not None and (row.start, row.end) == (start, end)

    def is_held(self, model: ModelId) -> bool:
        """Tell whether a replica or a load stands on the row."""
        row = self._rows.get(model)
        return row is not None and row.holds > 0

    def filled_bytes(self, model: ModelId) -> int:
        """Return how many bytes of the checkpoint are here."""
        row = self._rows.get(model)
        if row is None:
            return 0
        contents = (row.content_of(piece) for piece in _pieces(row, PieceState.FILLED))
        return sum(end - start for start, end in contents)

    @property
    def cached_bytes(self) -> int:
        """Memory that could be given up at once."""
        return sum(row.memory for row in self._rows.values() if not row.holds)

    def missing(self, model: ModelId) -> tuple[int, ...]:
        """Return the pieces that have no memory."""
        return tuple(_pieces(self._rows[model], PieceState.EMPTY))

    def wants(self, model: ModelId) -> tuple[tuple[int, int], ...]:
        """Return which bytes [start, end) of the checkpoint are still to be brought, in order."""
        row = self._rows[model]
        ranges: list[tuple[int, int]] = []
        for piece, state in enumerate(row.states):
            if state is not PieceState.FILLED:
                start, end = row.content_of(piece)
                if ranges and ranges[-1][1] == start:
                    start = ranges.pop()[0]
                ranges.append((start, end))
        return tuple(ranges)

    def memory_of(self, model: ModelId, pieces: tuple[int, ...]) -> int:
        """Return the memory that these pieces take."""
        row = self._rows[model]
        return sum(row.bytes_of(piece) for piece in pieces)

    def start_of(self, model: ModelId, piece: int | None) -> int:
        """Return the first byte of the checkpoint in `piece`; None: the end of the row."""
        row = self._rows[model]
        return row.end if piece is None else row.content_of(piece)[0]

    # --- rows ---------------------------------------------------------------------------------

    def open(self, model: ModelId, part: tuple[int, int], piece_bytes: int) -> None:
        """Begin a row for bytes [start, end) of `model`, nothing of which is here."""
        assert model not in self._rows
        start, end = part
        assert end > start
        count = -(-(end - start) // piece_bytes)
        states = [PieceState.EMPTY] * count
        self._rows[model] = _Row(start, end, piece_bytes, states, self._grain)

    def close(self, model: ModelId) -> None:
        """Forget the row, which nobody holds and of which nothing is mapped."""
        row = self._rows[model]
        assert not row.holds
        assert not row.memory
        del self._rows[model]

    def hold(self, model: ModelId) -> None:
        """Keep what the row has from being given up."""
        self._rows[model].holds += 1
        self._rows.move_to_end(model)

    def release(self, model: ModelId) -> None:
        """Let go of the row once; without holders it is a cache."""
        row = self._rows[model]
        assert row.holds > 0
        row.holds -= 1
        self._rows.move_to_end(model)

    # --- pieces -------------------------------------------------------------------------------

    def mapped(self, model: ModelId, pieces: tuple[int, ...]) -> None:
        """Take note that these pieces get memory."""
        self._change(model, pieces, PieceState.EMPTY, PieceState.MAPPED)

    def filled(self, model: ModelId) -> None:
        """Take note that all bytes of the row have arrived."""
        row = self._rows[model]
        assert PieceState.EMPTY not in row.states
        row.states = [PieceState.FILLED] * len(row.states)

    def unfilled(self, model: ModelId) -> tuple[int, ...]:
        """Forget the pieces whose bytes did not arrive, and return them."""
        pieces = tuple(_pieces(self._rows[model], PieceState.MAPPED))
        self._change(model, pieces, PieceState.MAPPED, PieceState.EMPTY)
        return pieces

    def empty(self, model: ModelId) -> tuple[int, ...]:
        """Give up all pieces of a row that nobody holds, and return those that had memory."""
        row = self._rows[model]
        assert not row.holds
        pieces = tuple(p for p, state in enumerate(row.states) if state is not PieceState.EMPTY)
        row.states = [PieceState.EMPTY] * len(row.states)
        row.memory = 0
        return pieces

    def give_up(self, size: int) -> list[tuple[ModelId, tuple[int, ...]]]:
        """Give up cached pieces of at least `size` bytes, if there are so many, and return them."""
        victims: list[tuple[ModelId, tuple[int, ...]]] = []
        for model, row in self._rows.items():
            if size <= 0:
                break
            if row.holds or not row.memory:
                continue
            pieces: list[int] = []
            for piece in reversed(list(_pieces(row, PieceState.FILLED))):
                if size <= 0:
                    break
                pieces.append(piece)
                size -= row.bytes_of(piece)
            if pieces:
                self._change(model, tuple(pieces), PieceState.FILLED, PieceState.EMPTY)
                victims.append((model, tuple(pieces)))
        return victims

    def _change(
        self, model: ModelId, pieces: tuple[int, ...], old: PieceState, new: PieceState
    ) -> None:
        row = self._rows[model]
        sign = (new is not PieceState.EMPTY) - (old is not PieceState.EMPTY)
        for piece in pieces:
            found = row.states[piece]
            assert found is old, f"{model}: piece {piece} is {found.value}"
            row.states[piece] = new
            row.memory += sign * row.bytes_of(piece)


def _pieces(row: _Row, state: PieceState) -> list[int]:
    return [piece for piece, found in enumerate(row.states) if found is state]
