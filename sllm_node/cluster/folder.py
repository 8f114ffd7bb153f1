"""The folder in which an operator makes a cluster: its file, its secrets, and a check of all of it."""

import json
import os
import secrets
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from pathlib import Path
from typing import Final, Literal

from sllm_node.cluster.auth import KEY_BYTES, parse_key
from sllm_node.cluster.certificates import (
    Findings,
    Holder,
    Issued,
    check_authority,
    check_node,
    issue,
    make_authority,
)
from sllm_node.cluster.file import ClusterFile, parse_cluster
from sllm_node.cluster.named_files import (
    credential_lines,
    load_cluster,
    secret_problems,
    trust_path,
)
from sllm_node.core.config import read_text
from sllm_node.core.errors import ClusterFolderError, ClusterKeyError, ConfigError
from sllm_node.core.types import NodeId

FILE: Final = "cluster.toml"
Trust = Literal["key", "tls"]
_BEGIN: Final = """# The cluster: the same file on all nodes. `sllm-node cluster check` says what is wrong with it.

[trust]
"""
_TRUST: Final[dict[Trust, str]] = {
    "key": 'mode = "key"\nkey_file = "cluster.key"  # all nodes share it; it signs, and hides nothing\n',
    "tls": 'mode = "tls"\nca_file = "ca.crt"\n'
    'certificate_file = "nodes/{id}.crt"  # {id}: the id of the node that reads this\n'
    'private_key_file = "nodes/{id}.key"\n',
}


def init(folder: Path, trust: Trust, now: datetime) -> tuple[Path, ...]:
    """Make a cluster without nodes in `folder`; return the files written.

    Raises:
        ClusterFolderError: there is one already, or the folder can't be written.
    """
    if (folder / FILE).exists():
        raise ClusterFolderError(str(folder / FILE), "is there already; 'join' adds nodes to it")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if trust == "key":
            written = [_write_secret(folder / "cluster.key", _new_key())]
        else:
            authority = make_authority("sllm-node cluster", now)
            written = [_write_secret(folder / "ca.key", authority.key)]
            written.append(_replace(folder / "ca.crt", authority.certificate))
        written.append(_replace(folder / FILE, (_BEGIN + _TRUST[trust]).encode()))
    except OSError as error:
        raise _failed(folder, error) from error
    return tuple(written)


def join(folder: Path, node: NodeId, address: str, now: datetime) -> tuple[Path, ...]:
    """Add a node to the cluster in `folder`; return the files that the node needs.

    Raises:
        ConfigError: the cluster file would be wrong with it; nothing is written.
        ClusterFolderError: the authority can't be read, or the folder not written.
    """
    file = folder / FILE
    entry = f"\n[[nodes]]\nid = {json.dumps(node)}\naddress = {json.dumps(address)}\n"
    try:
        text = file.read_text(encoding="utf-8") + entry
    except (OSError, UnicodeDecodeError) as error:
        raise ClusterFolderError(str(file), f"can't be read: {error}; 'init' makes one") from error
    cluster = parse_cluster(text, str(file), node)
    needed = _issue_to(cluster, file, node, now)
    try:
        _replace(file, text.encode())
    except OSError as error:
        raise _failed(folder, error) from error
    return (file, *needed)


def renew(folder: Path, node: NodeId, now: datetime) -> tuple[Path, ...]:
    """Issue a new certificate to a node of the cluster; return the files that the node needs.

    Raises:
        ConfigError: the cluster file is wrong, or does not have the node.
        ClusterFolderError: it has no certificates, or they can't be issued.
    """
    file = folder / FILE
    cluster = load_cluster(file)
    if node not in {entry.id for entry in cluster.nodes}:
        raise ConfigError(str(file), (f"nodes: {node!r} is missing; 'join' adds it",))
    if cluster.trust.mode != "tls":
        raise ClusterFolderError(str(file), 'has no certificates: trust.mode is "key"')
    return (file, *_issue_to(cluster, file, node, now))


