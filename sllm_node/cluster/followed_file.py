"""The cluster file on its disk and the files that it names: read again when they have changed.

A renewed certificate is taken as it is; other named files are read at the start only, and so is what
systemd has handed over, whatever lies beside the cluster file since. Those are told by their keys.
"""

import logging
from collections.abc import Callable, Collection
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

from sllm_node.cluster.file import ClusterFile, Reload, reload
from sllm_node.cluster.named_files import named_files, used_files
from sllm_node.core.config import read_text
from sllm_node.core.errors import ConfigError
from sllm_node.core.types import NodeId

log = logging.getLogger(__name__)

Renew = Callable[[Collection[str]], frozenset[str]]
"""Takes those of the changed files that it can, by their keys, and says which."""


class FollowedFile:
    """Tells a changed file by its time, size and number; a named one that it names by its content, too."""

    def __init__(self, path: Path, me: NodeId, cluster: ClusterFile) -> None:
        self._path = path
        self._me = me
        self._named = dict(named_files(cluster, path, me))
        used = dict(used_files(cluster, path, me))
        self._handed = {key for key, named in self._named.items() if used[key] != named}
        self._stamp = self._look()
        self._taken = {key: _digest(named) for key, named in self._named.items()}

    def has_changed(self) -> bool:
        """Tell whether one of the files is another than was looked at last."""
        return self._look() != self._stamp

    def read(self, old: ClusterFile, renew: Renew) -> Reload:
        """Return what it says now that `old` did not; let `renew` take what has changed beside it.

        Raises:
            ConfigError: it can't be read, or is wrong.
        """
        self._stamp = self._look()
        renewed, needs_restart = self._renew(renew)
        found = reload(old, read_text(self._path), str(self._path), self._me)
        found = replace(found, needs_restart=(*found.needs_restart, *needs_restart))
        log.info("cluster file read", extra={
            "added": list(found.added), "removed": list(found.removed),
            "moved": list(found.moved), "renewed": renewed,
            "needs_restart": list(found.needs_restart),
        })  # fmt: skip
        return found

    def _renew(self, renew: Renew) -> tuple[list[str], list[str]]:
        """Return the keys of the named files that were taken, and of those that a restart takes."""
        digests = {key: _digest(named) for key, named in self._named.items()}
        changed = {
            key for key, digest in digests.items()
            if None not in (digest, self._taken[key]) and digest != self._taken[key]
        }  # fmt: skip
        try:
            taken = renew(frozenset(changed - self._handed))
        except ConfigError as error:
            log.error(  # noqa: TRY400 - the sentence says it
                "renewed certificate refused, the old one stays", extra={"error": str(error)}
            )
            return [], sorted(changed & self._handed)
        self._taken.update((key, digests[key]) for key in taken)
        return sorted(taken & changed), sorted(changed - taken)

    def _look(self) -> tuple[tuple[int, int, int] | None, ...]:
        return tuple(_stamp(path) for path in (self._path, *self._named.values()))


def _stamp(path: Path) -> tuple[int, int, int] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size, found.st_ino


def _digest(path: Path) -> bytes | None:
    """Return what tells a content from another; None: it can't be read, at the moment or at all."""
    try:
        return sha256(path.read_bytes()).digest()
    except OSError:
        return None
