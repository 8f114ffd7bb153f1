"""The kernels of chunks in kernels/: what they are called, what they take, and how they get onto a device.

Each has one entry point, named like its file. One launch works on many chunks, whose descriptors,
laid out as `staging.CHUNK` or `staging.PIECE`, travel with it as a parameter: no copy has to bring
them. Results go to an array in device memory, or in pinned memory. The references are
`codec.exponent.decode` and `checkpoint.digest.chunk_digest`.
"""

from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Protocol

import numpy as np
from cuda.bindings import driver

from sllm_node.codec.exponent import BLOCK, FORMATS
from sllm_node.device import nvrtc
from sllm_node.device.staging import CHUNK, PIECE, Rows

CHECKSUM: Final = "checksum_chunks"
DECODERS: Final = {
    "exp-bf16": "decode_exp_bf16",
    "exp-f16": "decode_exp_f16",
    "exp-f32": "decode_exp_f32",
    "exp-f8e4m3": "decode_exp_f8e4m3",
    "exp-f8e5m2": "decode_exp_f8e5m2",
}
"""The kernel for each codec."""
KERNELS: Final = (*DECODERS.values(), CHECKSUM)
CHUNKS_MAX: Final = 120
"""Of one launch: their descriptors fit into 4 KiB of parameters."""

_ELEMENTS: Final = 8 * BLOCK
"""What a thread block decodes: eight warps, a block of the codec each."""
_DECODER_THREADS: Final = 256
_CHECKSUM_THREADS: Final = 288


class Context(Protocol):
    """A device's context: made current inside `with`, and calls checked."""

    def __enter__(self) -> None: ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None: ...

    def check(self, what: str, result: tuple[Any, ...]) -> Any:
        """Return what a driver call gave; raise what it failed with."""


class _Parameters:
    """What a launch is given, and the list of addresses that says where; copied by the launch."""

    def __init__(self, dtype: np.dtype[np.void]) -> None:
        self.descriptors = np.zeros(CHUNKS_MAX, dtype)
        self.results = np.zeros(1, np.uint64)
        self._list = np.array([self.descriptors.ctypes.data, self.results.ctypes.data], np.uint64)
        self.address = self._list.ctypes.data


class Kernels:
    """The kernels of one device, each compiled and loaded when it is first asked for.

    Launches belong to one thread.
    """

    def __init__(self, context: Context, handle: Any, cache: Path | None = None) -> None:
        self._context = context
        self._cache = cache
        self._loaded: dict[str, tuple[Any, Any]] = {}
        self._parameters = _Parameters(CHUNK), _Parameters(PIECE)
        self.architecture = architecture_of(context, handle)

    def prepare(self, names: Iterable[str] = KERNELS) -> None:
        """Compile and load kernels, so that no launch has to wait for that.

        Raises:
            KernelError: a kernel can't be compiled.
            DeviceError: the driver does not take it.
        """
        for name in names:
            self._function(name)

    def decode(
        self, codec: str, chunks: Rows, errors: int, stream: Any, largest: int | None = None
    ) -> None:
        """Enqueue the decoding of (n,) `CHUNK`s; `errors` is the address of n zeroed u32.

        `largest`: decoded bytes of the largest one, where that is known.
        """
        most = int(chunks["output_size"].max()) if largest is None else largest
        blocks = max(1, -(-most // (_ELEMENTS * FORMATS[codec].width)))
        for start in range(0, len(chunks), CHUNKS_MAX):
            some = chunks[start : start + CHUNKS_MAX]
            grid = (blocks, len(some))
            self._launch(DECODERS[codec], grid, _DECODER_THREADS, some, errors + 4 * start, stream)

    def checksum(self, pieces: Rows, digests: int, stream: Any) -> None:
        """Enqueue the digests of (n,) `PIECE`s to n u64 at address `digests`."""
        for start in range(0, len(pieces), CHUNKS_MAX):
            some = pieces[start : start + CHUNKS_MAX]
            grid = (len(some), 1)
            self._launch(CHECKSUM, grid, _CHECKSUM_THREADS, some, digests + 8 * start, stream)

    def close(self) -> None:
        """Unload what was loaded; nothing launched may be under way."""
        with self._context:
            for module, _ in self._loaded.values():
                driver.cuModuleUnload(module)
        self._loaded.clear()

    def _launch(
        self,
        name: str,
        grid: tuple[int, int],
        threads: int,
        descriptors: Rows,
        results: int,
        stream: Any,
    ) -> None:
        function = self._function(name)
        table = self._parameters[descriptors.dtype == PIECE]
        table.descriptors[: len(descriptors)] = descriptors
        table.results[0] = results
        with self._context:
            launched = driver.cuLaunchKernel(
                function, *grid, 1, threads, 1, 1, 0, stream, table.address, 0
            )
        self._context.check(f"launch {name}", (*launched, None))

    def _function(self, name: str) -> Any:
        if name not in self._loaded:
            code = nvrtc.compiled(name, self.architecture, self._cache)
            check = self._context.check
            with self._context:
                module = check(f"load {name}", driver.cuModuleLoadData(code))
                function = check(f"find {name}", driver.cuModuleGetFunction(module, name.encode()))
            self._loaded[name] = module, function
        return self._loaded[name][1]


def architecture_of(context: Context, handle: Any) -> str:
    """Return the architecture of a device, as in sm_90."""
    attribute = driver.CUdevice_attribute
    numbers = [
        context.check("ask for the architecture", driver.cuDeviceGetAttribute(which, handle))
        for which in (
            attribute.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR,
            attribute.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR,
        )
    ]
    return "sm_{}{}".format(*numbers)
