"""Workers as processes that end, the folders that they serve, and what a device needs."""

from __future__ import annotations

import os
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import worker_kit as kit
from cli_kit import blocked, blocked_gkp, gkp, program
from oip_kit import Call, Front
from service_kit import answer, new, opened, refused, status_of, until

from gkp.edge.plan.schema import write_plan
from gkp.edge.wire import keys as keys_module
from gkp.edge.wire.client import Connection, RemoteError
from gkp.edge.wire.identity import read_keys


# ---- processes that end ---------------------------------------------------------------------------------------------
def test_sigterm_drains_and_exits_with_0(tmp_path: Path) -> None:
    with kit.Pair(tmp_path, sockets=True) as pair:
        right, from_left, x, request = pair.connect("right"), pair.connect("right", role="left"), kit.example(), new()
        assert from_left.ready(pair.hash, 5)
        waiting = opened(right, pair.call(request, x), 60)
        pair.right.process.send_signal(signal.SIGTERM)
        until(lambda: not right.ready(pair.hash, 5))
        refused(lambda: right.infer(pair.call(new()), 5), "UNAVAILABLE", "draining")
        assert from_left.infer(pair.value(request, 2 * x), 5).parameters["accepted"] == "new"
        np.testing.assert_allclose(waiting.result().values["v2"], kit.expected(x), atol=1e-5)
        assert pair.right.process.wait(40) == 0
        assert "every open request was answered" in pair.right.errors()
        refused(lambda: pair.connect("left").infer(pair.call(new(), x), 5), "UNAVAILABLE", "peer", kit.RIGHT)


def test_the_time_of_grace_ends(tmp_path: Path) -> None:
    with kit.Pair(tmp_path, "--grace", 1, sockets=True) as pair:
        right = pair.connect("right")
        waiting = opened(right, pair.call(new()), 60)
        start = time.monotonic()
        assert pair.right.end() == 0
        assert time.monotonic() - start < 30
        assert "dropped" in pair.right.errors()
        with pytest.raises(RemoteError):
            waiting.result()


def test_a_killed_worker_is_an_error_at_once_and_a_stopped_one_within_two_keepalives(tmp_path: Path) -> None:
    with kit.Pair(tmp_path, sockets=True) as pair:
        left, right = pair.connect("left"), pair.connect("right")
        waiting = opened(right, pair.call(new()), 60)
        start = time.monotonic()
        pair.right.process.send_signal(signal.SIGKILL)
        refused(waiting.result, "UNAVAILABLE")
        assert time.monotonic() - start < 1
        refused(lambda: left.infer(pair.call(new()), 20), "UNAVAILABLE", "peer", kit.RIGHT)
        assert left.ready(pair.hash, 5)
        pair.left.process.send_signal(signal.SIGSTOP)
        start = time.monotonic()
        refused(lambda: left.infer(pair.call(new()), 60), "UNAVAILABLE")
        assert time.monotonic() - start < 4.0
        pair.left.process.send_signal(signal.SIGCONT)
        until(lambda: status_of(lambda: left.ready(pair.hash, 5)) == "OK")


def test_a_stopped_peer_is_noticed_by_the_worker_that_sends_to_it(tmp_path: Path) -> None:
    with kit.Pair(tmp_path, sockets=True) as pair:
        left, right = pair.connect("left"), pair.connect("right")
        answer(pair, left, right, kit.example())
        pair.right.process.send_signal(signal.SIGSTOP)
        start = time.monotonic()
        refused(lambda: left.infer(pair.call(new()), 60), "UNAVAILABLE", "peer", kit.RIGHT)
        assert time.monotonic() - start < 4.0
        pair.right.process.send_signal(signal.SIGCONT)
        until(lambda: status_of(lambda: answer(pair, left, right, kit.example())) == "OK")


def test_two_workers_cannot_share_a_port(pair: kit.Pair) -> None:
    outcome = program("serve", pair.directory / "device_1", "--listen", pair.right.address, "--keys", pair.keys_folder / "right")
    assert outcome.code == 2
    assert "cannot listen" in outcome.err


