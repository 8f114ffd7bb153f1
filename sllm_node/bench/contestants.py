"""Who is compared: our store, and the loaders that others use, each as its project recommends.

A contestant loads a model's files onto a device and gives name -> tensor. All are told whether the
bytes are expected in the page cache, because two peers read past it unless asked not to. Nobody
keeps anything between loads but ours, whose pinned pool is what it has instead of the page cache.
"""

import asyncio
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final, Protocol

import torch
import uvloop

import sllm_node
from sllm_node.bench.devices import is_cuda, open_device
from sllm_node.bench.files import ModelFiles
from sllm_node.checkpoint.catalog import Catalog, Checkpoint
from sllm_node.core.clock import MonotonicClock
from sllm_node.core.config import StoreConfig
from sllm_node.core.errors import BenchError
from sllm_node.core.metrics import Metrics
from sllm_node.core.types import ModelId, Tier
from sllm_node.core.units import MIB
from sllm_node.engine.weights import tensor_views
from sllm_node.store.lease import Lease
from sllm_node.store.store import Store

Tensors = dict[str, torch.Tensor]
OURS: Final = "sllm_node raw"
OURS_ENCODED: Final = "sllm_node codec"
OF_OURS: Final = (OURS, OURS_ENCODED)
BOTH_OF_OURS: Final = "sllm_node"
"""As a name of contestants: the two above."""
_DEVICE_SLACK: Final = 64 * MIB


class Loaded:
    """The tensors of one load; `free` drops them and what stands behind them."""

    def __init__(self, tensors: Tensors, release: Callable[[], None] = lambda: None) -> None:
        self.tensors = tensors
        self._release = release

    def free(self) -> None:
        """Drop the tensors; the caller must hold none of them."""
        self.tensors.clear()
        self._release()


class Contestant(Protocol):
    """A way to load."""

    @property
    def name(self) -> str: ...

    @property
    def in_module_layout(self) -> bool:
        """Names are those of transformers' module, which may differ from those in the files."""

    def version(self) -> str | None:
        """Return what is installed; None: nothing."""

    def refusal(self, device: str) -> str | None:
        """Return why it can't load onto `device`, if it can't."""

    def load(self, files: ModelFiles, device: str, *, warm: bool) -> Loaded:
        """Load all tensors; `warm`: the bytes are expected in memory, not on the disk."""

    def close(self) -> None:
        """Give everything back."""


class Peer:
    """A loader of another project: a package and a function that calls it."""

    in_module_layout = False

    def __init__(
        self, name: str, package: str, function: "PeerFunction", *, cuda_only: bool = False
    ) -> None:
        self.name = name
        self._package = package
        self._function = function
        self._cuda_only = cuda_only

    def version(self) -> str | None:
        if find_spec(self._package.replace("-", "_")) is None:
            return None
        return metadata.version(self._package)

    def refusal(self, device: str) -> str | None:
        if self._cuda_only and not is_cuda(device):
            return "loads onto CUDA devices only"
        return None

    def load(self, files: ModelFiles, device: str, *, warm: bool) -> Loaded:
        return Loaded(self._function(files, device, warm))

    def close(self) -> None:
        pass


PeerFunction = Callable[[ModelFiles, str, bool], Tensors]


def load_safetensors(files: ModelFiles, device: str, warm: bool) -> Tensors:  # noqa: FBT001 - one signature for all
    """Load with `safetensors.torch.load_file`, file by file."""
    from safetensors.torch import load_file

    tensors: Tensors = {}
    for path in files.safetensors():
        tensors.update(load_file(path, device=device))
    return tensors


