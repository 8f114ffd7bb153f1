"""The kernels of decode steps: what they take, and how they get onto a device and are launched.

They are compiled in variants (head size, kind of float, rows), each when it is first asked for; a
variant is asked for once before a graph is captured, because loading one is not for graphs. What a
kernel is told travels with its launch, so that a launch is all that a graph has to keep.

Every kernel lets the next one of the stream start while it runs, and waits itself before it touches
what others touch (kernels/ptx.cuh): so the next kernel's start, and the first weights that it reads,
hide behind this one's end. `overlaps=False` launches them one after another.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from cuda.bindings import driver

from sllm_node.device import nvrtc
from sllm_node.device.kernels import Context, architecture_of
from sllm_node.device.step_parameters import Variant

_OVERLAPPING: Final = 90
"""Architectures from this one on have kernels that wait for each other themselves."""


@dataclass(frozen=True, slots=True)
class _Loaded:
    module: Any
    function: Any


class StepKernels:
    """The kernels of decode steps on one device."""

    def __init__(
        self, context: Context, handle: Any, cache: Path | None = None, *, overlaps: bool = True
    ) -> None:
        self._context = context
        self._cache = cache
        self._loaded: dict[Variant, _Loaded] = {}
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
        function = self._function(variant)
        pointers = np.array([parameters.ctypes.data], np.uint64)
        config = driver.CUlaunchConfig()
        config.gridDimX, config.gridDimY, config.gridDimZ = grid
        config.blockDimX, config.blockDimY, config.blockDimZ = threads, 1, 1
        config.hStream = driver.CUstream(stream)
        if self.overlaps:
            config.attrs = [_overlap()]
            config.numAttrs = 1
        with self._context:
            launched = driver.cuLaunchKernelEx(config, function, pointers.ctypes.data, 0)
        self._context.check(f"launch {variant.name}", (*launched, None))

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
