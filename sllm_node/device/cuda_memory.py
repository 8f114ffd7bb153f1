"""Memory of a GPU, mapped piece by piece, and host memory that the driver has page-locked.

Device memory is virtual: a range of addresses is reserved once, and physical memory is created,
mapped and unmapped piece by piece by one thread a device, in order. Siblings (other GPUs of this
process that can reach the memory directly) get access to every piece, for relays and clones.
"""

from collections.abc import Collection, Sequence
from concurrent.futures import Future
from typing import TYPE_CHECKING

from cuda.bindings import driver

from sllm_node.core.errors import DeviceError
from sllm_node.core.units import align_up
from sllm_node.device.base import Done
from sllm_node.device.host import address_of, map_memory, prefer_nodes, touch

if TYPE_CHECKING:
    from sllm_node.device.cuda import CudaDevice


class _FutureEvent:
    """The end of a job of the memory thread."""

    def __init__(self, future: "Future[BaseException | None]") -> None:
        self._future = future

    def on_done(self, done: Done) -> None:
        self._future.add_done_callback(lambda future: done(future.result()))

    def wait(self) -> None:
        """Block until it happens.

        Raises:
            DeviceError: what the job failed with.
        """
        error = self._future.result()
        if error is not None:
            raise error


class _Array:
    """Device bytes as torch takes them."""

    def __init__(self, address: int, size: int) -> None:
        self.__cuda_array_interface__ = {
            "shape": (size,), "typestr": "|u1", "data": (address, False), "version": 3,
        }  # fmt: skip


class CudaRange:
    """Addresses for life; memory behind the pieces that are mapped."""

    def __init__(self, device: "CudaDevice", size: int, piece_bytes: int) -> None:
        self._device = device
        self._size = size
        grain = device.granularity
        self._piece_bytes = align_up(piece_bytes, grain)
        self._reserved = align_up(size, grain)
        with device.cuda:
            self.address = int(
                device.cuda.check(
                    f"reserve {self._reserved} bytes of addresses",
                    driver.cuMemAddressReserve(self._reserved, grain, 0, 0),
                )
            )
        self._mapped: set[int] = set()
        self._behind: set[int] = set()
        """Pieces with memory behind them; the memory thread's own."""
        self._is_open = True

    @property
    def size(self) -> int:
        return self._size

    @property
    def array(self) -> _Array:
        assert self._is_open, "the range is closed"
        return _Array(self.address, self._size)

    @property
    def piece_bytes(self) -> int:
        return self._piece_bytes

    @property
    def mapped(self) -> Collection[int]:
        return self._mapped

    def map(self, pieces: Collection[int]) -> _FutureEvent:
        wanted = sorted(pieces)
        assert not self._mapped & set(wanted)
        size = sum(self._bytes(piece) for piece in wanted)
        self._device.ledger.take(size)
        self._mapped |= set(wanted)
        return _FutureEvent(self._device.memory.submit(self._map_all, wanted))

    def unmap(self, pieces: Collection[int]) -> _FutureEvent:
        given = sorted(pieces)
        assert self._mapped >= set(given)
        self._mapped -= set(given)
        self._device.ledger.give_back(sum(self._bytes(piece) for piece in given))
        return _FutureEvent(self._device.memory.submit(self._unmap_all, given))

    def close(self) -> None:
        if not self._is_open:
            return
        self._is_open = False
        self.unmap(set(self._mapped))
        self._device.memory.submit(driver.cuMemAddressFree, self.address, self._reserved)

    # --- on the memory thread -----------------------------------------------------------------

    def _map_all(self, pieces: Sequence[int]) -> BaseException | None:
        try:
            for piece in pieces:
                self._map_one(piece)
            for first, last in _runs(pieces):
                self._give_access(first, last)
        except DeviceError as error:
            return error
        return None

    def _map_one(self, piece: int) -> None:
        cuda, size = self._device.cuda, self._bytes(piece)
        memory = cuda.check(
            f"create {size} bytes of device memory (is another process using the device?)",
            driver.cuMemCreate(size, self._device.properties, 0),
        )
        try:
            cuda.check("map", driver.cuMemMap(self._at(piece), size, 0, memory, 0))
        finally:
            driver.cuMemRelease(memory)  # the mapping keeps it
        self._behind.add(piece)

    def _give_access(self, first: int, last: int) -> None:
        size = self._at(last) + self._bytes(last) - self._at(first)
        access = self._device.access
        result = driver.cuMemSetAccess(self._at(first), size, access, len(access))
        self._device.cuda.check("give access to mapped memory", (*result, None))

    def _unmap_all(self, pieces: Sequence[int]) -> BaseException | None:
        error: BaseException | None = None
        given = [piece for piece in pieces if piece in self._behind]
        self._behind.difference_update(given)
        for first, last in _runs(given):
            size = self._at(last) + self._bytes(last) - self._at(first)
            (code,) = driver.cuMemUnmap(self._at(first), size)
            error = error or self._device.cuda.error("unmap", code)
        return error

    def _at(self, piece: int) -> int:
        return self.address + piece * self._piece_bytes

    def _bytes(self, piece: int) -> int:
        left = self._reserved - piece * self._piece_bytes
        assert piece >= 0 < left
        return min(self._piece_bytes, left)


def _runs(pieces: Sequence[int]) -> list[tuple[int, int]]:
    """Return (first, last) of each run of neighbours in sorted `pieces`."""
    runs: list[tuple[int, int]] = []
    for piece in pieces:
        if runs and runs[-1][1] == piece - 1:
            runs[-1] = (runs[-1][0], piece)
        else:
            runs.append((piece, piece))
    return runs


class CudaPinnedBuffer:
    """Host memory that the driver has page-locked, for all devices."""

    def __init__(self, device: "CudaDevice", size: int, *, huge_pages: bool) -> None:
        self._device = device
        self._size = size
        self._view = memoryview(map_memory(size, huge_pages=huge_pages))[:size]
        prefer_nodes(self._view, device.nodes)
        touch(self._view, huge_pages=huge_pages)
        flags = driver.CU_MEMHOSTREGISTER_PORTABLE
        with device.cuda:
            (code,) = driver.cuMemHostRegister(address_of(self._view), size, flags)
        error = device.cuda.error(f"page-lock {size} bytes of host memory", code)
        if error is not None:
            raise DeviceError(
                device.name,
                f"{error.problem}; lower store.pool_bytes, or allow more: LimitMEMLOCK=infinity in "
                "the unit, `ulimit -l unlimited` in a shell, the memory limit of the container",
            )

    @property
    def size(self) -> int:
        return self._size

    @property
    def view(self) -> memoryview:
        return self._view

    def close(self) -> None:
        if not len(self._view):
            return
        with self._device.cuda:
            driver.cuMemHostUnregister(address_of(self._view))
        self._view = memoryview(b"")
