"""The cluster file on its disk and the files that it names: where they lie, and who can read them.

A node under systemd with `DynamicUser=` can't read files of root's. It gets copies (`LoadCredential=`),
each under the name of the key that it stands for, and these go before what the cluster file names.
They are the node's user's by an access control list, which a mode shows as a group that may read.
"""

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
_CREDENTIALS: Final = "CREDENTIALS_DIRECTORY"
"""The variable in which systemd names the folder of what it hands over."""
_PLACE: Final = Path("/etc/sllm-node")
"""Where the folder of a cluster lies on a node, as the README has it."""


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
    return _named_path(file, me, _named(cluster, key))


def used_trust_path(cluster: ClusterFile, file: Path, me: NodeId, key: str) -> Path:
    """Return where the node `me`, which is this process, reads what `trust.<key>` names."""
    return used_path(file, me, f"trust.{key}", _named(cluster, key))


def used_path(file: Path, me: NodeId, key: str, named: str) -> Path:
    """Return where the node `me` reads what the cluster file calls `named`: handed over, or beside it."""
    folder = os.environ.get(_CREDENTIALS, "")
    handed = Path(folder, key)
    if folder and os.access(handed, os.F_OK):
        return handed
    return _named_path(file, me, named)


def named_files(cluster: ClusterFile, file: Path, me: NodeId) -> Iterator[tuple[str, Path]]:
    """Yield each file that the cluster file names for the node `me`, with its key."""
    for key, named in _names(cluster):
        yield key, _named_path(file, me, named)


def used_files(cluster: ClusterFile, file: Path, me: NodeId) -> Iterator[tuple[str, Path]]:
    """Yield the same files where the node `me`, which is this process, reads them."""
    for key, named in _names(cluster):
        yield key, used_path(file, me, key, named)


def credential_lines(cluster: ClusterFile, file: Path, me: NodeId) -> tuple[str, ...]:
    """Return the lines of a unit that hand the files of [trust] to the node `me`."""
    found = []
    for key in NEEDED_FILES[cluster.trust.mode]:
        path = trust_path(cluster, file, me, key)
        if path.is_relative_to(file.parent):
            path = _PLACE / file.parent.absolute().name / path.relative_to(file.parent)
        found.append(f"LoadCredential=trust.{key}:{path}")
    return tuple(found)


def secret_problems(cluster: ClusterFile, file: Path, me: NodeId) -> Iterator[str]:
    """Yield which files of [trust] can't be read, or are readable by others than their owner.

    One line for each file: what is wrong first keeps what is in it from being looked at.
    """
    secrets = {f"trust.{key}" for key in _SECRETS[cluster.trust.mode]} | _DIRECTORY_SECRETS
    for key, path in used_files(cluster, file, me):
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
        elif key in secrets and mode & _closed_bits(path):
            yield (
                f"{key} = {str(path)!r}: others can read or write it "
                f"(mode {stat.S_IMODE(mode):04o}); run 'chmod 600 {path}', and make a new one if "
                "somebody may have read it"
            )


def _by_whom(error: OSError) -> str:
    """Return who asked for a file that is closed to them."""
    if not isinstance(error, PermissionError):
        return ""
    return (
        f" (asked as user {os.geteuid()}); the user that the node runs as must own it, or systemd hand "
        "it over (LoadCredential=, see the unit in systemd/)"
    )


def _closed_bits(path: Path) -> int:
    """Return which bits of the mode a secret must not have."""
    folder = os.environ.get(_CREDENTIALS, "")
    return 0o037 if folder and path.is_relative_to(folder) else 0o077


def _names(cluster: ClusterFile) -> Iterator[tuple[str, str]]:
    for key in NEEDED_FILES[cluster.trust.mode]:
        if (named := getattr(cluster.trust, key)) is not None:
            yield f"trust.{key}", named
    for key in _DIRECTORY_FILES:
        if (named := getattr(cluster.directory, key)) is not None:
            yield f"directory.{key}", named


def _named(cluster: ClusterFile, key: str) -> str:
    named: str | None = getattr(cluster.trust, key)
    assert named is not None, "checked by parse_cluster"
    return named


def _named_path(file: Path, me: NodeId, named: str) -> Path:
    return file.parent / named.replace("{id}", me)
