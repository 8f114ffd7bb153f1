"""The cluster's own certificate authority: makes it, issues certificates of nodes, checks them.

A node's certificate names it twice: by the host that peers call (so that TLS checks it as it does a
web server's), and by `urn:sllm-node:ID`, which a peer reads to know who calls.
"""

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime, timedelta
from ipaddress import ip_address
from typing import Final

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from sllm_node.core.types import NodeId

CA_DAYS: Final = 3650
NODE_DAYS: Final = 825
SOON_DAYS: Final = 30
"""A certificate that ends within these is remarked on."""
_BACKDATED: Final = timedelta(hours=1)
"""The clocks of the nodes may be so far behind the one that issues."""


_PURPOSES: Final = {
    ExtendedKeyUsageOID.SERVER_AUTH: "be called (serverAuth)",
    ExtendedKeyUsageOID.CLIENT_AUTH: "call (clientAuth)",
}
"""What a node does with its certificate."""


@dataclass(frozen=True, slots=True)
class Issued:
    """A certificate and its private key, both PEM."""

    certificate: bytes
    key: bytes


@dataclass(frozen=True, slots=True)
class Holder:
    """Whose certificate it is: the node, and the host that peers call it by."""

    node: NodeId
    host: str


@dataclass(frozen=True, slots=True)
class Findings:
    """What a check found: problems keep the node from its peers, remarks will one day."""

    problems: tuple[str, ...]
    remarks: tuple[str, ...] = ()
    well: tuple[str, ...] = ()
    """What was looked at and is in order."""


def make_authority(name: str, now: datetime, days: int = CA_DAYS) -> Issued:
    """Return a new authority, which can issue certificates of nodes and nothing else."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    builder = (
        _builder(subject, subject, key.public_key(), now, days)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(is_authority=True), critical=True)
    )
    return Issued(builder.sign(key, SHA256()).public_bytes(Encoding.PEM), _key_pem(key))


def issue(authority: Issued, holder: Holder, now: datetime, days: int = NODE_DAYS) -> Issued:
    """Return a new key and its certificate for `holder`; it never outlives the authority.

    Raises:
        ValueError: the authority's files are no certificate and key.
    """
    ca = x509.load_pem_x509_certificate(authority.certificate)
    ca_key = load_pem_private_key(authority.key, None)
    if not isinstance(ca_key, ec.EllipticCurvePrivateKey):
        raise ValueError("the authority's key is of another kind than init makes")  # noqa: TRY004 - content, not a type
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, holder.node)])
    days = min(days, (ca.not_valid_after_utc - now).days)
    builder = (
        _builder(subject, ca.subject, key.public_key(), now, days)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(is_authority=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage(_PURPOSES), critical=False)
        .add_extension(x509.SubjectAlternativeName(_names(holder)), critical=False)
        .add_extension(_issuer(ca), critical=False)
    )
    return Issued(builder.sign(ca_key, SHA256()).public_bytes(Encoding.PEM), _key_pem(key))


def check_authority(pem: bytes, now: datetime) -> Findings:
    """Say what is wrong with the authority's certificate."""
    try:
        ca = x509.load_pem_x509_certificate(pem)
        constraints = ca.extensions.get_extension_for_class(x509.BasicConstraints).value
    except ValueError:
        return Findings(("is no certificate in PEM",))
    except x509.ExtensionNotFound:
        return Findings(("is the certificate of no authority",))
    if not constraints.ca:
        return Findings(("is the certificate of no authority",))
    return _check_dates(ca, now)


def check_node(ca_pem: bytes, issued: Issued, holder: Holder, now: datetime) -> Findings:
    """Say what is wrong with a node's certificate and key."""
    try:
        ca = x509.load_pem_x509_certificate(ca_pem)
        certificate = x509.load_pem_x509_certificate(issued.certificate)
    except ValueError:
        return Findings(("is no certificate in PEM",))
    dates = _check_dates(certificate, now)
    found = (
        *_chain_problems(ca, certificate),
        *_key_problems(certificate, issued.key),
        *_name_problems(certificate, holder),
        *_usage_problems(certificate),
    )
    return Findings((*dates.problems, *found), dates.remarks, () if found else dates.well)


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey, now: datetime, days: int
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _BACKDATED)
        .not_valid_after(now + timedelta(days=days))
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
    )


def _usage(*, is_authority: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not is_authority,
        key_cert_sign=is_authority,
        crl_sign=is_authority,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _issuer(ca: x509.Certificate) -> x509.AuthorityKeyIdentifier:
    identifier = ca.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
    return x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(identifier)


def _names(holder: Holder) -> list[x509.GeneralName]:
    own = x509.UniformResourceIdentifier(f"urn:sllm-node:{holder.node}")
    try:
        return [x509.IPAddress(ip_address(holder.host)), own]
    except ValueError:
        return [x509.DNSName(holder.host), own]


def _key_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def _check_dates(certificate: x509.Certificate, now: datetime) -> Findings:
    begins, ends = certificate.not_valid_before_utc, certificate.not_valid_after_utc
    if now < begins:
        return Findings((f"is not valid before {begins:%Y-%m-%d %H:%M} UTC; look at the clock",))
    if now > ends:
        return Findings((f"ended on {ends:%Y-%m-%d %H:%M} UTC",))
    if ends - now < timedelta(days=SOON_DAYS):
        return Findings((), (f"ends on {ends:%Y-%m-%d}, in {(ends - now).days} days",))
    return Findings((), (), (f"a certificate until {ends:%Y-%m-%d}",))


def _chain_problems(ca: x509.Certificate, certificate: x509.Certificate) -> Iterator[str]:
    try:
        certificate.verify_directly_issued_by(ca)
    except (ValueError, TypeError, InvalidSignature):
        yield "was not issued by trust.ca_file"


def _key_problems(certificate: x509.Certificate, key_pem: bytes) -> Iterator[str]:
    try:
        key = load_pem_private_key(key_pem, None)
    except (ValueError, TypeError):
        yield "trust.private_key_file is no private key in PEM without a password"
        return
    form = (Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    if key.public_key().public_bytes(*form) != certificate.public_key().public_bytes(*form):
        yield "trust.private_key_file is not the key of this certificate"


def _name_problems(certificate: x509.Certificate, holder: Holder) -> Iterator[str]:
    try:
        found = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        names = list(found)
    except x509.ExtensionNotFound:
        names = []
    host, own = _names(holder)
    if own not in names:
        yield f"is not the certificate of node {holder.node!r}"
    if host not in names:
        yield f"does not name the host {holder.host!r}, by which peers call the node"


def _usage_problems(certificate: x509.Certificate) -> Iterator[str]:
    """Yield what its key may not be used for; an extension that is left out forbids nothing."""
    with suppress(x509.ExtensionNotFound):
        allowed = certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
        for purpose, words in _PURPOSES.items():
            if purpose not in allowed:
                yield f"its extended key usage does not let the node {words}"
    with suppress(x509.ExtensionNotFound):
        usage = certificate.extensions.get_extension_for_class(x509.KeyUsage).value
        if not usage.digital_signature:
            yield "its key usage does not let the node sign (digitalSignature)"
