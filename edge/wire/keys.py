"""`gkp edge keys`: a private certificate authority for one cluster, and certificates for its coordinator and devices.

Elliptic-curve keys (P-256), X.509 version 3. The authority's key stays where it was made, mode 0600; every role gets a
folder of its own with ca.pem, cert.pem and key.pem. Certificates name the plans that they are valid for
(gkp.edge.wire.identity).
"""

from __future__ import annotations

import datetime
import ipaddress
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from gkp.edge.plan.schema import Plan
from gkp.edge.wire import identity
from gkp.edge.wire.identity import Identity
from gkp.errors import FileError, UnsafeFileError, UsageError
from gkp.require import require

if TYPE_CHECKING:
    from cryptography import x509
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey

CA_KEY = "ca.key"
COORDINATOR_FOLDER = "coordinator"
_CA_DAYS = 3650
_CLOCKS_DIFFER = datetime.timedelta(hours=1)


@dataclass(frozen=True)
class Authority:
    """The cluster's certificate and private key."""

    certificate: x509.Certificate
    key: EllipticCurvePrivateKey


def make_keys(plans: Sequence[Plan], folder: Path, days: int = 365) -> list[Path]:
    """Certificates for the coordinator and every device of the plans, in folder/coordinator and folder/<device name>.
    The authority in `folder` is used when there is one, and made when there is none; certificates of before are replaced.
    Returns the folders written. UsageError for device names that clash, FileError when something cannot be read or
    written, UnsafeFileError when others can read the authority's key."""
    require("cryptography", "edge", "making certificates", note="(on this machine only: devices do not need it)")
    addresses = _devices(plans)
    hashes = frozenset(plan.hash for plan in plans)
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        authority = _open_authority(folder) if (folder / CA_KEY).exists() else _make_authority(folder)
        written = [_write_role(folder / COORDINATOR_FOLDER, authority, Identity(None, hashes), [], days)]
        written += [_write_role(folder / name, authority, Identity(name, hashes), hosts, days)
                    for name, hosts in addresses.items()]
    except OSError as e:
        raise FileError(f"cannot write keys into {folder}: {e.strerror}", "choose another folder") from e
    return written


def _devices(plans: Sequence[Plan]) -> Mapping[str, list[str]]:
    """Device name -> hosts of its addresses, in all plans. A name without address is reached on this machine."""
    hosts: dict[str, list[str]] = {}
    for plan in plans:
        for device in plan.devices:
            name = identity.check_name(device.name)
            if name.lower() in (COORDINATOR_FOLDER, CA_KEY, identity.CA):
                raise UsageError(f"a device cannot be called {name}", "rename it in devices.yaml and split again")
            host = _host(device.address)
            hosts.setdefault(name, [])
            if host not in hosts[name]:
                hosts[name].append(host)
        names = [d.name.lower() for d in plan.devices]
        if len(set(names)) != len(names):
            raise UsageError("two devices of the plan have the same name", "rename one in devices.yaml and split again")
    if len({name.lower() for name in hosts}) != len(hosts):
        raise UsageError("two devices' names differ only in case", "rename one in devices.yaml and split again")
    return hosts


def _host(address: str | None) -> str:
    if address is None or address.startswith("unix:"):
        return "localhost"
    return identity.check_address(address).rpartition(":")[0].strip("[]")


# ---- the authority --------------------------------------------------------------------------------------------------
def _make_authority(folder: Path) -> Authority:
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import NameOID

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "gkp edge cluster")])
    usage = x509.KeyUsage(digital_signature=False, content_commitment=False, key_encipherment=False,
                          data_encipherment=False, key_agreement=False, key_cert_sign=True, crl_sign=True,
                          encipher_only=False, decipher_only=False)
    certificate = (_builder(name, name, key, _CA_DAYS)
                   .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
                   .add_extension(usage, critical=True)
                   .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
                   .sign(key, hashes.SHA256()))
    _write(folder / identity.CA, _pem(certificate))
    _write(folder / CA_KEY, _key_pem(key), private=True)  # last: with it the authority exists
    return Authority(certificate, key)