def test_a_second_worker_does_not_take_a_socket_away_but_one_that_was_left_behind(tmp_path: Path) -> None:
    with kit.Pair(tmp_path, sockets=True) as pair:
        again = ("serve", pair.directory / "device_1", "--listen", pair.right.address, "--keys", pair.keys_folder / "right")
        outcome = program(*again)
        assert (outcome.code, "another process listens" in outcome.err) == (2, True), outcome.err
        left, right = pair.connect("left"), pair.connect("right")
        np.testing.assert_allclose(answer(pair, left, right, kit.example()), kit.expected(kit.example()), atol=1e-5)
        for connection in (left, right):
            connection.close()
        pair.right.process.kill()
        pair.right.process.wait(30)
        with kit.Served(pair.directory / "device_1", "--keys", pair.keys_folder / "right", listen=pair.right.address):
            right = pair.connect("right")
            assert right.ready(pair.hash, 5)
            right.close()


# ---- folders --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("break_it", "code", "word"), [
    (lambda f: (f / "segment_1.onnx").write_bytes(b"x"), 6, "checksum"),
    (lambda f: (f / "segment_1.onnx").unlink(), 6, "cannot be read"),
    (lambda f: (f / "plan.json").write_bytes((f / "plan.json").read_bytes().replace(b'"by hand"', b'"by foot"')), 6, "not the plan"),
    (lambda f: (f / "plan.json").write_bytes(b"{"), 6, "not a plan"),
    (lambda f: (f / "manifest.json").write_bytes(b"[]"), 6, "not the manifest"),
    (lambda f: (f / "manifest.json").unlink(), 6, "manifest.json"),
    (lambda f: (f / "manifest.json").write_bytes((f / "manifest.json").read_bytes().replace(b'"device": 1', b'"device": 9')), 6, "device 9"),
    (lambda f: (f / "manifest.json").write_bytes((f / "manifest.json").read_bytes().replace(b'"device": 1', b'"device": 0')), 6, "cannot be read")])
def test_a_folder_that_is_not_what_was_split_is_refused(pair: kit.Pair, tmp_path: Path, break_it: Callable[[Path], Any], code: int, word: str) -> None:
    import shutil

    shutil.copytree(pair.directory / "device_1", tmp_path / "device_1")
    break_it(tmp_path / "device_1")
    outcome = gkp("serve", tmp_path / "device_1", "--listen", "127.0.0.1:0", "--insecure", expect=code)
    assert word in outcome.err
    assert len(outcome.err.splitlines()) <= 2


def test_the_keys_of_another_device_are_refused(pair: kit.Pair) -> None:
    outcome = gkp("serve", pair.directory / "device_1", "--listen", "127.0.0.1:0", "--keys", pair.keys_folder / "left", expect=5)
    assert "left" in outcome.err


def test_a_peer_without_address_is_asked_for(pair: kit.Pair) -> None:
    outcome = gkp("serve", pair.directory / "device_0", "--listen", "127.0.0.1:0", "--insecure", expect=2)
    assert "--peer right=" in outcome.err
    for wrong in ("right", "right=nowhere", "=1.2.3.4:5", "middle=127.0.0.1:1"):
        gkp("serve", pair.directory / "device_0", "--listen", "127.0.0.1:0", "--insecure", "--peer", wrong, expect=2)


def test_one_worker_serves_several_plans(tmp_path: Path) -> None:
    first, second = kit.write_split(tmp_path / "a"), kit.write_split(tmp_path / "b", note="second")
    keys_module.make_keys([first, second], tmp_path / "keys")
    with kit.Served(tmp_path / "a" / "device_1", tmp_path / "b" / "device_1", "--keys", tmp_path / "keys" / "right") as served:
        connection = Connection(served.address, "right", read_keys(tmp_path / "keys" / "coordinator"), 1 << 20)
        front = Front(served.address, "right", tmp_path / "keys" / "coordinator")
        assert served.said["plans"] == {first.hash: 1, second.hash: 1}
        for plan in (first, second):
            values = {"v0": kit.example(), "v1": 2 * kit.example()}
            found = front.infer(Call(plan.hash, new(), model="segment_1", values=values), 10)
            np.testing.assert_allclose(found.values["v2"], kit.expected(kit.example()), atol=1e-5)
            assert connection.ready(plan.hash, 5)
        refused(lambda: front.infer(Call("", new(), model="segment_1"), 5), "NOT_FOUND", "plan")
        connection.close()
        front.close()


