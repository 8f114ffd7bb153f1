"""A module whose weights are on their way: each layer waits for its own bytes, and for no others.

A checkpoint's tensors lie in the order of the forward pass, so a layer needs all bytes up to its last
one. What waits is a hook before the layer; parts outside of layers (embeddings, norm, head) wait by
themselves. Tied weights are stored once, where the first use wants them, so a tied head waits for no
more than the embedding. Buffers that are not stored are there from the start.

While a step waits, it lets jobs run that must not run beside one, and it does not count as busy.
When all bytes are there the hooks go: what is measured or captured later knows nothing of them.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, Protocol

from sllm_node.checkpoint.index import TensorIndex
from sllm_node.core.errors import SllmError
from sllm_node.core.types import Part
from sllm_node.engine.spread import layers_of
from sllm_node.engine.steps import StepThread


class Arrival(Protocol):
    """Says which bytes are there; that of an early lease satisfies it."""

    def has(self, ends: Sequence[int]) -> bool:
        """Tell whether each part has all its bytes before its one of `ends`."""

    def wait(self, ends: Sequence[int]) -> None:
        """Wait for them in this thread, or raise why they don't come."""

    def stop(self) -> None:
        """End every wait."""


class WeightsMissingError(Exception):
    """A step needs bytes that will not come. Never leaves the engine."""

    def __init__(self, error: SllmError) -> None:
        super().__init__(str(error))
        self.error = error
        """Why: what those are told who wait for the load."""


class EarlyThreads:
    """Step threads for engines whose weights are on their way, one each."""

    def __init__(self, make: Callable[[], StepThread]) -> None:
        self._make = make
        self._spare: list[StepThread] = []
        """Those that nobody needs now; what torch keeps for a thread is not cheap to make."""
        self.all: list[StepThread] = []

    def take(self) -> StepThread:
        """Return one that nobody else steps on."""
        if not self._spare:
            self._spare.append(self._make())
            self.all += self._spare
        return self._spare.pop()

    def give_back(self, steps: StepThread) -> None:
        """Keep one for the next load."""
        self._spare.append(steps)

    @property
    def taken(self) -> int:
        """How many step now."""
        return len(self.all) - len(self._spare)


class Arriving:
    """Makes the steps of one module wait for its weights, on a thread of their own."""

    def __init__(
        self,
        needs: Sequence[tuple[Any, tuple[int, ...]]],
        arrival: Arrival,
        threads: EarlyThreads,
    ) -> None:
        self._arrival = arrival
        self._threads = threads
        self._ends = [max(ends) for ends in zip(*(ends for _, ends in needs), strict=True)]
        self.steps = threads.take()
        """Where to step meanwhile: a step that waits must hold up no other model's."""
        self._hooks = [
            module.register_forward_pre_hook(partial(self._wait, ends)) for module, ends in needs
        ]

    def _wait(self, ends: tuple[int, ...], module: Any, args: tuple[Any, ...]) -> None:
        if self._arrival.has(ends):
            return
        with self.steps.paused():
            try:
                self._arrival.wait(ends)
            except SllmError as error:
                raise WeightsMissingError(error) from error

    @property
    def is_complete(self) -> bool:
        """Whether no step would wait any more."""
        return self._arrival.has(self._ends)

    def stop(self) -> None:
        """Let the step that waits fail, and every later one that would have to wait."""
        self._arrival.stop()

    def end(self) -> None:
        """Take the hooks away; no step may be under way."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        self._threads.give_back(self.steps)


def needs_of(
    model: Any, index: TensorIndex, parts: Sequence[Part]
) -> list[tuple[Any, tuple[int, ...]]]:
    """Return what of `model` must wait, and up to which byte of each part.

    These are the layers, as wholes, and every module outside of them that has tensors of its own.
    """
    places = _places(index)
    layers = {id(layer) for layer in layers_of(model)}
    inside = {id(module) for layer in layers_of(model) for module in layer.modules()}
    found = []
    for path, module in model.named_modules():
        if id(module) in inside and id(module) not in layers:
            continue
        names = _names(module, path, is_whole=id(module) in layers)
        wanted = [places[name] for name in names if name in places]
        if wanted:
            ends = tuple(
                max((end for start, end in wanted if part.start <= start < part.end), default=0)
                for part in parts
            )
            found.append((module, ends))
    return found


def _places(index: TensorIndex) -> dict[str, tuple[int, int]]:
    """Return the bytes [start, end) of every tensor, by all its names."""
    bases = [index.shard_base(number) for number in range(len(index.shards))]
    places = {}
    for entry in index.tensors:
        start = bases[entry.shard] + entry.offset
        places[entry.name] = (start, start + entry.size)
    for alias, name in index.aliases:
        places[alias] = places[name]
    return places


def _names(module: Any, path: str, *, is_whole: bool) -> Iterator[str]:
    prefix = f"{path}." if path else ""
    for name, _ in module.named_parameters(recurse=is_whole, remove_duplicate=False):
        yield prefix + name
    for name, _ in module.named_buffers(recurse=is_whole, remove_duplicate=False):
        yield prefix + name
