"""The cluster's authority and certificates: who may read what, what they say, and what is refused."""

from __future__ import annotations

import datetime
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import worker_kit as kit
from cli_kit import assert_refused, blocked, blocked_gkp, gkp, listing
from cryptography import x509
from cryptography.x509.oid import ExtendedKeyUsageOID, ExtensionOID

from gkp.edge.plan.schema import Device, Plan
from gkp.edge.wire import identity, keys
from gkp.edge.wire.identity import Identity, read_keys
from gkp.errors import FileError, GkpError, UnsafeFileError, UsageError


@pytest.fixture
def split(tmp_path: Path) -> Path:
    kit.write_split(tmp_path / "split")
    return tmp_path / "split"


def plan_of(directory: Path, *devices: Device) -> Plan:
    import msgspec

    from gkp.edge.plan.schema import read_plan

    return msgspec.structs.replace(read_plan(directory), devices=list(devices)) if devices else read_plan(directory)


def certificate(folder: Path) -> x509.Certificate:
    return x509.load_pem_x509_certificate((folder / identity.CERTIFICATE).read_bytes())


def names(folder: Path, kind: Any) -> list[str]:
    found = certificate(folder).extensions.get_extension_for_oid(ExtensionOID.SUBJECT_ALTERNATIVE_NAME).value
    assert isinstance(found, x509.SubjectAlternativeName)
    return [str(n) for n in found.get_values_for_type(kind)]


def usage(folder: Path) -> set[Any]:
    found = certificate(folder).extensions.get_extension_for_oid(ExtensionOID.EXTENDED_KEY_USAGE).value
    assert isinstance(found, x509.ExtendedKeyUsage)
    return set(found)


# ---- what is made ---------------------------------------------------------------------------------------------------
def test_the_command_makes_a_folder_per_role_and_private_keys_stay_private(split: Path, tmp_path: Path) -> None:
    out = tmp_path / "keys"
    before = listing(split)
    gkp("edge", "keys", split, "-o", out, expect=0)
    roles = ("coordinator", "left", "right")
    assert listing(out) == sorted(["ca.key", "ca.pem", *roles, *(f"{r}/{f}" for r in roles for f in ("ca.pem", "cert.pem", "key.pem"))])
    for private in [out / "ca.key", *(out / r / "key.pem" for r in roles)]:
        assert private.stat().st_mode & 0o777 == 0o600
    assert out.stat().st_mode & 0o077 == 0
    assert listing(split) == before  # nothing secret in a device's folder
    authority = (out / "ca.key").read_bytes()
    assert all(authority not in p.read_bytes() for p in out.rglob("*") if p.is_file() and p.name != "ca.key")


def test_certificates_say_role_device_and_plan(split: Path, tmp_path: Path) -> None:
    plan, out = plan_of(split), tmp_path / "keys"
    keys.make_keys([plan], out)
    assert read_keys(out / "coordinator").identity == Identity(None, frozenset({plan.hash}))
    assert read_keys(out / "left").identity == Identity("left", frozenset({plan.hash}))
    assert names(out / "left", x509.DNSName) == ["left.worker.gkp", "localhost"]
    assert names(out / "coordinator", x509.DNSName) == []
    assert usage(out / "coordinator") == {ExtendedKeyUsageOID.CLIENT_AUTH}
    assert usage(out / "left") == {ExtendedKeyUsageOID.CLIENT_AUTH, ExtendedKeyUsageOID.SERVER_AUTH}
    constraints = certificate(out / "left").extensions.get_extension_for_oid(ExtensionOID.BASIC_CONSTRAINTS).value
    assert isinstance(constraints, x509.BasicConstraints)
    assert not constraints.ca


def test_addresses_of_the_plan_are_on_the_certificates_for_clients_that_check_them(split: Path, tmp_path: Path) -> None:
    plan = plan_of(split, Device(name="left", address="192.0.2.20:7000"), Device(name="right", address="Kitchen.example:7000"))
    keys.make_keys([plan], tmp_path / "keys")
    assert names(tmp_path / "keys" / "left", x509.IPAddress) == ["192.0.2.20"]
    assert names(tmp_path / "keys" / "right", x509.DNSName) == ["right.worker.gkp", "kitchen.example"]


