"""All devices of a store together: their tiers, the memory of a load's targets, and what they keep of a model."""

import asyncio
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor
from functools import partial
from typing import Final

from sllm_node.checkpoint.catalog import Checkpoint
from sllm_node.checkpoint.index import TensorIndex
from sllm_node.core.config import StoreConfig
from sllm_node.core.errors import SllmError
from sllm_node.core.types import ModelId, Part, Placement
from sllm_node.device.base import Device, DeviceRange, Event
from sllm_node.store.pipeline import Target, call_on
from sllm_node.store.tier import DeviceTier

STAGING_SHARE: Final = 4
"""Staging memory for decoding takes no more than this part, a quarter, of a device."""


class DeviceTiers:
    """One tier for each device, by name. All methods belong to the event loop."""

    def __init__(self, devices: Sequence[Device], config: StoreConfig) -> None:
        assert devices
        self.first = devices[0]
        """Where a model goes that nobody has placed."""
        self._devices = tuple(devices)
        self._config = config
        self._tiers: dict[str, DeviceTier] = {}

    def __getitem__(self, device: str) -> DeviceTier:
        return self._tiers[device]

    def __iter__(self) -> Iterator[DeviceTier]:
        return iter(self._tiers.values())

    # --- life ---------------------------------------------------------------------------------

    async def open(self, threads: Executor) -> None:
        """Open the links to the devices, and through siblings if the config says so; compile in `threads`.

        Raises:
            DeviceError: a device has no room for weights.
            DeviceMemoryError: a device has no room for a relay's staging memory.
        """
        loop = asyncio.get_running_loop()
        try:
            for device in self._devices:
                self.add(device)
            if self._config.relay:
                for tier in self:
                    tier.relay_through(tuple(self))
            for tier in self:
                await loop.run_in_executor(threads, tier.prepare_decoder)
                tier.check_capacity()
        except BaseException:
            self.close()
            raise

    def add(self, device: Device) -> None:
        """Take one more device in; its link is its own only."""
        self._tiers[device.name] = self._new_tier(device)

    def _new_tier(self, device: Device) -> DeviceTier:
        config = self._config
        staging = min(config.decode_staging_bytes, device.memory_total // STAGING_SHARE)
        return DeviceTier(device, config.piece_bytes, staging_bytes=staging)

    def lend_links(self, is_busy: Callable[[str], bool]) -> None:
        """Let `is_busy(device)` say when a device's link must not serve its siblings."""
        for name, tier in self._tiers.items():
            tier.is_busy = partial(is_busy, name)

    def close(self) -> None:
        """Give everything back but what is held."""
        for tier in self:
            tier.close()

    # --- what is there ------------------------------------------------------------------------

    def bytes_of(self, model: ModelId) -> dict[str, int]:
        """Return the bytes of `model` in the memory of each device that has any."""
        found = {name: tier.arena.filled_bytes(model) for name, tier in self._tiers.items()}
        return {name: size for name, size in found.items() if size}

    def capacities(self) -> dict[str, int]:
        """Return the bytes of every device that models and their KV memory may share."""
        return {name: tier.capacity for name, tier in self._tiers.items()}

    # --- memory of a load ---------------------------------------------------------------------

    def targets(self, checkpoint: Checkpoint, placement: Placement) -> tuple[Target, ...]:
        """Hold the rows of all parts and put memory behind them.

        Raises:
            DeviceMemoryError: a device has no room; nothing was taken.
            KernelError: a device can't decode.
        """
        model, index = checkpoint.model, checkpoint.index
        tiers = [self._tiers[part.device] for part in placement]
        wanted = [tier.prepare(model, part) for tier, part in zip(tiers, placement, strict=True)]
        for tier in tiers:
            tier.arena.hold(model)
        try:
            staged = [
                tier.stage(index.chunk_bytes, size) if size and self._decodes(index, tier) else ()
                for tier, size in zip(tiers, wanted, strict=True)
            ]
            for tier, size in zip(tiers, wanted, strict=True):
                tier.check_room(size)
        except SllmError:
            for tier in tiers:
                tier.arena.release(model)
            raise
        parts = enumerate(zip(tiers, placement, staged, strict=True))
        return tuple(self._target(model, number, *one) for number, one in parts)

    def _decodes(self, index: TensorIndex, tier: DeviceTier) -> bool:
        """Tell whether a decoder is needed, to decode or to compare digests."""
        is_checked = self._config.verify == "always" and self._config.verify_on_device
        return index.is_encoded or (is_checked and tier.verifies)

    def _target(
        self, model: ModelId, number: int, tier: DeviceTier, part: Part, staged: tuple[Event, ...]
    ) -> Target:
        wants, ready_to = tier.arena.wants(model), tier.ready_to(model)
        tier.loads += 1
        # Memory is mapped in order: staging memory is there before any of the row's.
        events = tuple((ready_to, event) for event in staged)
        return Target(
            number, tier, part, wants, tier.buffer(model), ready_to, events + tier.map(model)
        )

    def release(self, model: ModelId, placement: Placement) -> None:
        """Hold the rows of all parts no more; what they have stays as a cache."""
        for part in placement:
            self._tiers[part.device].arena.release(model)

    # --- other memory -------------------------------------------------------------------------

    async def allocate(self, device: str, size: int, again: DeviceRange | None) -> DeviceRange:
        """Take memory for something that is no checkpoint; it is mapped then. See `Store.allocate`.

        Raises:
            DeviceMemoryError: there is no room.
        """
        place, event = self._tiers[device].allocate(size, again)
        loop = asyncio.get_running_loop()
        mapped: asyncio.Future[None] = loop.create_future()
        event.on_done(partial(call_on, loop, partial(_settle, mapped)))
        try:
            await asyncio.shield(mapped)
        except BaseException:
            mapped.cancel()  # a failure that comes now has nobody to tell
            place.close()
            raise
        return place

    # --- the way down -------------------------------------------------------------------------

    def drop_caches(self, model: ModelId) -> None:
        """Give back what nobody holds of `model`; its addresses stay."""
        for tier in self:
            if tier.arena.knows(model) and not tier.arena.is_held(model):
                tier.drop(model)

    def forget(self, model: ModelId) -> None:
        """Drop what nobody holds of `model`, its addresses too."""
        for tier in self:
            if not tier.arena.is_held(model):
                tier.forget(model)


def _settle(mapped: "asyncio.Future[None]", error: BaseException | None) -> None:
    """Tell who waits for memory."""
    if mapped.done():
        return
    if error is None:
        mapped.set_result(None)
    else:
        mapped.set_exception(error)
