"""Tells the C library's allocator to keep what is freed, for programs that work through many buffers.

By default glibc gives blocks of 128 KiB and more, and the free end of its heaps, back to the kernel at
once. Who allocates the next buffer of that size pays for its pages again: a fault for each 4 KiB, under
a lock that all threads of the process share. Encoding a chunk makes a dozen such buffers.
"""

import ctypes
from typing import Final

_M_TRIM_THRESHOLD: Final = -1
_M_MMAP_THRESHOLD: Final = -3
_KEPT_BYTES: Final = 1 << 30
_MMAP_MOST: Final = 32 << 20
"""glibc takes no greater threshold: half of a heap."""


def keep_freed_memory() -> bool:
    """Let buffers of up to 32 MiB be taken from memory that was used before, in the whole process.

    For commands that end: the process keeps its peak. Returns False where the C library can't.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    settings = (_M_MMAP_THRESHOLD, _MMAP_MOST), (_M_TRIM_THRESHOLD, _KEPT_BYTES)
    return all(mallopt(name, value) for name, value in settings)
