"""Host memory for fast copies: mapped in one piece, near its devices, every page touched."""

import ctypes
import mmap
import os
import threading
from collections.abc import Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Final, cast

import numpy as np

from sllm_node.core.units import MIB, PAGE, align_up

_TOUCH_THREADS_MAX: Final = 32
_TOUCH_BYTES: Final = 64 * MIB
_POPULATE_WRITE: Final = 23
"""MADV_POPULATE_WRITE (Linux 5.14): fault pages in without writing to them one by one."""
_COLLAPSE: Final = 25
"""MADV_COLLAPSE (Linux 6.1): make huge pages of what is mapped, now."""
_DONTNEED: Final = 4
_MBIND: Final = 237
"""The system call on x86-64; libc has no wrapper for it."""
_MPOL_PREFERRED, _MPOL_INTERLEAVE = 1, 3
_NODES_MAX: Final = 64
_NODES: Final = Path("/sys/devices/system/node/online")


def map_memory(size: int, *, huge_pages: bool) -> mmap.mmap:
    """Return `size` bytes of anonymous memory, rounded up to pages, none of them touched.

    Raises:
        OSError: the system refuses.
    """
    region = mmap.mmap(-1, align_up(size, PAGE), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if huge_pages:
        with suppress(OSError):  # a kernel without them: small pages do, more slowly
            region.madvise(mmap.MADV_HUGEPAGE)
    return region


def touch(view: memoryview, *, huge_pages: bool) -> None:
    """Fault every page in, by several threads: one thread clears about 2 GB/s."""
    threads_count = min(_TOUCH_THREADS_MAX, os.cpu_count() or 1)
    pieces = [view[start : start + _TOUCH_BYTES] for start in range(0, len(view), _TOUCH_BYTES)]
    with ThreadPoolExecutor(threads_count, "sllm-touch") as threads:
        list(threads.map(partial(_touch_piece, huge_pages=huge_pages), pieces))


def _touch_piece(piece: memoryview, *, huge_pages: bool) -> None:
    # Not mmap.madvise: that one keeps the GIL, and with it the event loop, for the whole time.
    if _libc().madvise(address_of(piece), len(piece), _POPULATE_WRITE):
        np.frombuffer(piece, np.uint8)[::PAGE] = 0  # an older kernel
    if huge_pages:
        # What came as small pages, because large ones were rare at that moment, is put together.
        _libc().madvise(address_of(piece), len(piece), _COLLAPSE)


def discard(view: memoryview) -> None:
    """Give the pages behind `view` back to the system; it reads as zeros from now on."""
    _libc().madvise(address_of(view), len(view), _DONTNEED)


def address_of(view: memoryview) -> int:
    """Return where writable `view` begins."""
    return ctypes.addressof(ctypes.c_char.from_buffer(view))


def numa_nodes() -> int:
    """Return how many NUMA nodes this machine has."""
    with suppress(OSError, ValueError):
        last = _NODES.read_text().strip().replace(",", "-").split("-")[-1]
        return int(last) + 1
    return 1


def prefer_nodes(view: memoryview, nodes: Collection[int]) -> bool:
    """Ask for untouched `view` to come from the memory of `nodes`; tell whether it will.

    One node is preferred, several are interleaved. Without effect on a machine of one node.
    """
    wanted = [node for node in nodes if 0 <= node < _NODES_MAX]
    if not wanted or numa_nodes() < 2:
        return False
    mask = ctypes.c_ulong(sum(1 << node for node in set(wanted)))
    policy = _MPOL_PREFERRED if len(set(wanted)) == 1 else _MPOL_INTERLEAVE
    arguments = (address_of(view), len(view), policy, ctypes.addressof(mask), _NODES_MAX, 0)
    system_call = cast("Callable[..., int]", _libc().syscall)
    return system_call(_MBIND, *(ctypes.c_ulong(value) for value in arguments)) == 0


_LIBRARY: list[ctypes.CDLL] = []
_LOADING = threading.Lock()


def _libc() -> ctypes.CDLL:
    with _LOADING:
        if not _LIBRARY:
            library = ctypes.CDLL(None, use_errno=True)
            library.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
            library.madvise.restype = ctypes.c_int
            library.syscall.restype = ctypes.c_long
            _LIBRARY.append(library)
    return _LIBRARY[0]
