"""Makes the models that the directory registers known to this node's store: each from its own address.

Every node of the cluster does so, and states tell peers of it as of any remote's models: so a request for
one goes where its load takes least.
"""

import asyncio
import logging
from collections.abc import Callable, Mapping

from sllm_node.checkpoint.catalog import Catalog
from sllm_node.core.types import ModelId
from sllm_node.schedule.outlook import Outlook
from sllm_node.store.remote import RemoteTier
from sllm_node.store.remote_looks import RETRY_S

log = logging.getLogger(__name__)


class Registered:
    """The registered models of one node."""

    def __init__(
        self, tier: RemoteTier, catalog: Catalog, outlook: Outlook, look: Callable[[], None],
        again_s: float = RETRY_S,
    ) -> None:  # fmt: skip
        """`look` takes note of checkpoints that are known since now."""
        self._tier = tier
        self._catalog = catalog
        self._outlook = outlook
        self._look = look
        self._again_s = again_s
        self._wanted: Mapping[ModelId, str] | None = None
        self._task: asyncio.Task[None] | None = None

    def set(self, urls: Mapping[ModelId, str]) -> None:
        """Take which models are registered now, and where each can be fetched; they are looked at soon."""
        self._wanted = urls
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._follow(), name="registered models")

    async def close(self) -> None:
        """Stop looking."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def _follow(self) -> None:
        while self._wanted is not None:
            urls, self._wanted = self._wanted, None
            try:
                await self._tier.register(urls)
                self._outlook.keeps_remotes |= bool(urls)
                self._catalog.scan()
                self._look()
            except Exception:
                log.exception("registered models not looked at")
                await asyncio.sleep(self._again_s)
                if self._wanted is None:
                    self._wanted = urls