def handed_over(folder: Path, node: NodeId) -> tuple[str, ...]:
    """Return the lines with which the unit of a node of the cluster hands it its secrets.

    Raises:
        ConfigError: the cluster file is wrong.
    """
    return credential_lines(load_cluster(folder / FILE), folder / FILE, node)


def check(file: Path, me: NodeId | None, now: datetime) -> Findings:
    """Check the file and, for node `me` or for all nodes, keys, certificates, dates and chains.

    Raises:
        ConfigError: the file itself is wrong, or does not have `me`.
    """
    cluster = read(file)
    ids = [NodeId(entry.id) for entry in cluster.nodes]
    if me is not None and me not in ids:
        raise ConfigError(str(file), (f"nodes: {me!r} is missing; known: {', '.join(ids)}",))
    wanted = ids if me is None else [me]
    if cluster.trust.mode == "key":
        found = _check_shared_key(cluster, file, (*wanted, NodeId(""))[0])
    else:
        found = _check_tls(cluster, file, wanted, now, is_all=me is None)
    remarks, well = list(found.remarks), list(found.well)
    if ids:
        well.insert(0, f"{file}: {len(ids)} node{'s' * (len(ids) != 1)}: {', '.join(ids)}")
    elif not cluster.has_directory:
        adding = f"'sllm-node cluster join {file.parent} ID HOST:PORT' adds one"
        remarks.append(f"{file}: no node has joined yet; {adding}")
    return Findings(found.problems, tuple(remarks), tuple(well))


def _check_shared_key(cluster: ClusterFile, file: Path, node: NodeId) -> Findings:
    """Look at the key where `node` has it: the same for all, though each may have a file of its own."""
    if problems := tuple(_check_key(cluster, file, node)):
        return Findings(problems)
    return Findings((), (), (f"{trust_path(cluster, file, node, 'key_file')}: a good key",))


def _check_tls(
    cluster: ClusterFile, file: Path, nodes: list[NodeId], now: datetime, *, is_all: bool
) -> Findings:
    nodes, elsewhere = _here(cluster, file, nodes) if is_all else (nodes, [])
    problems: list[str] = []
    remarks: list[str] = []
    well: list[str] = []
    if elsewhere:
        remarks.append(f"{file}: certificates of {', '.join(elsewhere)} are not here to be checked")
    for node in nodes:
        problems += secret_problems(cluster, file, node)
    for place, found in _check_certificates(cluster, file, nodes, now):
        problems += [f"{place}: {problem}" for problem in found.problems]
        remarks += [f"{place}: {remark}" for remark in found.remarks]
        well += [f"{place}: {one}" for one in found.well]
    problems += _check_authority_key(file)
    return Findings(tuple(dict.fromkeys(problems)), tuple(remarks), tuple(well))


def read(file: Path) -> ClusterFile:
    """Read a cluster file that nobody need have joined yet.

    Raises:
        ConfigError: it is wrong.
    """
    return parse_cluster(read_text(file), str(file), may_be_new=True)


def silent(cluster: ClusterFile, limit_s: float) -> dict[NodeId, str]:
    """Return the nodes at whose address nobody listens now, and what came of trying."""

    def call(address: str) -> str:
        host, _, port = address.rpartition(":")
        try:
            socket.create_connection((host.strip("[]"), int(port)), limit_s).close()
        except OSError as error:
            return (
                "no answer"
                if isinstance(error, TimeoutError)
                else (error.strerror or str(error)).lower()
            )
        return ""

    with ThreadPoolExecutor(max(1, len(cluster.nodes)), "sllm-call") as threads:
        found = threads.map(call, [entry.address for entry in cluster.nodes])
        told = zip((NodeId(entry.id) for entry in cluster.nodes), found, strict=True)
        return {node: problem for node, problem in told if problem}


