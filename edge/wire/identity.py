"""Who a worker or coordinator is, and who its peer is: certificates of the cluster's own authority.

A certificate carries its role as a URI, "gkp://coordinator" or "gkp://worker/<device name>", and one URI "gkp://plan/<hash>"
for every plan that it is valid for. That is how a plan is signed: the authority put its hash into every certificate, and a
message about another plan is refused. TLS (OpenSSL; BoringSSL at the front door) checks chain, dates, key usage and a
worker's name on every connection; the own certificate is checked by a handshake with itself, so that Python's ssl is enough
on a device.
"""

from __future__ import annotations

import ipaddress
import os
import ssl
import stat
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gkp.edge.plan.devices import ADDRESS, NAME
from gkp.errors import FileError, UnsafeFileError, UsageError
from gkp.require import require

CA, CERTIFICATE, KEY = "ca.pem", "cert.pem", "key.pem"
COORDINATOR_URI = "gkp://coordinator"
_WORKER, _PLAN = "gkp://worker/", "gkp://plan/"
_MAX_PEM = 1 << 20


@dataclass(frozen=True)
class Identity:
    """What a certificate says. worker: the device's name, None for the coordinator; plans: hashes."""

    worker: str | None
    plans: frozenset[str]


@dataclass(frozen=True)
class Keys:
    """What a folder that `gkp edge keys` wrote holds, as PEM. The private key is not shown when this is printed."""

    identity: Identity
    ca: bytes
    certificate: bytes
    key: bytes

    def __repr__(self) -> str:
        return f"Keys({self.identity})"


def require_grpc() -> None:
    """BackendMissingError when gRPC or protobuf is not installed. Called before anything that imports them."""
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # a refused handshake is an answer, not lines of a log
    for module in ("google.protobuf", "grpc"):
        require(module, "edge", "a split model on several devices")


def check_name(name: str) -> str:
    """A device's name, which becomes a folder and part of a certificate. UsageError when it cannot."""
    if not NAME.fullmatch(name):
        raise UsageError(f"device name {name[:64]!r} cannot stand in a certificate",
                         "letters, digits, dots, dashes and underscores, 63 at most")
    return name


def server_name(device: str) -> str:
    """The DNS name on a worker's certificate, which its clients insist on whatever its address is."""
    return f"{device.lower()}.worker.gkp"


def uris(identity: Identity) -> list[str]:
    """What a certificate says in its subject alternative names."""
    role = COORDINATOR_URI if identity.worker is None else _WORKER + check_name(identity.worker)
    return [role, *(_PLAN + plan for plan in sorted(identity.plans))]


def identity_of(names: Iterable[str]) -> Identity | None:
    """Who a verified certificate's alternative names say that it is; None when they give no role, or more than one."""
    found = list(names)
    roles = [n for n in found if n == COORDINATOR_URI or n.startswith(_WORKER)]
    if len(roles) != 1:
        return None
    plans = frozenset(n.removeprefix(_PLAN) for n in found if n.startswith(_PLAN))
    return Identity(None if roles[0] == COORDINATOR_URI else roles[0].removeprefix(_WORKER), plans)


def peer_identity(auth_context: Mapping[str, Iterable[bytes]]) -> Identity | None:
    """Who the other end of a gRPC call is; None for a connection without certificate, or without a role on it."""
    return identity_of(n.decode("utf-8", "replace") for n in auth_context.get("x509_subject_alternative_name", ()))


# ---- the own keys ---------------------------------------------------------------------------------------------------
def read_keys(folder: Path) -> Keys:
    """The keys of a worker or the coordinator. FileError when a file is missing, the certificate is not of this authority or
    expired; UnsafeFileError when others can read the private key."""
    ca, certificate, key = (_read(folder / name, private=name == KEY) for name in (CA, CERTIFICATE, KEY))
    identity = identity_of(_own_names(folder))
    if identity is None:
        raise FileError(f"{folder / CERTIFICATE} names no role", "make keys with gkp edge keys")
    return Keys(identity, ca, certificate, key)


def _read(path: Path, private: bool) -> bytes:
    try:
        with path.open("rb") as file:
            about = os.fstat(file.fileno())
            data = file.read(_MAX_PEM + 1)
    except FileNotFoundError:
        raise FileError(f"{path} is missing", "give the folder of this device that gkp edge keys wrote") from None
    except OSError as e:
        raise FileError(f"{path} cannot be read: {e.strerror}", "check who may read it") from e
    if private and (about.st_uid not in (0, os.geteuid()) or about.st_mode & (stat.S_IRWXG | stat.S_IRWXO)):
        raise UnsafeFileError(f"{path} is a private key that others can read or write", "chmod 600 it, or make new keys")
    if len(data) > _MAX_PEM:
        raise FileError(f"{path} is no PEM file", "make keys with gkp edge keys")
    return data


def _own_names(folder: Path) -> list[str]:
    """The alternative names of the folder's certificate, verified by a handshake in memory: it is the client's and the
    server's, and the server checks it (every role may be a client)."""
    try:
        client, server = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT), ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        client.check_hostname, client.verify_mode, server.verify_mode = False, ssl.CERT_NONE, ssl.CERT_REQUIRED
        server.load_verify_locations(folder / CA)
        for context in (client, server):
            context.load_cert_chain(folder / CERTIFICATE, folder / KEY)
        found = _handshake(client, server)
    except (OSError, ValueError) as e:  # ssl.SSLError is an OSError
        reason = getattr(e, "verify_message", None) or getattr(e, "reason", None) or "unreadable"
        raise FileError(f"the keys in {folder} are not valid: {str(reason).lower().replace('_', ' ')}",
                        "make new ones with gkp edge keys, from the same authority as the other devices'") from e
    return [text for kind, text in found.get("subjectAltName", ()) if kind == "URI"]


def _handshake(client: ssl.SSLContext, server: ssl.SSLContext) -> Mapping[str, Any]:
    """The client's certificate as the server verified it."""
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    ends = (client.wrap_bio(to_client, to_server), server.wrap_bio(to_server, to_client, server_side=True))
    open_ends = list(ends)
    for _ in range(16):  # TLS 1.3 takes 3
        for end in list(open_ends):
            try:
                end.do_handshake()
                open_ends.remove(end)
            except ssl.SSLWantReadError:
                pass
    if open_ends:
        raise ValueError("the handshake did not end")
    return ends[1].getpeercert() or {}


# ---- addresses ------------------------------------------------------------------------------------------------------
def check_address(address: str) -> str:
    """HOST:PORT, [IPV6]:PORT or unix:PATH. UsageError for anything else."""
    match = ADDRESS.fullmatch(address)
    if not (address.startswith("unix:") and len(address) > 5) and (match is None or int(match["port"]) > 65535):
        raise UsageError(f"{address[:80]!r} is no address", "HOST:PORT, [IPV6]:PORT or unix:PATH")
    return address


def is_local(address: str) -> bool:
    """Does nobody outside this machine reach it? unix:PATH, localhost and loopback addresses."""
    if address.startswith("unix:"):
        return True
    match = ADDRESS.fullmatch(address)
    host = (match["six"] or match["host"]) if match else ""
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