def test_the_authority_is_kept_and_certificates_are_new(split: Path, tmp_path: Path) -> None:
    out = tmp_path / "keys"
    keys.make_keys([plan_of(split)], out, days=10)
    before = {p: p.read_bytes() for p in out.rglob("*.*") if p.is_file()}
    keys.make_keys([plan_of(split)], out, days=20)
    changed = {p.name for p, data in before.items() if p.read_bytes() != data}
    assert changed == {"cert.pem", "key.pem"}
    left = certificate(out / "left").not_valid_after_utc - datetime.datetime.now(datetime.timezone.utc)
    assert 19 < left.total_seconds() / 86400 <= 20
    assert [p for p in out.iterdir() if p.name.startswith(".")] == []


def test_one_set_of_certificates_may_be_for_several_plans(split: Path, tmp_path: Path) -> None:
    other = kit.write_split(tmp_path / "other", names=("left", "middle"))
    keys.make_keys([plan_of(split), other], tmp_path / "keys")
    for role in ("coordinator", "left", "right", "middle"):
        assert read_keys(tmp_path / "keys" / role).identity.plans == {plan_of(split).hash, other.hash}


# ---- what is refused ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("devices", [("../left", "right"), ("a/b", "c"), ("", "b"), ("-x", "b"), ("x" * 64, "b"), ("a\n", "b"), ("é", "b"),
                                     ("coordinator", "b"), ("CA.key", "b"), ("same", "same"), ("same", "Same")])
def test_names_that_cannot_be_folders_or_clash_are_refused(split: Path, tmp_path: Path, devices: tuple[str, str]) -> None:
    plan = plan_of(split, *(Device(name=n) for n in devices))
    with pytest.raises(UsageError):
        keys.make_keys([plan], tmp_path / "keys")
    assert not (tmp_path / "keys").exists()


def test_an_authority_that_others_can_read_is_refused(split: Path, tmp_path: Path) -> None:
    out = tmp_path / "keys"
    keys.make_keys([plan_of(split)], out)
    (out / "ca.key").chmod(0o640)
    with pytest.raises(UnsafeFileError, match=r"ca\.key"):
        keys.make_keys([plan_of(split)], out)


@pytest.mark.parametrize("spoil", [
    lambda out: (out / "ca.pem").write_bytes(b"no"), lambda out: (out / "ca.key").write_bytes(b"no"),
    lambda out: (out / "ca.key").write_bytes((out / "left" / "key.pem").read_bytes()), lambda out: (out / "ca.pem").unlink()])
def test_a_spoilt_authority_is_refused(split: Path, tmp_path: Path, spoil: Callable[[Path], Any]) -> None:
    out = tmp_path / "keys"
    keys.make_keys([plan_of(split)], out)
    spoil(out)
    with pytest.raises(FileError):
        keys.make_keys([plan_of(split)], out)


def test_a_folder_of_something_else_is_not_replaced(split: Path, tmp_path: Path) -> None:
    (tmp_path / "keys" / "left").mkdir(parents=True)
    (tmp_path / "keys" / "left" / "thesis.txt").write_text("years of work")
    with pytest.raises(FileError, match="no certificate"):
        keys.make_keys([plan_of(split)], tmp_path / "keys")
    assert (tmp_path / "keys" / "left" / "thesis.txt").exists()


@pytest.mark.parametrize(("spoil", "error"), [
    (lambda own, others: (own / "key.pem").chmod(0o640), UnsafeFileError),
    (lambda own, others: (own / "key.pem").chmod(0o604), UnsafeFileError),
    (lambda own, others: (own / "key.pem").unlink(), FileError),
    (lambda own, others: shutil.copy(others / "key.pem", own / "key.pem"), FileError),
    (lambda own, others: shutil.copy(others / "ca.pem", own / "ca.pem"), FileError),
    (lambda own, others: [shutil.copy(others / n, own / n) for n in ("key.pem", "cert.pem")], FileError),
    (lambda own, others: (own / "cert.pem").write_bytes(b"-----BEGIN CERTIFICATE-----\n"), FileError),
    (lambda own, others: (own / "ca.pem").write_bytes(b""), FileError),
    (lambda own, others: (own / "cert.pem").write_bytes(bytes(2 << 20)), FileError)])
