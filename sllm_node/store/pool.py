"""The pinned pool: one page-locked region, taken at start, cut into equal chunks, never grown."""

from sllm_node.device.base import Device, PinnedBuffer


class PinnedPool:
    """`chunks` slices of `chunk_bytes` each; which of them hold what is `residency`'s to know."""

    def __init__(
        self, device: Device, pool_bytes: int, chunk_bytes: int, *, huge_pages: bool
    ) -> None:
        self.chunk_bytes = chunk_bytes
        self.chunks = pool_bytes // chunk_bytes
        self._buffer: PinnedBuffer = device.pin(self.chunks * chunk_bytes, huge_pages=huge_pages)

    def view(self, chunk: int, size: int) -> memoryview:
        """Return the first `size` bytes of `chunk`, writable."""
        assert 0 <= chunk < self.chunks
        assert size <= self.chunk_bytes
        start = chunk * self.chunk_bytes
        return self._buffer.view[start : start + size]

    def close(self) -> None:
        """Give the region back; no view may be in use."""
        self._buffer.close()