def load_fastsafetensors(files: ModelFiles, device: str, warm: bool) -> Tensors:  # noqa: FBT001
    """Load with `fastsafe_open` over all files.

    GPUDirect Storage where its driver is loaded. It reads with O_DIRECT unless told otherwise; a
    warm load is told to use the page cache. Its tensors own their memory beyond the block.
    """
    from fastsafetensors import fastsafe_open

    nogds = not Path("/proc/driver/nvidia-fs/version").exists() or not is_cuda(device)
    with (
        _environment("FASTSAFETENSORS_ODIRECT", "0" if warm else None),
        fastsafe_open(files.safetensors(), device=device, nogds=nogds or warm) as opened,
    ):
        return {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - no mapping


def load_runai(files: ModelFiles, device: str, warm: bool) -> Tensors:  # noqa: FBT001
    """Load with `SafetensorsStreamer.stream_files`, all files at once, onto the device.

    Its defaults are what it recommends: 16 threads, or 512 reads in flight where it reads
    asynchronously. Tensors belong to the caller.
    """
    from runai_model_streamer import SafetensorsStreamer

    with SafetensorsStreamer() as streamer:
        streamer.stream_files(files.safetensors(), device=device)
        return dict(streamer.get_tensors())


def load_instanttensor(files: ModelFiles, device: str, warm: bool) -> Tensors:  # noqa: FBT001
    """Load with `safe_open` over all files; buffered I/O where the bytes are in the page cache."""
    from instanttensor import BackendPolicy, safe_open

    backend = BackendPolicy.BUFFERED if warm else None
    with safe_open(files.safetensors(), framework="pt", device=device, backend=backend) as opened:
        return dict(opened.tensors())


class Transformers:
    """transformers' `from_pretrained`: also builds the module, as whoever uses it must."""

    name = "transformers"
    in_module_layout = True

    def version(self) -> str | None:
        return metadata.version("transformers")

    def refusal(self, device: str) -> str | None:
        if is_cuda(device) and find_spec("accelerate") is None:
            return "needs the package accelerate to load onto a GPU"
        return None

    def load(self, files: ModelFiles, device: str, *, warm: bool) -> Loaded:
        from transformers import AutoModelForCausalLM
        from transformers.utils import logging

        logging.disable_progress_bar()
        where = {"device_map": device} if is_cuda(device) else {}
        model = AutoModelForCausalLM.from_pretrained(
            str(files.folder), dtype="auto", local_files_only=True, **where
        )
        return Loaded(dict(model.state_dict()))

    def close(self) -> None:
        pass


class Ours:
    """The store of this node on a device of its own, its pinned pool taken once, as a node does."""

    name = OURS
    in_module_layout = True

    def __init__(self, config: StoreConfig) -> None:
        """Take `config`, whose pool holds every checkpoint that is loaded."""
        self._config = config
        self._runner: asyncio.Runner | None = None
        self._device: Any = None
        self._store: Store | None = None

    def version(self) -> str | None:
        return sllm_node.__version__

    def refusal(self, device: str) -> str | None:
        return None

    def start(self, checkpoint: Checkpoint, device: str) -> None:
        """Take the pool, and room on `device` for `checkpoint` or one beside it of its size.

        Raises:
            DeviceError: the system refuses.
        """
        room = checkpoint.index.size + _DEVICE_SLACK + self._config.decode_staging_bytes
        self._device = open_device(device, room)
        self._runner = asyncio.Runner(loop_factory=uvloop.new_event_loop)
        catalog = Catalog(checkpoint.path.parent)
        clock, metrics = MonotonicClock(), Metrics()
        self._store = Store(catalog, [self._device], self._config, clock, metrics)
        self._runner.run(self._store.start())

    def load(self, files: ModelFiles, device: str, *, warm: bool) -> Loaded:
        return self.load_model(files.model, device, warm=warm)

    def load_model(self, model: ModelId, device: str, *, warm: bool) -> Loaded:
        """Load one of the checkpoints beside the first one."""
        assert self._runner is not None, "the contestant is not started"
        assert self._store is not None, "the contestant is not started"
        if not warm:
            self._store.evict(model, Tier.DRAM, "bench")
        lease = self._runner.run(self._store.acquire(model))
        try:
            tensors = tensor_views(lease.checkpoint.index, lease.parts)
            places = {str(tensor.device) for tensor in tensors.values()}
            assert places == {device}, f"the bytes are on {places}"
        except BaseException:
            lease.release()
            raise
        return Loaded(tensors, lambda: self._give_back(model, lease))

    def _give_back(self, model: ModelId, lease: Lease) -> None:
        assert self._store is not None
        lease.release()
        self._store.evict(model, Tier.DEVICE, "bench")

    def close(self) -> None:
        if self._runner is None or self._store is None:
            return
        self._runner.run(self._store.close())
        self._runner.close()
        self._device.close()
        self._runner = self._store = None


class OursEncoded:
    """The same store with the same model, encoded."""

    name = OURS_ENCODED
    in_module_layout = True

    def __init__(self, ours: Ours) -> None:
        self._ours = ours

    def version(self) -> str | None:
        return self._ours.version()

    def refusal(self, device: str) -> str | None:
        return None

    def load(self, files: ModelFiles, device: str, *, warm: bool) -> Loaded:
        assert files.encoded is not None, "the model was not encoded"
        return self._ours.load_model(files.encoded.model, device, warm=warm)

    def close(self) -> None:
        """Do nothing: the store is closed by its other contestant."""


@contextmanager
def _environment(name: str, value: str | None) -> Iterator[None]:
    """Set an environment variable for the block; None leaves it as it is."""
    before = os.environ.get(name)
    if value is not None:
        os.environ[name] = value
    try:
        yield
    finally:
        if value is not None:
            os.environ.pop(name)
            if before is not None:
                os.environ[name] = before


_PEERS: Final[dict[str, Callable[[], Contestant]]] = {
    "safetensors": lambda: Peer("safetensors", "safetensors", load_safetensors),
    "transformers": Transformers,
    "fastsafetensors": lambda: Peer("fastsafetensors", "fastsafetensors", load_fastsafetensors),
    "runai": lambda: Peer("runai", "runai-model-streamer", load_runai),
    "instanttensor": lambda: Peer(
        "instanttensor", "instanttensor", load_instanttensor, cuda_only=True
    ),
}
CONTESTANT_NAMES: Final = (OURS, OURS_ENCODED, *_PEERS)


def contestant_names(text: str | None) -> tuple[str, ...]:
    """Return the names in a list with commas; None: all."""
    if not text:
        return CONTESTANT_NAMES
    names: list[str] = []
    for name in text.split(","):
        names += OF_OURS if name == BOTH_OF_OURS else (name,)
    return tuple(names)


def find_peer(name: str) -> Contestant:
    """Return the peer called `name`.

    Raises:
        BenchError: there is none of that name.
    """
    if name not in _PEERS:
        known = ", ".join(CONTESTANT_NAMES)
        raise BenchError(f"there is no contestant {name!r}; there are {known}")
    return _PEERS[name]()