def test_spoilt_keys_are_refused_when_read(split: Path, tmp_path: Path, spoil: Callable[[Path, Path], Any], error: type[GkpError]) -> None:
    keys.make_keys([plan_of(split)], tmp_path / "keys")
    keys.make_keys([plan_of(split)], tmp_path / "others")
    spoil(tmp_path / "keys" / "left", tmp_path / "others" / "left")
    with pytest.raises(error):
        read_keys(tmp_path / "keys" / "left")


def test_expired_keys_are_refused_when_read(split: Path, tmp_path: Path) -> None:
    keys.make_keys([plan_of(split)], tmp_path / "keys", days=-1)
    with pytest.raises(FileError, match="expired"):
        read_keys(tmp_path / "keys" / "left")


def test_the_authoritys_own_folder_is_no_role(split: Path, tmp_path: Path) -> None:
    keys.make_keys([plan_of(split)], tmp_path / "keys")
    with pytest.raises(FileError, match=r"cert\.pem is missing"):
        read_keys(tmp_path / "keys")


def test_a_private_key_is_not_printed(split: Path, tmp_path: Path) -> None:
    keys.make_keys([plan_of(split)], tmp_path / "keys")
    assert "PRIVATE" not in repr(read_keys(tmp_path / "keys" / "left"))


@pytest.mark.parametrize("names", [[], ["gkp://plan/x"], ["gkp://coordinator", "gkp://worker/a"], ["gkp://worker/a", "gkp://worker/b"],
                                   ["https://worker/a", "worker.gkp"]])
def test_a_certificate_with_no_role_or_several_is_nobody(names: list[str]) -> None:
    assert identity.identity_of(names) is None


@pytest.mark.parametrize(("address", "local"), [
    ("127.0.0.1:1", True), ("127.9.9.9:1", True), ("localhost:1", True), ("[::1]:1", True), ("unix:/a/b", True), ("0.0.0.0:1", False),
    ("[::]:1", False), ("192.0.2.1:1", False), ("localhost.example:1", False), ("127.0.0.1.example:1", False)])
def test_which_addresses_are_of_this_machine(address: str, local: bool) -> None:
    assert identity.is_local(identity.check_address(address)) is local


@pytest.mark.parametrize("address", ["", "host", "host:", ":1", "host:99999", "host:x", "http://h:1", "::1:5", "unix:", "a b:1", "dns:///h:1"])
def test_what_is_no_address(address: str) -> None:
    with pytest.raises(UsageError):
        identity.check_address(address)


# ---- the command ----------------------------------------------------------------------------------------------------
def test_what_is_no_split_model_is_said(tmp_path: Path) -> None:
    assert_refused(gkp("edge", "keys", tmp_path, "-o", tmp_path / "keys"), 6, "plan.json")
    assert not (tmp_path / "keys").exists()


def test_without_cryptography_it_says_what_to_install(split: Path, tmp_path: Path) -> None:
    outcome = blocked_gkp(["cryptography"], "edge", "keys", split, "-o", tmp_path / "keys")
    assert_refused(outcome, 4, "cryptography", "gkp[edge]")


def test_a_device_reads_its_keys_without_cryptography(split: Path, tmp_path: Path) -> None:
    keys.make_keys([plan_of(split)], tmp_path / "keys")
    body = f"from pathlib import Path\nfrom gkp.edge.wire.identity import read_keys\nprint(read_keys(Path({str(tmp_path / 'keys' / 'left')!r})).identity.worker)\n"
    outcome = blocked(["cryptography", "grpc", "google"], body)
    assert (outcome.code, outcome.out.strip()) == (0, "left"), outcome.err
