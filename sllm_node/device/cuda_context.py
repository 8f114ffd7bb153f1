"""The CUDA driver's contexts: calls with one of them current, and what the results mean.

The contexts are the primary ones, which torch uses too; each call into the driver makes its device's
context current and puts the caller's back afterwards.

An error that poisons the context (an illegal address, an uncorrectable memory error) leaves nothing
usable in this process: `on_lost` is called once and is expected to end it.
"""

from collections.abc import Callable
from contextlib import suppress
from threading import Lock, local
from typing import Any, Final

from cuda.bindings import driver

from sllm_node.core.errors import DeviceError, DeviceLostError

RESULT = driver.CUresult
OK: Final = RESULT.CUDA_SUCCESS
_POISON: Final = frozenset(
    getattr(RESULT, "CUDA_ERROR_" + name)
    for name in (
        "ASSERT", "CONTEXT_IS_DESTROYED", "DEINITIALIZED", "ECC_UNCORRECTABLE", "EXTERNAL_DEVICE",
        "HARDWARE_STACK_ERROR", "ILLEGAL_ADDRESS", "ILLEGAL_INSTRUCTION", "INVALID_ADDRESS_SPACE",
        "INVALID_PC", "LAUNCH_FAILED", "LAUNCH_TIMEOUT", "MISALIGNED_ADDRESS",
        "NVLINK_UNCORRECTABLE", "UNKNOWN",
    )
    if hasattr(RESULT, "CUDA_ERROR_" + name)
)  # fmt: skip

OnLost = Callable[[DeviceLostError], None]


class _Entered(local):
    """Whose contexts a thread has made current, the innermost last."""

    def __init__(self) -> None:
        self.contexts: list[CudaContext] = []


_ENTERED: Final = _Entered()


class CudaContext:
    """The context of one device: checked calls with it current."""

    def __init__(self, name: str, handle: Any, context: Any, on_lost: OnLost) -> None:
        self.name = name
        self.handle = handle
        self.context = context
        self.lost: DeviceLostError | None = None
        self._on_lost = on_lost
        self._losing = Lock()

    def __enter__(self) -> None:
        contexts = _ENTERED.contexts
        if not contexts or contexts[-1] is not self:
            driver.cuCtxPushCurrent(self.context)
        contexts.append(self)

    def __exit__(self, *_: object) -> None:
        contexts = _ENTERED.contexts
        contexts.pop()
        if not contexts or contexts[-1] is not self:
            driver.cuCtxPopCurrent()

    def check(self, what: str, result: tuple[Any, ...]) -> Any:
        """Return what a driver call gave.

        Raises:
            DeviceError: it failed. DeviceLostError: so that the context is gone with it.
        """
        if result[0] != OK and (error := self.error(what, result[0])) is not None:
            raise error
        return result[1] if len(result) == 2 else result[1:]

    def error(self, what: str, code: Any) -> DeviceError | None:
        """Return what a driver call's result means; tell the owner if the context is lost."""
        if code == OK:
            return None
        problem = f"{what}: {name_of(code)}"
        if code not in _POISON:
            return DeviceError(self.name, problem)
        with self._losing:
            is_first = self.lost is None
            if self.lost is None:
                self.lost = DeviceLostError(self.name, problem)
        if is_first:
            self._on_lost(self.lost)
        return self.lost


def name_of(code: Any) -> str:
    """Return what a result is called, and what the driver says of it."""
    words = ""
    with suppress(RuntimeError):  # without a driver there is nobody to ask
        found, text = driver.cuGetErrorString(code)
        words = text.decode() if found == RESULT.CUDA_SUCCESS and text else ""
    name = str(getattr(code, "name", code))
    return f"{name} ({words})" if words else name
