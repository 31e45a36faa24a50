"""Which Ray clusters are joined, and what `gkp edge up` refuses before it asks one. No Ray is needed."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import cluster_kit as kit
import grpc
import msgspec
import pytest
from cli_kit import assert_refused, blocked_gkp, gkp
from ray_kit import free_port

from gkp.edge.ray.cluster import read_folder
from gkp.edge.ray.join import check_authentication, find_token
from gkp.edge.wire.keys import make_keys
from gkp.errors import BackendMissingError, FileError, GkpError, UsageError

TOKEN = "right"


class _Server(grpc.GenericRpcHandler):
    """Lists the nodes to everybody (open), to those with the token, or does not know how."""

    def __init__(self, kind: str) -> None:
        self._kind = kind

    def service(self, details: Any) -> Any:
        if self._kind == "other" or details.method != "/ray.rpc.NodeInfoGcsService/GetAllNodeInfo":
            return None
        said = dict(details.invocation_metadata).get("authorization")
        if self._kind == "open" or said == f"Bearer {TOKEN}":
            return grpc.unary_unary_rpc_method_handler(lambda data, context: b"")
        return grpc.unary_unary_rpc_method_handler(lambda data, context: context.abort(grpc.StatusCode.UNAUTHENTICATED, "no"))


@pytest.fixture
def address(request: pytest.FixtureRequest) -> Iterator[str]:
    with ThreadPoolExecutor(2) as pool:
        server = grpc.server(pool, handlers=[_Server(request.param)])
        port = server.add_insecure_port("127.0.0.1:0")
        server.start()
        yield f"127.0.0.1:{port}"
        server.stop(0).wait()


@pytest.fixture(autouse=True)
def _nobody(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No token in this user's environment or home."""
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_USE_TLS", "RAY_AUTH_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))


