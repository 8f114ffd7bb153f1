"""How nodes know each other on the wire: a shared key that signs, or TLS with certificates on both sides.

Under a key each request is a sealed message (`auth`), and its answer's frames are tagged with a secret
that follows from the key and that very request. Under TLS the connection says who the peer is: by the
name `urn:sllm-node:ID` in its certificate.
"""

import hmac
import ssl
from collections.abc import Callable, Collection, Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Protocol

from sllm_node.cluster.auth import MAC_BYTES, Opener, Sealer, parse_key
from sllm_node.cluster.file import ClusterFile
from sllm_node.cluster.named_files import used_trust_path
from sllm_node.core.errors import ConfigError, MisdirectedError, StrangerError
from sllm_node.core.types import NodeId

REQUEST_LIMIT: Final = 8 << 20
"""Bytes of a request between nodes: a prompt of a million tokens."""
NOT_FOR_ADDRESS: Final = (62, 64)
"""What OpenSSL calls X509_V_ERR_HOSTNAME_MISMATCH and _IP_ADDRESS_MISMATCH."""
_URN: Final = "urn:sllm-node:"
_OWN: Final = frozenset({"trust.certificate_file", "trust.private_key_file"})
"""What is taken while the node runs: connections that are open keep theirs, the next one shows it."""


@dataclass(frozen=True, slots=True)
class Outgoing:
    """A request as it is sent."""

    body: bytes
    secret: bytes | None
    """Of its answer's frames."""


@dataclass(frozen=True, slots=True)
class Incoming:
    """A request that is believed."""

    sender: NodeId
    payload: bytes
    secret: bytes | None


class Trust(Protocol):
    """One way of it."""

    client_tls: ssl.SSLContext | None
    server_tls: ssl.SSLContext | None

    def send(self, payload: bytes, receiver: NodeId) -> Outgoing:
        """Make a request for `receiver`."""

    def receive(self, body: bytes, receiver: str, certificate: Any) -> Incoming:
        """Take a request, once; `receiver` as the peer named it.

        Raises:
            MessageError: it is not to be believed.
        """

    def set_peers(self, peers: Iterable[NodeId]) -> None:
        """Follow a changed cluster file."""

    def renew(self, changed: Collection[str]) -> frozenset[str]:
        """Take those of the files that changed, by their keys, that a running node can; return which.

        Raises:
            ConfigError: they can't be used; what was read before stays.
        """


class KeyTrust:
    """A key that all nodes share."""

    client_tls: ssl.SSLContext | None = None
    server_tls: ssl.SSLContext | None = None

    def __init__(
        self, key: bytes, me: NodeId, peers: Iterable[NodeId], window: int, boot: Callable[[], int]
    ) -> None:
        self._key = key
        self._me = me
        self._boot = boot
        self._sealers: dict[NodeId, Sealer] = {}
        """One for each peer, so that what goes to others takes nothing of its window."""
        self._opener = Opener(key, me, peers, REQUEST_LIMIT, window)

    def send(self, payload: bytes, receiver: NodeId) -> Outgoing:
        sealer = self._sealers.get(receiver)
        if sealer is None:
            sealer = self._sealers[receiver] = Sealer(self._key, self._me, REQUEST_LIMIT)
        body = sealer.seal(payload, receiver, self._boot())
        return Outgoing(body, self._secret(body))

    def receive(self, body: bytes, receiver: str, certificate: Any) -> Incoming:
        del receiver, certificate  # the sealed message says it
        sealed = self._opener.open(body)
        return Incoming(sealed.sender, sealed.payload, self._secret(body))

    def set_peers(self, peers: Iterable[NodeId]) -> None:
        self._opener.set_peers(peers)

    def renew(self, changed: Collection[str]) -> frozenset[str]:
        del changed  # messages under way are sealed with the key that is there
        return frozenset()

    def _secret(self, body: bytes) -> bytes:
        return hmac.digest(self._key, b"answer to " + body[-MAC_BYTES:], "sha256")


