"""What an operator does to models of this node in a cluster: those that only peers have come first.

`load` and `pin` bring a model from a peer. What is not here, and can't come, is told as what it is: unknown
in the whole cluster, or elsewhere.
"""

from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Generic, NoReturn

from sllm_node.cluster.elsewhere import Elsewhere
from sllm_node.core.errors import ModelElsewhereError, ModelNotFoundError, SllmError
from sllm_node.core.types import ModelId
from sllm_node.schedule.driver import Service
from sllm_node.schedule.ports import CodecT


class Acts(Generic[CodecT]):
    """The service's acts, for the models of all nodes."""

    def __init__(
        self,
        service: Service[CodecT],
        elsewhere: Elsewhere[CodecT],
        ensure: Callable[[str], Awaitable[None]],
    ) -> None:
        """`ensure` knows a model of peers that is to be loaded here."""
        self._service = service
        self._elsewhere = elsewhere
        self._ensure = ensure

    async def load(self, model: str) -> None:
        """Bring `model` to this node's device, from a peer if only peers have it; as the service's."""
        with self.telling(model, is_wanted=True):
            await self._ensure(model)
            await self._service.load(model)

    async def unload(self, model: str, *, force: bool = False) -> None:
        """Take `model` off this node's device; as the service's."""
        with self.telling(model):
            await self._service.unload(model, force=force)

    async def pin(self, model: str) -> None:
        """Keep `model` on this node's device, from a peer if only peers have it; as the service's."""
        with self.telling(model, is_wanted=True):
            await self._ensure(model)
            await self._service.pin(model)

    async def unpin(self, model: str) -> None:
        """Let `model` be evicted here again; as the service's."""
        with self.telling(model):
            await self._service.unpin(model)

    def check_room(self, model: str, sessions: int) -> None:
        """Do nothing: what this node has no room for may run elsewhere."""

    @contextmanager
    def telling(self, model: str, *, is_wanted: bool = False) -> Iterator[None]:
        """Tell where else a model is that this node does not have, or which models there are in all."""
        try:
            yield
        except ModelNotFoundError as error:
            held, holders = self._elsewhere.find(ModelId(model))
            if held is None:
                raise self.unknown(model) from error
            raise ModelElsewhereError(model, tuple(holders), is_wanted=is_wanted) from error

    async def codec(self, model: str, error: SllmError) -> CodecT:
        """Return a peer's codec of a model that this node does not have, or can't use: `error` says which.

        Raises:
            PeerUnreachableError: only peers have it, and they can't be asked.
            SllmError: nobody has it, or nobody gave it in place of what can't be used here.
        """
        try:
            codec = await self._elsewhere.codec(ModelId(model))
        except SllmError:
            if isinstance(error, ModelNotFoundError):
                raise
            codec = None  # what is wrong here can be mended here
        if codec is None:
            self.refuse(model, error)
        return codec

    def refuse(self, model: str, error: SllmError) -> NoReturn:
        """Raise what is told of a model that no peer has: there is none, or this node's own can't be used."""
        if isinstance(error, ModelNotFoundError):
            raise self.unknown(model) from error
        raise error

    def unknown(self, model: str) -> ModelNotFoundError:
        """Return what is told of a model that no node has: those that there are."""
        here = {status.model for status in self._service.models()}
        return ModelNotFoundError(model, tuple(sorted(here | self._elsewhere.names())))
