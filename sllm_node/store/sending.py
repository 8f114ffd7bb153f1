"""The way of one load's bytes over links: units are copied, or decoded behind their copies, or cloned.

Whoever wants to use bytes before the last one has come is told through `deliveries`: what of a unit
has been copied, or decoded without an error.
"""

from collections.abc import Callable, Sequence
from functools import partial

from sllm_node.checkpoint.catalog import Checkpoint
from sllm_node.core.errors import ChecksumError, CodecError
from sllm_node.device.base import WrongChunkError
from sllm_node.store.arrival import Deliveries
from sllm_node.store.decoding import by_target, jobs_of, named
from sllm_node.store.moved import Moved
from sllm_node.store.pipeline import (
    CLONE_BYTES,
    LINK_BYTES,
    Machinery,
    Slice,
    Source,
    Target,
    call_on,
)
from sllm_node.store.residency import Unit
from sllm_node.store.tier import Link


class Sending:
    """What one load has under way to its targets. All of it belongs to the event loop."""

    def __init__(  # noqa: PLR0913 - what it counts into, and whom it tells
        self,
        checkpoint: Checkpoint,
        targets: tuple[Target, ...],
        machinery: Machinery,
        moved: Moved,
        deliveries: Deliveries,
        *,
        begun: Callable[[], None],
        failed: Callable[[BaseException], None],
        ended: Callable[[], None],
    ) -> None:
        """`begun` is called before the first copy, `ended` after each one, `failed` with each error."""
        self._checkpoint = checkpoint
        self._model = checkpoint.model
        self._targets = targets
        self._machinery = machinery
        self._ledger = machinery.ledger
        self._moved = moved
        self._deliveries = deliveries
        self._begun = begun
        self._failed = failed
        self._ended = ended
        self.first_at: float | None = None
        """When the first copy was issued."""
        self.under_way = 0
        """Copies that are issued and not done."""
        self._on_links = 0
        """Bytes under way on links, as they are stored."""
        self._links = sum(1 + len(target.tier.relays) for target in targets) or 1

    @property
    def is_full(self) -> bool:
        """Whether links have enough to do."""
        return self._on_links >= LINK_BYTES * self._links

    def _slices_of(self, unit: Unit) -> list[Slice]:
        start, end = unit.device_offset, unit.device_end
        slices = []
        for target in self._targets:
            for low, high in target.wants:
                if low < end and start < high:
                    slices.append(Slice(target, max(start, low), min(end, high)))
        return slices

    def is_mapped(self, unit: Unit) -> bool:
        """Tell whether memory is behind all places of `unit`."""
        if min((target.ready_to for target in self._targets), default=0) >= unit.device_end:
            return True  # the rule, without a look at what goes where
        return all(cut.end <= cut.target.ready_to for cut in self._slices_of(unit))

    def send(self, unit: Unit, *, verify: bool = False) -> None:
        """Send a unit that is in DRAM to every target that wants of it."""
        if verify or unit.is_encoded:
            self._decode(unit, verify=verify)
            return
        for cut in self._slices_of(unit):
            chunk = self._ledger.hold(self._model, unit.index)
            view = self._machinery.pool.view(chunk, unit.size)
            view = view[cut.start - unit.device_offset : cut.end - unit.device_offset]
            link = cut.target.tier.link()
            place = cut.start - cut.target.part.start
            copy = partial(link.stream.copy_in, cut.target.buffer, place, view)
            self._copy_by(link, copy, cut, partial(self._on_copied, unit))

    def _decode(self, unit: Unit, *, verify: bool) -> None:
        """Send a unit to every target that wants of it, to be decoded or checked there."""
        loop = self._machinery.loop
        self._moved.verified += unit.device_size if verify else 0
        for target, cuts in by_target(self._slices_of(unit)):
            chunk = self._ledger.hold(self._model, unit.index)
            view = self._machinery.pool.view(chunk, unit.size)
            place, jobs = jobs_of(unit, cuts, verify=verify)
            link = target.tier.link()
            done = self._sent(link, jobs.size, cuts, partial(self._on_copied, unit))
            tell = partial(call_on, loop, partial(self._on_decoded, unit, done))
            try:
                target.tier.decoder.decode(link.stream, target.buffer, place, view, jobs, tell)
            except Exception as error:  # noqa: BLE001 - whatever it is, the load ends with it
                loop.call_soon(done, error)

    def clone(self, source: Source) -> None:
        """Send everything from a sibling device; its places are mapped."""
        for target in self._targets:
            for low, high in target.wants:
                for start in range(low, high, CLONE_BYTES):
                    end, link = min(start + CLONE_BYTES, high), target.tier.own
                    place = start - target.part.start
                    copy = partial(
                        link.stream.copy_device, target.buffer, place, source.buffer, (start, end)
                    )
                    self._copy_by(link, copy, Slice(target, start, end), self._on_cloned)

    def _copy_by(
        self, link: Link, copy: Callable[[], None], cut: Slice, tell: "Callable[..., None]"
    ) -> None:
        """Enqueue the copy of `cut`; `tell` is called when it is done, or can't be."""
        done = self._sent(link, cut.end - cut.start, (cut,), tell)
        loop = self._machinery.loop
        try:
            copy()
            event = link.stream.record()
        except Exception as error:  # noqa: BLE001 - whatever it is, the load ends with it
            loop.call_soon(done, error)  # not at once: whoever issues the copy is still counting
        else:
            event.on_done(lambda error: call_on(loop, done, error))

    def _sent(
        self, link: Link, carried: int, cuts: Sequence[Slice], tell: "Callable[..., None]"
    ) -> "Callable[[BaseException | None], None]":
        """Count what is on its way by `link`; return what is to be called when it is there."""
        if self.first_at is None:
            self.first_at = self._machinery.clock.now()
            self._begun()
        self.under_way += 1
        self._moved.stored += carried
        link.outstanding += carried
        self._on_links += carried
        if link.through is not None:
            self._moved.relayed += sum(cut.end - cut.start for cut in cuts)
        return partial(self._link_done, link, carried, cuts, tell)

    def _link_done(
        self,
        link: Link,
        carried: int,
        cuts: Sequence[Slice],
        tell: "Callable[..., None]",
        error: BaseException | None,
    ) -> None:
        link.outstanding -= carried
        self._on_links -= carried
        self.under_way -= 1
        if error is not None:
            self._failed(error)
        else:
            for cut in cuts:
                self._moved.done += cut.end - cut.start
                self._deliveries.delivered(cut.target.number, cut.start, cut.end)
        tell(error)
        self._ended()

    def _on_copied(self, unit: Unit, error: BaseException | None) -> None:
        self._ledger.unhold(self._model, unit.index, copied=error is None)
        if isinstance(error, CodecError | ChecksumError):
            self._ledger.drop(self._model, unit.index)

    def _on_decoded(
        self,
        unit: Unit,
        done: "Callable[[BaseException | None], None]",
        error: BaseException | None,
        seconds: float,
    ) -> None:
        self._moved.decode_s += seconds
        if isinstance(error, WrongChunkError):
            error = named(self._checkpoint, unit, error)
        done(error)

    def _on_cloned(self, error: BaseException | None) -> None:
        if error is None:
            self._moved.sibling = self._moved.done
