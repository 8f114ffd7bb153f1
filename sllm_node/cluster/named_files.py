"""The cluster file on its disk and the files that it names: where they lie, and who can read them."""

import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from sllm_node.cluster.file import NEEDED_FILES, ClusterFile, parse_cluster
from sllm_node.core.config import read_text
from sllm_node.core.errors import ConfigError
from sllm_node.core.types import NodeId

_SECRETS: Final = {"key": ("key_file",), "tls": ("private_key_file",)}
_DIRECTORY_FILES: Final = ("password_file", "ca_file", "certificate_file", "private_key_file")
_DIRECTORY_SECRETS: Final = {"directory.password_file", "directory.private_key_file"}


def load_cluster(path: Path, me: NodeId | None = None) -> ClusterFile:
    """Read and check the cluster file and, for the node `me`, the files of its trust.

    Raises:
        ConfigError: with every problem found, each naming its key.
    """
    cluster = parse_cluster(read_text(path), str(path), me)
    if me is not None and (problems := tuple(secret_problems(cluster, path, me))):
        raise ConfigError(str(path), problems)
    return cluster


def trust_path(cluster: ClusterFile, file: Path, me: NodeId, key: str) -> Path:
    """Return the path that `trust.<key>` names for the node `me`."""
    named: str | None = getattr(cluster.trust, key)
    assert named is not None, "checked by parse_cluster"
    return named_path(file, me, named)


def named_path(file: Path, me: NodeId, named: str) -> Path:
    """Return the path that a cluster file at `file` calls `named` for the node `me`."""
    return file.parent / named.replace("{id}", me)


def secret_problems(cluster: ClusterFile, file: Path, me: NodeId) -> Iterator[str]:
    """Yield which files of [trust] can't be read, or are readable by others than their owner.

    One line for each file: what is wrong first keeps what is in it from being looked at.
    """
    secrets = {f"trust.{key}" for key in _SECRETS[cluster.trust.mode]} | _DIRECTORY_SECRETS
    for key, path in _named_files(cluster, file, me):
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError as error:
            yield f"{key} = {str(path)!r}: can't be read: {error.strerror}{_by_whom(error)}"
            continue
        try:
            mode = os.fstat(descriptor).st_mode
        finally:
            os.close(descriptor)
        if not stat.S_ISREG(mode):
            yield f"{key} = {str(path)!r}: is no file"
        elif key in secrets and mode & 0o077:
            yield (
                f"{key} = {str(path)!r}: others can read or write it "
                f"(mode {stat.S_IMODE(mode):04o}); run 'chmod 600 {path}', and make a new one if "
                "somebody may have read it"
            )


def _by_whom(error: OSError) -> str:
    """Return who asked for a file that is closed to them."""
    if not isinstance(error, PermissionError):
        return ""
    return f" (asked as user {os.geteuid()}); the user that the node runs as must own it"


def _named_files(cluster: ClusterFile, file: Path, me: NodeId) -> Iterator[tuple[str, Path]]:
    for key in NEEDED_FILES[cluster.trust.mode]:
        yield f"trust.{key}", trust_path(cluster, file, me, key)
    for key in _DIRECTORY_FILES:
        if (named := getattr(cluster.directory, key)) is not None:
            yield f"directory.{key}", named_path(file, me, named)
