"""One device as the top tier: its arena carried out on real memory, and the links that lead to it.

The arena decides which pieces are mapped and given up; this shell maps and unmaps them. A *link* is
a way for bytes to come: the device's own stream, or a relay through a sibling that is idle. Copies
go to the link with the fewest bytes under way, so each gets as many as it can carry.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Final

from sllm_node.core.errors import DeviceError, DeviceMemoryError, KernelError, ModelBusyError
from sllm_node.core.types import ModelId, Part
from sllm_node.core.units import GIB, align_up
from sllm_node.device.base import Decoder, Device, DeviceBuffer, DeviceRange, Event, Stream
from sllm_node.store.arena import Arena

log = logging.getLogger(__name__)

STAGED_CHUNKS: Final = 4
"""File chunks, stored and decoded, that staging memory must hold at least when it is taken."""
STEP_BYTES: Final = 2 * GIB
"""Mapped in one step at most. Copies into a step begin when all of it is mapped, so with steps that
grow on and on a large model waits for its last ones."""


@dataclass(slots=True)
class Link:
    """A way to the device, and how many bytes are under way on it."""

    stream: Stream
    through: "DeviceTier | None" = None
    """The sibling whose link it is; None: the device's own."""
    outstanding: int = 0


@dataclass(slots=True)
class DeviceTier:
    """The memory of one device. All methods belong to the event loop."""

    device: Device
    piece_bytes: int
    arena: Arena = field(init=False)
    own: Link = field(init=False)
    relays: list[Link] = field(default_factory=list)
    lent: int = 0
    """Bytes of staging memory for the relays of siblings."""
    loads: int = 0
    """Loads under way that end here: while there are any, the link is not lent."""
    is_busy: Callable[[], bool] = lambda: False
    """Whether its replicas work so much that its link must not be lent."""
    staging_bytes: int = 0
    """What the decoder may have for encoded bytes."""
    _decoder: Decoder | None = None
    _staging: DeviceRange | None = None
    _staged: Event | None = None
    _staging_failed: bool = False
    _ranges: dict[ModelId, DeviceRange] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.arena = Arena(self.device.granularity)
        self.own = Link(self.device.stream())

    # --- links --------------------------------------------------------------------------------

    def relay_through(self, siblings: Sequence["DeviceTier"]) -> None:
        """Make links through `siblings` that can reach this device.

        Raises:
            DeviceMemoryError: one has no room for a relay's staging memory.
        """
        for sibling in siblings:
            if sibling is not self and self.device.can_reach(sibling.device):
                before = sibling.device.memory_used
                self.relays.append(Link(self.device.relay(sibling.device), sibling))
                sibling.lent += sibling.device.memory_used - before

    def link(self) -> Link:
        """Return the link that the next copy should take."""
        best = self.own
        for relay in self.relays:
            sibling = relay.through
            assert sibling is not None
            if relay.outstanding < best.outstanding and not (sibling.loads or sibling.is_busy()):
                best = relay
        return best

    @property
    def capacity(self) -> int:
        """Bytes of the device that are not staging memory."""
        decoder = self._decoder
        staging = self.staging_bytes if decoder is not None and decoder.needs_staging else 0
        return self.device.memory_total - self.lent - staging

    def check_capacity(self) -> None:
        """Make sure that there is any.

        Raises:
            DeviceError: staging memory, its own and its siblings', would take all of the device.
        """
        if self.capacity <= 0:
            total = self.device.memory_total
            raise DeviceError(
                self.device.name,
                f"staging memory for links and for decoding would take {total - self.capacity} of "
                f"its {total} bytes; raise device.memory_bytes, or lower store.decode_staging_bytes",
            )

    # --- decoding -----------------------------------------------------------------------------

    def prepare_decoder(self) -> None:
        """Compile kernels now; from any thread, before the first load."""
        try:
            self._decoder = self.device.decoder()
        except KernelError as error:  # raw checkpoints can be loaded all the same
            fields = {"device": self.device.name, "reason": str(error)}
            log.warning("encoded checkpoints can't be loaded here", extra=fields)

    @property
    def decoder(self) -> Decoder:
        """What decodes onto the device; the first time, this waits until kernels are compiled.

        Raises:
            KernelError: they can't be.
            DeviceError: the driver refuses.
        """
        if self._decoder is None:
            self._decoder = self.device.decoder()
        return self._decoder

    @property
    def verifies(self) -> bool:
        """Whether the device is ready to compare digests, and the better place for it."""
        return self._decoder is not None and self._decoder.verifies

    def stage(self, chunk_bytes: int, beside: int) -> tuple[Event, ...]:
        """Take staging memory for decoding, once; return when it is there.

        File chunks have up to `chunk_bytes`; `beside` bytes of memory are needed besides.

        Raises:
            DeviceMemoryError: no room.
            DeviceError: the staging memory is too small for such chunks.
        """
        if not self.decoder.needs_staging:
            return ()
        if self._staging_failed and not self.loads:
            self._drop_staging()
        if self._staging is None:
            self._take_staging(2 * STAGED_CHUNKS * chunk_bytes, beside)
        assert self._staging is not None
        assert self._staged is not None
        if self._staging.size < 2 * chunk_bytes:
            raise DeviceError(
                self.device.name,
                f"chunks of {chunk_bytes} bytes can't be decoded in {self._staging.size} bytes of "
                "staging memory; raise store.decode_staging_bytes, or device.memory_bytes where a quarter "
                "of that is less; or recode the checkpoint with a smaller --chunk-size",
            )
        return (self._staged,)

    def _take_staging(self, least: int, beside: int) -> None:
        room = self._free() + self.arena.cached_bytes - beside
        if least > room:
            raise DeviceMemoryError(
                self.device.name, least + beside, room + beside, self.device.memory_total
            )
        grain = self.device.granularity
        size = max(min(self.staging_bytes, room) // grain * grain, least)
        self._staging, self._staged = self.allocate(size, None)
        self._staged.on_done(self._note_staged)
        self.decoder.stage_in(self._staging)

    def _note_staged(self, error: BaseException | None) -> None:
        self._staging_failed = error is not None

    def _drop_staging(self) -> None:
        if self._staging is not None:
            self._staging.close()
        self._staging, self._staged, self._staging_failed = None, None, False

    # --- memory -------------------------------------------------------------------------------

    def check_room(self, size: int) -> None:
        """Make sure that `size` bytes are free or cached.

        Raises:
            DeviceMemoryError: they are not.
        """
        free = self._free() + self.arena.cached_bytes
        if size > free:
            raise DeviceMemoryError(self.device.name, size, free, self.device.memory_total)

    def prepare(self, model: ModelId, part: Part) -> int:
        """Open or re-use the row of `part` and return the memory that it still needs.

        Raises:
            ModelBusyError: another part of the model is in use here.
        """
        if not self.arena.is_row(model, part.start, part.end):
            self.forget(model)
            place = self.device.reserve(part.end - part.start, self.piece_bytes)
            self._ranges[model] = place
            self.arena.open(model, (part.start, part.end), place.piece_bytes)
        return self.arena.memory_of(model, self.arena.missing(model))

    def map(self, model: ModelId) -> tuple[tuple[int, Event], ...]:
        """Put memory behind all of the row, giving up caches.

        In small steps, the first ones smaller, so that copies follow the mapping closely: returns
        (byte of the checkpoint up to which memory is mapped, when) of each. The row must be held.

        Raises:
            DeviceMemoryError: no room.
        """
        pieces = self.arena.missing(model)
        if not pieces:
            return ()
        self.check_room(self.arena.memory_of(model, pieces))
        place, steps, first, count = self._ranges[model], [], 0, 1
        most = max(1, STEP_BYTES // place.piece_bytes)
        while first < len(pieces):
            step = pieces[first : first + count]
            # What gives way to one step is unmapped right before it, not all of it before the first.
            self._make_room(self.arena.memory_of(model, step))
            self.arena.mapped(model, step)
            event = place.map(step)
            first, count = first + count, min(2 * count, most)
            following = pieces[first] if first < len(pieces) else None
            steps.append((self.arena.start_of(model, following), event))
        return tuple(steps)

    def ready_to(self, model: ModelId) -> int:
        """Return the byte of the checkpoint up to which the row has memory."""
        missing = self.arena.missing(model)
        return self.arena.start_of(model, missing[0] if missing else None)

    def buffer(self, model: ModelId) -> DeviceBuffer:
        """Return the range of `model`."""
        return self._ranges[model]

    def drop(self, model: ModelId) -> None:
        """Give the memory of a row that nobody holds back at once; its addresses stay."""
        self._unmap(model, self.arena.empty(model))

    def drop_unfilled(self, model: ModelId) -> None:
        """Give the memory back whose bytes did not arrive."""
        self._unmap(model, self.arena.unfilled(model))

    def forget(self, model: ModelId) -> None:
        """Drop the row of `model`, its addresses too.

        Raises:
            ModelBusyError: it is in use.
        """
        if not self.arena.knows(model):
            return
        if self.arena.is_held(model):
            raise ModelBusyError(model, f"is in use on {self.device.name}")
        self.drop(model)
        self.arena.close(model)
        self._ranges.pop(model).close()

    def hand_over(self, model: ModelId) -> DeviceRange:
        """Return the memory of a row with one holder left, which owns it from now on."""
        self.arena.release(model)
        self.arena.empty(model)
        self.arena.close(model)
        return self._ranges.pop(model)

    def allocate(self, size: int, again: DeviceRange | None) -> tuple[DeviceRange, Event]:
        """Take memory for something that is no checkpoint; it is there when the event happens.

        `again`: a range of that size without memory, to be used once more.

        Raises:
            DeviceMemoryError: no room.
        """
        place = again or self.device.reserve(size, self.piece_bytes)
        try:
            self._make_room(align_up(size, self.device.granularity))
            event = place.map(range(-(-size // place.piece_bytes)))
        except DeviceMemoryError:
            place.close()
            raise
        return place, event

    def close(self) -> None:
        """Give everything back but rows that are held: they stay with their holders."""
        for model in list(self._ranges):
            if not self.arena.is_held(model):
                self.forget(model)
        if self._decoder is not None:
            self._decoder.close()
        self._drop_staging()
        for link in (self.own, *self.relays):
            link.stream.close()

    def _make_room(self, size: int) -> None:
        self.check_room(size)
        for model, pieces in self.arena.give_up(size - self._free()):
            self._unmap(model, pieces)

    def _unmap(self, model: ModelId, pieces: tuple[int, ...]) -> None:
        if pieces:
            self._ranges[model].unmap(pieces)

    def _free(self) -> int:
        return self.device.memory_total - self.device.memory_used