# ---- authentication -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("address", ["guarded"], indirect=True)
def test_a_guarded_cluster_is_joined_with_its_token(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN", TOKEN)
    check_authentication(address)


@pytest.mark.parametrize("address", ["open", "other"], indirect=True)
def test_nothing_but_a_refusal_counts_as_guarded(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN", TOKEN)
    with pytest.raises(UsageError, match=r"without token authentication|no Ray cluster that asks for a token"):
        check_authentication(address)


@pytest.mark.parametrize("address", ["guarded"], indirect=True)
@pytest.mark.parametrize("token", ["wrong", "lin\nes", "ünicode", " "])
def test_a_token_that_is_not_the_clusters_is_refused(address: str, token: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN", token)
    with pytest.raises(UsageError, match=r"does not accept the token|there is none here"):
        check_authentication(address)


def test_a_port_where_nobody_listens_is_no_cluster() -> None:
    with pytest.raises(BackendMissingError, match="no Ray cluster answers"):
        check_authentication(f"127.0.0.1:{free_port()}")


@pytest.mark.parametrize("address", ["auto", "local", "ray://192.0.2.1:10001", "unix:socket", "192.0.2.1", "192.0.2.1:99999", ""])
def test_what_is_no_address_is_refused(address: str) -> None:
    with pytest.raises(UsageError):
        check_authentication(address)


def test_the_token_is_looked_for_where_ray_does(tmp_path: Path) -> None:
    named, usual = tmp_path / "named", tmp_path / ".ray" / "auth_token"
    assert find_token({}, tmp_path) is None
    usual.parent.mkdir()
    usual.write_text("usual\n")
    assert find_token({}, tmp_path) == "usual"
    named.write_text("named")
    assert find_token({"RAY_AUTH_TOKEN_PATH": str(named)}, tmp_path) == "named"
    assert find_token({"RAY_AUTH_TOKEN_PATH": str(named), "RAY_AUTH_TOKEN": "given"}, tmp_path) == "given"
    with pytest.raises(FileError):
        find_token({"RAY_AUTH_TOKEN_PATH": str(tmp_path / "nothing")}, tmp_path)


# ---- before Ray is asked --------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> kit.Split:
    return kit.split(tmp_path_factory.mktemp("split"), "pipeline", 2)


@pytest.fixture
def keys(made: kit.Split, tmp_path: Path) -> Path:
    make_keys([made.plan], tmp_path / "keys")
    return tmp_path / "keys"


def _up(split: Path, keys: Path, output: Path) -> list[object]:
    return ["edge", "up", split, "--ray", f"127.0.0.1:{free_port()}", "--keys", keys, "-o", output]


def test_without_ray_the_extra_is_named(made: kit.Split, keys: Path, tmp_path: Path) -> None:
    assert_refused(blocked_gkp(["ray"], *_up(made.directory, keys, tmp_path / "c.yaml")), 4, "Ray is not installed", "gkp[ray]")


def test_a_cluster_file_that_was_written_by_hand_is_left_alone(made: kit.Split, keys: Path, tmp_path: Path) -> None:
    file = tmp_path / "cluster.yaml"
    file.write_text("keys: keys/coordinator\n")
    assert_refused(gkp(*_up(made.directory, keys, file)), 6, "overwritten")
    assert file.read_text() == "keys: keys/coordinator\n"


def test_keys_of_another_plan_device_or_nobody_are_refused(made: kit.Split, keys: Path, tmp_path: Path) -> None:
    other = kit.split(tmp_path / "other", "replicas", 2)
    assert_refused(gkp(*_up(other.directory, keys, tmp_path / "c.yaml")), 5, "do not name this plan")
    shutil.rmtree(keys / "d1")
    shutil.copytree(keys / "d0", keys / "d1")
    assert_refused(gkp(*_up(made.directory, keys, tmp_path / "c.yaml")), 5, "are not of d1")
    shutil.rmtree(keys / "d1")
    assert_refused(gkp(*_up(made.directory, keys, tmp_path / "c.yaml")), 6, "missing")


@pytest.mark.parametrize("name", ["../keys", "a b", "d0\n", "", "x" * 64, "gkp:d0", "$(id)", "ü"])
def test_device_names_that_are_no_names_go_no_further(made: kit.Split, keys: Path, tmp_path: Path, name: str) -> None:
    devices = [made.plan.devices[0], msgspec.structs.replace(made.plan.devices[1], name=name)]
    (tmp_path / "plan.json").write_bytes(msgspec.json.encode(msgspec.structs.replace(made.plan, devices=devices)))
    assert_refused(gkp(*_up(tmp_path, keys, tmp_path / "c.yaml")), 2, "cannot stand in a certificate")


# ---- what travels ---------------------------------------------------------------------------------------------------
def test_only_the_files_of_the_plan_travel(made: kit.Split, tmp_path: Path) -> None:
    folder = tmp_path / "device_0"
    shutil.copytree(made.directory / "device_0", folder)
    (folder / "diary.txt").write_text("private")
    assert set(read_folder(folder, made.plan, 0)) == {"plan.json", "manifest.json", "segment_0.onnx"}


@pytest.mark.parametrize("name", ["../keys/ca.key", "..", "a/b", "\n"])
def test_a_plan_cannot_name_files_elsewhere(made: kit.Split, tmp_path: Path, name: str) -> None:
    (tmp_path / "device_0").mkdir()
    shutil.copytree(made.directory / "device_0", tmp_path / "device_0", dirs_exist_ok=True)
    plan = msgspec.structs.replace(made.plan, files={"0": {name: "0" * 64}})
    with pytest.raises(FileError, match="the plan names the file"):
        read_folder(tmp_path / "device_0", plan, 0)


def test_links_missing_files_and_huge_folders_are_refused(made: kit.Split, tmp_path: Path) -> None:
    folder = tmp_path / "device_0"
    shutil.copytree(made.directory / "device_0", folder)
    file = folder / "segment_0.onnx"
    with file.open("r+b") as f:
        f.truncate((4 << 30) + 1)  # a hole
    with pytest.raises(FileError, match="over 4 GiB"):
        read_folder(folder, made.plan, 0)
    file.unlink()
    with pytest.raises(GkpError, match="cannot be read"):
        read_folder(folder, made.plan, 0)
    secret = tmp_path / "secret"
    secret.write_text("private")
    file.symlink_to(secret)
    with pytest.raises(GkpError, match="cannot be read"):
        read_folder(folder, made.plan, 0)
    file.unlink()
    os.mkfifo(file)  # nobody ever writes into it
    with pytest.raises(GkpError, match="no plain file"):
        read_folder(folder, made.plan, 0)
