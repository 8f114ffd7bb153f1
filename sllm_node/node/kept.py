"""What of this node outlives its process: where its journal is, and the pins in it."""

from pathlib import Path
from urllib.parse import quote

from sllm_node.cluster.journal import Journal
from sllm_node.cluster.records import Drop, Pin, Put
from sllm_node.core.config import Config
from sllm_node.core.types import ModelId


def journal_path(config: Config) -> Path:
    """Return where this node's journal is: a file of its own, also in a store that nodes share."""
    if config.node.journal:
        return Path(config.node.journal)
    return Path(config.store.path) / ".journal" / f"{quote(config.node.id, safe='')}.sqlite"


class KeptPins:
    """An operator's pins, on this node's disk (`schedule.ports.Pins`)."""

    def __init__(self, journal: Journal) -> None:
        self._journal = journal

    def models(self) -> tuple[ModelId, ...]:
        """Return what was pinned, by name."""
        return tuple(pin.model for _, pin in sorted(self._journal.records.pins.items()))

    async def keep(self, model: ModelId) -> None:
        """Write a pin.

        Raises:
            JournalError: it would not survive.
        """
        await self._journal.write(Put(Pin(model)))

    async def drop(self, model: ModelId) -> None:
        """Forget a pin.

        Raises:
            JournalError: it would come back.
        """
        if model in self._journal.records.pins:
            await self._journal.write(Drop(Pin, model))
