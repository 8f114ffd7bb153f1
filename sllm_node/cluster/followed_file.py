"""The cluster file on its disk: read again when it has changed."""

import logging
from pathlib import Path

from sllm_node.cluster.file import ClusterFile, Reload, reload
from sllm_node.core.config import read_text
from sllm_node.core.types import NodeId

log = logging.getLogger(__name__)


class FollowedFile:
    """Tells a changed file by its time, size and number."""

    def __init__(self, path: Path, me: NodeId) -> None:
        self._path = path
        self._me = me
        self._stamp = self._look()

    def has_changed(self) -> bool:
        """Tell whether it is another one than was read last."""
        return self._look() != self._stamp

    def read(self, old: ClusterFile) -> Reload:
        """Return what it says now that `old` did not.

        Raises:
            ConfigError: it can't be read, or is wrong.
        """
        self._stamp = self._look()
        found = reload(old, read_text(self._path), str(self._path), self._me)
        log.info("cluster file read", extra={
            "added": list(found.added), "removed": list(found.removed),
            "moved": list(found.moved), "needs_restart": list(found.needs_restart),
        })  # fmt: skip
        return found

    def _look(self) -> tuple[int, int, int] | None:
        try:
            found = self._path.stat()
        except OSError:
            return None
        return found.st_mtime_ns, found.st_size, found.st_ino
