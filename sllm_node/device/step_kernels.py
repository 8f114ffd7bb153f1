"""The kernels of decode steps: what they take, and how they get onto a device and are launched.

They are compiled in variants (head size, kind of float, rows), each when it is first asked for; a
variant is asked for once before a graph is captured, because loading one is not for graphs. What a
kernel is told travels with its launch, so that a launch is all that a graph has to keep.

Every kernel lets the next one of the stream start while it runs, and waits itself before it touches
what others touch (kernels/ptx.cuh): so the next kernel's start, and the first weights that it reads,
hide behind this one's end. `overlaps=False` launches them one after another.

What a launch needs besides its numbers takes the host longer to put together than the launch itself, so
it is `prepared` once where a kernel is launched once a layer. The driver copies numbers when it takes a
launch: a record may be written to again right behind it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from cuda.bindings import driver

from sllm_node.device import nvrtc
from sllm_node.device.kernels import Context, architecture_of
from sllm_node.device.step_parameters import Variant

_OK: Final = driver.CUresult.CUDA_SUCCESS
_OVERLAPPING: Final = 90
"""Architectures from this one on have kernels that wait for each other themselves."""


@dataclass(frozen=True, slots=True)
class _Loaded:
    module: Any
    function: Any


class _Launch:
    """A launch that is made again and again."""

    def __init__(
        self,
        context: Context,
        name: str,
        function: Any,
        config: Any,
        parameters: npt.NDArray[np.void],
    ) -> None:
        self._context = context
        self._name = name
        self._function = function
        self._config = config
        self._parameters = parameters  # so that they stay where they are
        self._pointers = np.array([parameters.ctypes.data], np.uint64)
        self._address = self._pointers.ctypes.data

    def __call__(self) -> None:
        with self._context:
            launched = driver.cuLaunchKernelEx(self._config, self._function, self._address, 0)
        if launched[0] != _OK:
            self._context.check(f"launch {self._name}", (*launched, None))


class StepKernels:
    """The kernels of decode steps on one device."""

    def __init__(
        self, context: Context, handle: Any, cache: Path | None = None, *, overlaps: bool = True
    ) -> None:
        self._context = context
        self._cache = cache
        self._loaded: dict[Variant, _Loaded] = {}
        self._attributes = [_overlap()]
        """Of every launch, where kernels overlap."""
        self.architecture = architecture_of(context, handle)
        self.overlaps = overlaps and int(self.architecture.removeprefix("sm_")) >= _OVERLAPPING
        attribute = driver.CUdevice_attribute.CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT
        self.multiprocessors = int(
            context.check("count multiprocessors", driver.cuDeviceGetAttribute(attribute, handle))
        )

    def blocks(self, variant: Variant, threads: int) -> int:
        """Return how many thread blocks fit on a multiprocessor at once.

        Raises:
            KernelError: the variant can't be compiled.
            DeviceError: the driver does not take it.
        """
        function = self._function(variant)
        with self._context:
            found = driver.cuOccupancyMaxActiveBlocksPerMultiprocessor(function, threads, 0)
        return max(1, int(self._context.check(f"ask for the room of {variant.name}", found)))

    def launch(
        self,
        variant: Variant,
        grid: tuple[int, int, int],
        threads: int,
        parameters: npt.NDArray[np.void],
        stream: int,
    ) -> None:
        """Enqueue a variant with one record of parameters.

        Raises:
            KernelError: the variant can't be compiled.
            DeviceError: the driver does not take it.
        """
        self.prepared(variant, grid, threads, parameters, stream)()

    def prepared(
        self,
        variant: Variant,
        grid: tuple[int, int, int],
        threads: int,
        parameters: npt.NDArray[np.void],
        stream: int,
    ) -> Callable[[], None]:
        """Return what enqueues a variant with what the record holds by then, as often as it is called.

        Raises:
            KernelError: the variant can't be compiled.
            DeviceError: the driver does not take it.
        """
        config = driver.CUlaunchConfig()
        config.gridDimX, config.gridDimY, config.gridDimZ = grid
        config.blockDimX, config.blockDimY, config.blockDimZ = threads, 1, 1
        config.hStream = driver.CUstream(stream)
        if self.overlaps:
            config.attrs = self._attributes
            config.numAttrs = len(self._attributes)
        return _Launch(self._context, variant.name, self._function(variant), config, parameters)

    def close(self) -> None:
        """Unload what was loaded; nothing launched may be under way."""
        with self._context:
            for loaded in self._loaded.values():
                driver.cuModuleUnload(loaded.module)
        self._loaded.clear()

    def _function(self, variant: Variant) -> Any:
        if variant not in self._loaded:
            name, check = variant.name, self._context.check
            code = nvrtc.compiled(name, self.architecture, self._cache, variant.defines)
            with self._context:
                module = check(f"load {name}", driver.cuModuleLoadData(code))
                function = check(f"find {name}", driver.cuModuleGetFunction(module, name.encode()))
            self._loaded[variant] = _Loaded(module, function)
        return self._loaded[variant].function


def _overlap() -> Any:
    attribute = driver.CUlaunchAttribute()
    attribute.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
    attribute.value.programmaticStreamSerializationAllowed = 1
    return attribute