def _here(
    cluster: ClusterFile, file: Path, nodes: list[NodeId]
) -> tuple[list[NodeId], list[NodeId]]:
    """Return the nodes to look at, and those of which nothing is here: on a node, as it should be."""
    if (file.parent / "ca.key").exists():
        return nodes, []  # the operator's folder has all of them
    names = ("certificate_file", "private_key_file")
    elsewhere = [
        node for node in nodes
        if not any(trust_path(cluster, file, node, name).exists() for name in names)
    ]  # fmt: skip
    if len(elsewhere) == len(nodes):
        return nodes, []
    return [node for node in nodes if node not in elsewhere], elsewhere


def _issue_to(cluster: ClusterFile, file: Path, node: NodeId, now: datetime) -> tuple[Path, ...]:
    if cluster.trust.mode == "key":
        return (trust_path(cluster, file, node, "key_file"),)
    ca, certificate, key = (
        trust_path(cluster, file, node, name)
        for name in ("ca_file", "certificate_file", "private_key_file")
    )
    try:
        authority = Issued(ca.read_bytes(), (file.parent / "ca.key").read_bytes())
        issued = issue(authority, _holder(cluster, node), now)
        for path in (certificate, key):
            path.parent.mkdir(parents=True, exist_ok=True)
        key.unlink(missing_ok=True)
        _write_secret(key, issued.key)
        _replace(certificate, issued.certificate)
    except OSError as error:
        raise _failed(file.parent, error) from error
    except (ValueError, TypeError) as error:
        problem = f"ca.crt and ca.key can't issue a certificate: {error}"
        raise ClusterFolderError(str(file.parent), problem) from error
    return (ca, certificate, key)


def _check_authority_key(file: Path) -> Iterator[str]:
    """Look at the authority's key where it is: on the operator's machine, and on no node."""
    path = file.parent / "ca.key"
    if path.exists() and path.stat().st_mode & 0o077:
        yield f"{path}: others can read or write it; make a new cluster if somebody may have"


def _check_key(cluster: ClusterFile, file: Path, node: NodeId) -> Iterator[str]:
    """Look at the shared key; what is in it only if it may be read, and by nobody else."""
    if problems := list(secret_problems(cluster, file, node)):
        yield from problems
        return
    path = trust_path(cluster, file, node, "key_file")
    try:
        parse_key(path.read_text(encoding="ascii", errors="replace"), f"trust.key_file = {path}")
    except ClusterKeyError as error:
        yield str(error)


def _check_certificates(
    cluster: ClusterFile, file: Path, nodes: list[NodeId], now: datetime
) -> Iterator[tuple[str, Findings]]:
    ca_path = trust_path(cluster, file, (*nodes, NodeId(""))[0], "ca_file")
    ca = _read(ca_path)
    if ca is None:
        return  # told by secret_problems
    authority = check_authority(ca, now)
    yield str(ca_path), authority
    if authority.problems:
        return
    for node in nodes:
        path = trust_path(cluster, file, node, "certificate_file")
        certificate = _read(path)
        key = _read(trust_path(cluster, file, node, "private_key_file"))
        is_closed = any(secret_problems(cluster, file, node))
        if certificate is not None and key is not None and not is_closed:
            holder = _holder(cluster, node)
            yield str(path), check_node(ca, Issued(certificate, key), holder, now)


def _holder(cluster: ClusterFile, node: NodeId) -> Holder:
    host = cluster.address(node).rpartition(":")[0]
    return Holder(node, host.strip("[]"))


def _new_key() -> bytes:
    return secrets.token_hex(KEY_BYTES).encode() + b"\n"


def _read(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except OSError:
        return None


def _write_secret(path: Path, content: bytes) -> Path:
    """Write a new file that only its owner can read; never over another."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(content)
    return path


def _replace(path: Path, content: bytes) -> Path:
    """Write the file whole or not at all."""
    temporary = path.with_name(f".{path.name}.new")
    temporary.write_bytes(content)
    temporary.replace(path)
    return path


def _failed(folder: Path, error: OSError) -> ClusterFolderError:
    return ClusterFolderError(str(error.filename or folder), f"{error.strerror}")
