"""How nodes know each other on the wire: a shared key that signs, or TLS with certificates on both sides.

Under a key each request is a sealed message (`auth`), and its answer's frames are tagged with a secret
that follows from the key and that very request. Under TLS the connection says who the peer is: by the
name `urn:sllm-node:ID` in its certificate.
"""

import hmac
import ssl
from collections.abc import Callable, Iterable
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
_URN: Final = "urn:sllm-node:"


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

    def _secret(self, body: bytes) -> bytes:
        return hmac.digest(self._key, b"answer to " + body[-MAC_BYTES:], "sha256")


class TlsTrust:
    """Certificates of the cluster's own authority."""

    def __init__(
        self, client: ssl.SSLContext, server: ssl.SSLContext, me: NodeId, peers: Iterable[NodeId]
    ) -> None:
        self.client_tls: ssl.SSLContext | None = client
        self.server_tls: ssl.SSLContext | None = server
        self._me = me
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


def open_trust(cluster: ClusterFile, file: Path, me: NodeId, boot: Callable[[], int]) -> Trust:
    """Read the files of [trust].

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
    try:
        client = ssl.create_default_context(ssl.Purpose.SERVER_AUTH, cafile=ca)
        server = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=ca)
        for context in (client, server):
            context.minimum_version = ssl.TLSVersion.TLSv1_3
            context.load_cert_chain(certificate, key_file)
    except (OSError, ssl.SSLError) as error:
        problem = f"trust: {error}; 'sllm-node cluster check' says more"
        raise ConfigError(str(file), (problem,)) from error
    server.verify_mode = ssl.CERT_REQUIRED
    return TlsTrust(client, server, me, peers)


def _named(certificate: Any) -> str:
    """Return which node a certificate, as `getpeercert` gives it, is for; empty: none."""
    for kind, name in (certificate or {}).get("subjectAltName", ()):
        if kind == "URI" and name.startswith(_URN):
            return str(name.removeprefix(_URN))
    return ""