class TlsTrust:
    """Certificates of the cluster's own authority."""

    def __init__(
        self, ca: Path, own: tuple[Path, Path], me: NodeId, host: str, peers: Iterable[NodeId]
    ) -> None:
        """Read the authority's certificate, and the node's `own` with its key; `host`: by which peers call it.

        Raises:
            OSError: they can't be read, or do not fit together (ssl.SSLError).
        """
        self._contexts = _contexts(own, cafile=ca)
        self.client_tls: ssl.SSLContext | None = self._contexts[0]
        self.server_tls: ssl.SSLContext | None = self._contexts[1]
        self._own = own
        self._me = me
        self._host = host
        self._peers = frozenset(peers)

    def send(self, payload: bytes, receiver: NodeId) -> Outgoing:
        del receiver
        return Outgoing(payload, None)

    def receive(self, body: bytes, receiver: str, certificate: Any) -> Incoming:
        sender = NodeId(_named(certificate))
        if sender not in self._peers:
            raise StrangerError(sender)
        if receiver != self._me:
            raise MisdirectedError(sender, receiver, self._me)
        return Incoming(sender, body, None)

    def set_peers(self, peers: Iterable[NodeId]) -> None:
        self._peers = frozenset(peers)

    def renew(self, changed: Collection[str]) -> frozenset[str]:
        if not _OWN & set(changed):
            return frozenset()
        try:
            # Tried aside first: what does not fit together leaves a context without a key.
            authority = b"".join(self._contexts[0].get_ca_certs(binary_form=True))
            _try_own(authority, self._own, self._me, self._host)
            for context in self._contexts:
                context.load_cert_chain(*self._own)
        except OSError as error:
            raise ConfigError(str(self._own[0]), (_unusable(error),)) from error
        return _OWN


def open_trust(
    cluster: ClusterFile, file: Path, me: NodeId, address: str, boot: Callable[[], int]
) -> Trust:
    """Read the files of [trust]; `address`: where peers call this node.

    Raises:
        ClusterKeyError: the key is none.
        ConfigError: a certificate or its key can't be used.
    """
    peers = cluster.peers(me)
    if cluster.trust.mode == "key":
        path = used_trust_path(cluster, file, me, "key_file")
        key = parse_key(path.read_text(encoding="ascii", errors="replace"), str(path))
        return KeyTrust(key, me, peers, cluster.limits.replay_window_messages, boot)
    names = ("ca_file", "certificate_file", "private_key_file")
    ca, certificate, key_file = (used_trust_path(cluster, file, me, name) for name in names)
    host = address.rpartition(":")[0].strip("[]").rstrip(".")
    try:
        return TlsTrust(ca, (certificate, key_file), me, host, peers)
    except OSError as error:
        raise ConfigError(str(file), (_unusable(error),)) from error


def _contexts(
    own: tuple[Path, Path], cafile: Path | None = None, cadata: bytes | None = None
) -> tuple[ssl.SSLContext, ssl.SSLContext]:
    """Return how a node calls and how it listens."""
    client = ssl.create_default_context(ssl.Purpose.SERVER_AUTH, cafile=cafile, cadata=cadata)
    server = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=cafile, cadata=cadata)
    for context in (client, server):
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        context.load_cert_chain(*own)
    server.verify_mode = ssl.CERT_REQUIRED
    return client, server


def _try_own(authority: bytes, own: tuple[Path, Path], me: NodeId, host: str) -> None:
    """Call the node as a peer would that has this `authority`, and be called by it, in memory.

    Raises:
        OSError: a peer would not take it (ssl.SSLError), or a file can't be read.
        ConfigError: it would take it for another node, or for one at another address.
    """
    client, server = _contexts(own, cadata=authority)
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    calling = client.wrap_bio(to_client, to_server, server_hostname=host)
    called = server.wrap_bio(to_server, to_client, server_side=True)
    try:
        for side in (calling, called, calling, called):  # each side shows its own, and checks
            with suppress(ssl.SSLWantReadError):
                side.do_handshake()
    except ssl.SSLCertVerificationError as error:
        if error.verify_code not in NOT_FOR_ADDRESS:
            raise
        problem = (
            f"is not for {host!r}, by which peers call this node; if its address has changed, a "
            "restart takes both"
        )
        raise ConfigError(str(own[0]), (problem,)) from error
    if (name := _named(calling.getpeercert())) != me:
        raise ConfigError(str(own[0]), (f"is the certificate of {name!r}, not of {me!r}",))


def _unusable(error: OSError) -> str:
    return f"trust: {error}; 'sllm-node cluster check' says more"


def _named(certificate: Any) -> str:
    """Return which node a certificate, as `getpeercert` gives it, is for; empty: none."""
    for kind, name in (certificate or {}).get("subjectAltName", ()):
        if kind == "URI" and name.startswith(_URN):
            return str(name.removeprefix(_URN))
    return ""