# ---- what a device needs --------------------------------------------------------------------------------------------
NOT_ON_A_DEVICE = ("torch", "onnx", "onnx_graphsurgeon", "onnxscript", "openvino", "cryptography", "yaml", "networkx", "scipy", "jinja2",
                   "tritonclient", "ray")


def test_a_device_needs_neither_torch_nor_onnx_nor_cryptography(pair: kit.Pair) -> None:
    body = f"""
import numpy as np, sys
from pathlib import Path
from gkp.edge.device.serve import ServeOptions, Serving
from gkp.edge.wire.client import Call, Connection, message_limit
from gkp.edge.wire.identity import read_keys
from gkp.edge.plan.schema import read_plan
split, keys = Path({str(pair.directory)!r}), Path({str(pair.keys_folder)!r})
serving = Serving(ServeOptions([split / "device_1"], "127.0.0.1:0", keys / "right", {{}}, threads=1))
plan = read_plan(split)
connection = Connection(serving.address, "right", read_keys(keys / "coordinator"), message_limit(plan))
x = np.ones({kit.SHAPE}, np.float32)
from_left = Connection(serving.address, "right", read_keys(keys / "left"), message_limit(plan))
print(from_left.infer(Call(plan.hash, "r", source=0, values={{"v1": x}}), 10).parameters["accepted"])
print(connection.infer(Call(plan.hash, "r", values={{"v0": x}}), 10).values["v2"].sum())
connection.close()
from_left.close()
print(serving.stop(), [n for n in sys.modules if n.startswith(("gkp.converter", "gkp.pruning", "gkp.benchmarks"))])
"""
    outcome = blocked(NOT_ON_A_DEVICE, body)
    assert (outcome.code, outcome.out.split("\n")[:3]) == (0, ["new", str(2.0 * kit.BYTES / 4), "True []"]), outcome.err


@pytest.mark.parametrize("missing", ["grpc", "google"])
def test_a_missing_package_is_said_in_words(pair: kit.Pair, missing: str) -> None:
    outcome = blocked_gkp([missing], "serve", pair.directory / "device_1", "--listen", "127.0.0.1:0", "--insecure")
    assert outcome.code == 4
    assert ".[edge]" in outcome.err


def test_garbage_on_the_port_does_not_end_a_worker(pair: kit.Pair) -> None:
    host, port = pair.right.address.split(":")
    for data in (b"\x16\x03\x01\x00\x05hello", b"GET / HTTP/1.1\r\n\r\n", os.urandom(500)):
        with socket.create_connection((host, int(port)), 5) as s:
            s.sendall(data)
    connection = pair.connect("right")
    assert connection.ready(pair.hash, 5)
    connection.close()
    with pair.front("right") as front:
        assert front.live(5)


def test_a_native_library_is_not_opened_without_keys_that_vouch_for_it(pair: kit.Pair, tmp_path: Path) -> None:
    import hashlib

    import msgspec

    segments = [pair.plan.segments[0], msgspec.structs.replace(pair.plan.segments[1], file="segment_1.so")]
    digest = {"0": pair.plan.files["0"], "1": {"segment_1.so": hashlib.sha256(b"\x7fELF").hexdigest()}}
    plan, folder = msgspec.structs.replace(pair.plan, segments=segments, files=digest), tmp_path / "device_1"
    write_plan(plan, tmp_path)
    (folder / "segment_1.so").write_bytes(b"\x7fELF")
    assert "program" in gkp("serve", folder, "--listen", "127.0.0.1:0", "--insecure", expect=5).err
    gkp("serve", folder, "--listen", "127.0.0.1:0", "--keys", pair.keys_folder / "right", expect=5)  # they name another plan
    keys_module.make_keys([plan], tmp_path / "keys")
    assert "segment_1.so" in gkp("serve", folder, "--listen", "127.0.0.1:0", "--keys", tmp_path / "keys" / "right", expect=6).err