def _open_authority(folder: Path) -> Authority:
    from cryptography import x509
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    about = (folder / CA_KEY).stat()
    if about.st_uid not in (0, os.geteuid()) or about.st_mode & 0o077:
        raise UnsafeFileError(f"{folder / CA_KEY} can be read or written by others: its certificates mean nothing",
                              "make a new authority in another folder")
    try:
        certificate = x509.load_pem_x509_certificate((folder / identity.CA).read_bytes())
        key = load_pem_private_key((folder / CA_KEY).read_bytes(), None)
    except (ValueError, TypeError) as e:
        raise FileError(f"{folder} holds no authority of gkp: {e}", "choose another folder") from e
    if not isinstance(key, ec.EllipticCurvePrivateKey) or key.public_key() != certificate.public_key():
        raise FileError(f"{folder / identity.CA} and {CA_KEY} do not belong together", "choose another folder")
    if certificate.not_valid_after_utc < datetime.datetime.now(datetime.timezone.utc):
        raise FileError(f"the authority in {folder} has expired", "make a new one in another folder")
    return Authority(certificate, key)


# ---- certificates ---------------------------------------------------------------------------------------------------
def issue(authority: Authority, who: Identity, hosts: Sequence[str], days: float) -> tuple[bytes, bytes]:
    """(certificate, private key) as PEM. hosts: names and addresses besides the worker's own name, for clients that check
    those; days: valid from now (an hour earlier, for clocks that are late)."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"gkp {who.worker or 'coordinator'}"[:64])])
    names: list[x509.GeneralName] = [x509.UniformResourceIdentifier(uri) for uri in identity.uris(who)]
    roles = [ExtendedKeyUsageOID.CLIENT_AUTH]
    if who.worker is not None:
        names += [x509.DNSName(identity.server_name(who.worker)), *map(_general_name, hosts)]
        if "localhost" in hosts:
            names += [_general_name("127.0.0.1"), _general_name("::1")]
        roles.append(ExtendedKeyUsageOID.SERVER_AUTH)
    usage = x509.KeyUsage(digital_signature=True, content_commitment=False, key_encipherment=False,
                          data_encipherment=False, key_agreement=False, key_cert_sign=False, crl_sign=False,
                          encipher_only=False, decipher_only=False)
    certificate = (_builder(subject, authority.certificate.subject, key, days)
                   .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
                   .add_extension(usage, critical=True)
                   .add_extension(x509.ExtendedKeyUsage(roles), critical=True)
                   .add_extension(x509.SubjectAlternativeName(names), critical=False)
                   .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(authority.key.public_key()),
                                  critical=False)
                   .sign(authority.key, hashes.SHA256()))
    return _pem(certificate), _key_pem(key)


def _builder(subject: x509.Name, issuer: x509.Name, key: EllipticCurvePrivateKey, days: float) -> x509.CertificateBuilder:
    from cryptography import x509

    now = datetime.datetime.now(datetime.timezone.utc)
    start = min(now - _CLOCKS_DIFFER, now + datetime.timedelta(days=days) - _CLOCKS_DIFFER)
    return (x509.CertificateBuilder().subject_name(subject).issuer_name(issuer).public_key(key.public_key())
            .serial_number(x509.random_serial_number()).not_valid_before(start)
            .not_valid_after(now + datetime.timedelta(days=days)))


def _general_name(host: str) -> x509.GeneralName:
    from cryptography import x509

    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host.lower())


def _pem(certificate: x509.Certificate) -> bytes:
    from cryptography.hazmat.primitives.serialization import Encoding

    return certificate.public_bytes(Encoding.PEM)


def _key_pem(key: EllipticCurvePrivateKey) -> bytes:
    from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


# ---- files ----------------------------------------------------------------------------------------------------------
def _write_role(folder: Path, authority: Authority, who: Identity, hosts: Sequence[str], days: float) -> Path:
    """All three files appear at once: a certificate never stands beside another one's key."""
    certificate, key = issue(authority, who, hosts, days)
    temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))  # mode 0700
    old = temporary.with_name(temporary.name + ".old")
    try:
        _write(temporary / identity.CA, _pem(authority.certificate))
        _write(temporary / identity.CERTIFICATE, certificate)
        _write(temporary / identity.KEY, key, private=True)
        if folder.exists():
            if not (folder / identity.CERTIFICATE).is_file():
                raise FileError(f"{folder} exists and holds no certificate", "choose another folder for the keys")
            folder.rename(old)
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)
    return folder


def _write(path: Path, data: bytes, private: bool = False) -> None:
    """A private file is never readable by others, not even for a moment."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")  # mode 0600
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        if not private:
            os.chmod(name, 0o644)
        os.replace(name, path)
    finally:
        Path(name).unlink(missing_ok=True)
