"""Workers as real processes on loopback: stock clients, refused handshakes, roles, hostile tensors, limits, deadlines."""

from __future__ import annotations

import os
import signal
import socket
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import worker_kit as kit
from cli_kit import blocked, blocked_gkp, gkp, program
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gkp.edge import keys as keys_module
from gkp.edge import oip
from gkp.edge.client import Call, Connection, Pending, RemoteError
from gkp.edge.identity import Keys, read_keys

triton = pytest.importorskip("tritonclient.grpc")
INFER = f"/{oip.SERVICE}/ModelInfer"


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[kit.Pair]:
    with kit.Pair(tmp_path_factory.mktemp("pair"), "--queue", 6) as made:
        yield made


@pytest.fixture
def left(pair: kit.Pair) -> Iterator[Connection]:
    connection = pair.connect("left")
    yield connection
    connection.close()


@pytest.fixture
def right(pair: kit.Pair) -> Iterator[Connection]:
    connection = pair.connect("right")
    yield connection
    connection.close()


@pytest.fixture
def from_left(pair: kit.Pair) -> Iterator[Connection]:
    """The left worker's connection to the right one."""
    connection = pair.connect("right", role="left")
    yield connection
    connection.close()


def new() -> str:
    return uuid.uuid4().hex


def refused(call: Callable[[], Any], status: str, error: str = "", device: int | None = None) -> RemoteError:
    with pytest.raises(RemoteError) as caught:
        call()
    assert (caught.value.status, caught.value.error, caught.value.device) == (status, error, device), caught.value.message
    return caught.value


def answer(pair: kit.Pair, left: Connection, right: Connection, x: Any) -> Any:
    """One whole request, as the coordinator makes it."""
    request = new()
    first, second = left.start(pair.call(request, x), 10), right.start(pair.call(request, x), 10)
    try:
        first.result()
        return second.result().values["v2"]
    finally:
        second.cancel()


# ---- a request ------------------------------------------------------------------------------------------------------
def test_a_request_runs_over_both_devices_and_the_bytes_are_the_plans(pair: kit.Pair, left: Connection, right: Connection) -> None:
    x, request = kit.example(1), new()
    first = left.start(pair.call(request, x, profile=True), 10)
    second = right.start(pair.call(request, x, wanted=("v2",), profile=True), 10)
    one, two = first.result(), second.result()
    np.testing.assert_allclose(two.values["v2"], kit.expected(x), atol=1e-5)
    assert one.values == {}
    assert (one.parameters["sent_messages"], one.parameters["sent_bytes"]) == (1, kit.BYTES)
    assert (two.parameters["received_messages"], two.parameters["received_bytes"]) == (1, kit.BYTES)
    assert one.parameters["received_bytes"] == two.parameters["sent_bytes"] == 0
    assert '"what":"send","name":"v1","peer":1' in str(one.parameters["timing"])
    assert '"what":"receive","name":"v1","peer":0' in str(two.parameters["timing"])


def test_many_requests_at_once_keep_their_own_values(pair: kit.Pair, left: Connection, right: Connection) -> None:
    inputs = [kit.example(k) for k in range(60)]
    for start in range(0, len(inputs), 5):
        running = []
        for x in inputs[start:start + 5]:
            request = new()
            running.append((x, left.start(pair.call(request, x), 20), right.start(pair.call(request, x), 20)))
        for x, first, second in running:
            first.result()
            np.testing.assert_allclose(second.result().values["v2"], kit.expected(x), atol=1e-5)


def test_half_precision_on_the_wire_halves_the_bytes_between_devices_only(tmp_path: Path) -> None:
    with kit.Pair(tmp_path, wire="float16", sockets=True) as pair:
        left, right, x, request = pair.connect("left"), pair.connect("right"), kit.example(), new()
        first, second = left.start(pair.call(request, x), 10), right.start(pair.call(request, x), 10)
        assert first.result().parameters["sent_bytes"] == kit.BYTES // 2
        y = second.result().values["v2"]
        assert y.dtype == np.float32
        np.testing.assert_allclose(y, kit.expected(x), atol=4e-3)
        large = np.full(kit.SHAPE, 6e4, np.float32)  # twice that is infinity in float16
        request = new()
        refused(lambda: left.infer(pair.call(request, large), 10), "INVALID_ARGUMENT", "not-finite", kit.RIGHT)


# ---- stock clients --------------------------------------------------------------------------------------------------
@pytest.fixture
def stock(pair: kit.Pair) -> Iterator[Any]:
    made = _stock(pair, pair.right.address)
    yield made
    made.close()


def _stock(pair: kit.Pair, address: str) -> Any:
    folder = pair.keys_folder / "coordinator"
    return triton.InferenceServerClient(address, ssl=True, root_certificates=str(folder / "ca.pem"),
                                        private_key=str(folder / "key.pem"), certificate_chain=str(folder / "cert.pem"))


def _tensor(name: str, array: Any) -> Any:
    tensor = triton.InferInput(name, list(array.shape), "FP32")
    tensor.set_data_from_numpy(array)
    return tensor


def test_tritonclient_asks_live_ready_and_metadata_unchanged(pair: kit.Pair, stock: Any) -> None:
    assert stock.is_server_live()
    assert stock.is_server_ready()
    assert stock.is_model_ready("gkp")
    assert stock.is_model_ready("gkp", pair.hash)
    assert not stock.is_model_ready("gkp", "another plan")
    assert not stock.is_model_ready("resnet")
    assert (stock.get_server_metadata().name, list(stock.get_server_metadata().extensions)) == ("gkp", ["gkp.edge/1"])
    about = stock.get_model_metadata("segment_1")
    assert [(t.name, t.datatype, list(t.shape)) for t in about.inputs] == [("v0", "FP32", list(kit.SHAPE)), ("v1", "FP32", list(kit.SHAPE))]
    assert [t.name for t in about.outputs] == ["v2"]
    assert [t.name for t in stock.get_model_metadata("gkp", pair.hash).outputs] == ["v2"]


def test_tritonclient_infers_one_segment_and_a_whole_request_unchanged(pair: kit.Pair, stock: Any, left: Connection) -> None:
    x, request = kit.example(), new()
    found = stock.infer("segment_1", [_tensor("v0", x), _tensor("v1", 2 * x)], client_timeout=10)
    np.testing.assert_allclose(found.as_numpy("v2"), kit.expected(x), atol=1e-5)
    first = left.start(pair.call(request, x), 10)
    found = stock.infer("gkp", [_tensor("v0", x)], request_id=request, client_timeout=10)
    first.result()
    np.testing.assert_allclose(found.as_numpy("v2"), kit.expected(x), atol=1e-5)


def test_tritonclient_gets_the_status_of_an_error(stock: Any) -> None:
    with pytest.raises(triton.InferenceServerException) as caught:
        stock.infer("segment_9", [_tensor("v0", kit.example())], client_timeout=10)
    assert caught.value.status() == "StatusCode.NOT_FOUND"
    with pytest.raises(triton.InferenceServerException) as caught:
        stock.infer("segment_1", [_tensor("v0", kit.example())], client_timeout=10)
    assert caught.value.status() == "StatusCode.INVALID_ARGUMENT"


def test_typed_contents_are_taken_where_a_client_sends_no_raw_bytes(pair: kit.Pair) -> None:
    x = kit.example()
    message = oip.write_call(Call("", "", model="segment_0", values={"v0": x}))
    del message.raw_input_contents[:]
    message.inputs[0].contents.fp32_contents.extend(x.ravel().tolist())
    del message.inputs[0].parameters["crc32"]
    reply = oip.MESSAGES["ModelInferResponse"].FromString(_raw(pair, "left", message.SerializeToString()))
    np.testing.assert_allclose(np.frombuffer(reply.raw_output_contents[0], "<f4").reshape(kit.SHAPE), 2 * x)


# ---- handshakes -----------------------------------------------------------------------------------------------------
def _handshake(address: str, name: str, **files: bytes | None) -> grpc.StatusCode:
    """Ask ServerLive over a connection with these credentials (none: plaintext); the status."""
    if files:
        credentials = grpc.ssl_channel_credentials(**files)
        channel = grpc.secure_channel(address, credentials, [("grpc.ssl_target_name_override", name)])
    else:
        channel = grpc.insecure_channel(address)
    with channel:
        try:
            channel.unary_unary(f"/{oip.SERVICE}/ServerLive")(b"", timeout=5)
        except grpc.RpcError as e:
            return e.code()
    return grpc.StatusCode.OK


def test_handshakes_are_refused_for_every_wrong_certificate(pair: kit.Pair, tmp_path: Path) -> None:
    name, good = "right.worker.gkp", kit.credentials(pair.keys_folder / "coordinator")
    keys_module.make_keys([pair.plan], tmp_path / "strangers")
    strangers = kit.credentials(tmp_path / "strangers" / "coordinator")
    cases = {
        "no certificate": {"root_certificates": good["root_certificates"], "private_key": None, "certificate_chain": None},
        "another authority": {**strangers, "root_certificates": good["root_certificates"]},
        "another authority here": strangers,
        "plaintext": {}}
    assert _handshake(pair.right.address, name, **good) is grpc.StatusCode.OK
    for case, files in cases.items():
        assert _handshake(pair.right.address, name, **files) is grpc.StatusCode.UNAVAILABLE, case
    assert _handshake(pair.right.address, "left.worker.gkp", **good) is grpc.StatusCode.UNAVAILABLE
    assert _handshake(pair.right.address, name, **good) is grpc.StatusCode.OK


def test_an_expired_certificate_is_refused_by_the_worker_and_by_its_owner(pair: kit.Pair, tmp_path: Path) -> None:
    import shutil

    copy = tmp_path / "keys"
    shutil.copytree(pair.keys_folder, copy)
    keys_module.make_keys([pair.plan], copy, days=-1)
    expired = kit.credentials(copy / "coordinator")
    assert _handshake(pair.right.address, "right.worker.gkp", **expired) is grpc.StatusCode.UNAVAILABLE
    outcome = program("serve", pair.directory / "device_1", "--listen", "127.0.0.1:0", "--keys", copy / "right")
    assert outcome.code == 6
    assert "expired" in outcome.err


def test_a_connection_insists_on_the_device_it_is_for(pair: kit.Pair) -> None:
    connection = pair.connect("left", name="right")
    error = refused(lambda: connection.live(5), "UNAVAILABLE")
    assert error.hint
    connection.close()


def test_a_coordinators_certificate_cannot_serve(pair: kit.Pair, tmp_path: Path) -> None:
    folder = pair.keys_folder / "coordinator"
    outcome = program("serve", pair.directory / "device_1", "--listen", "127.0.0.1:0", "--keys", folder)
    assert outcome.code == 5
    assert "coordinator" in outcome.err
    keys, server = read_keys(folder), grpc.server(_pool())
    port = server.add_secure_port("127.0.0.1:0", grpc.ssl_server_credentials([(keys.key, keys.certificate)], keys.ca, True))
    server.start()
    found = _handshake(f"127.0.0.1:{port}", "right.worker.gkp", **kit.credentials(pair.keys_folder / "left"))
    server.stop(0)
    assert found is grpc.StatusCode.UNAVAILABLE


def _pool() -> Any:
    from concurrent.futures import ThreadPoolExecutor

    return ThreadPoolExecutor(2)


def test_plaintext_is_for_this_machine_only_and_never_by_leaving_something_out(pair: kit.Pair) -> None:
    folder = pair.directory / "device_1"
    for options, word in (((), "--insecure"), (("--insecure", "--keys", pair.keys_folder / "right"), "exclude")):
        outcome = gkp("serve", folder, "--listen", "127.0.0.1:0", *options, expect=2)
        assert word in outcome.err
    for address in ("0.0.0.0:0", "192.0.2.1:7000", "[::]:0", "example.org:7000"):
        assert "this machine" in gkp("serve", folder, "--listen", address, "--insecure", expect=2).err
    left = gkp("serve", pair.directory / "device_0", "--listen", "127.0.0.1:0", "--insecure", "--peer", "right=192.0.2.1:7000", expect=2)
    assert "another machine" in left.err


def test_insecure_workers_work_over_sockets_of_this_machine(pair: kit.Pair, tmp_path: Path) -> None:
    listen = f"unix:{tmp_path / 'r.sock'}"
    with kit.Served(pair.directory / "device_1", "--insecure", listen=listen) as right, \
            kit.Served(pair.directory / "device_0", "--insecure", "--peer", f"right={listen}", listen=f"unix:{tmp_path / 'l.sock'}") as left:
        assert right.address == listen
        connections = [Connection(s.address, n, None, pair.limit) for s, n in ((left, "left"), (right, "right"))]
        np.testing.assert_allclose(answer(pair, *connections, kit.example(3)), kit.expected(kit.example(3)), atol=1e-5)


# ---- roles ----------------------------------------------------------------------------------------------------------
def test_a_worker_cannot_act_as_coordinator(pair: kit.Pair, from_left: Connection) -> None:
    refused(lambda: from_left.infer(pair.call(new()), 5), "PERMISSION_DENIED", "role")
    values = {"v0": kit.example(), "v1": kit.example()}
    refused(lambda: from_left.infer(pair.call(new(), model="segment_1", values=values), 5), "PERMISSION_DENIED", "role")


def test_a_coordinator_cannot_act_as_a_worker(pair: kit.Pair, right: Connection) -> None:
    refused(lambda: right.infer(pair.value(new(), kit.example()), 5), "PERMISSION_DENIED", "role")


def test_a_worker_sends_only_its_own_values_and_only_along_the_plan(pair: kit.Pair, from_left: Connection) -> None:
    x = kit.example()
    for changes in ({"source": kit.RIGHT}, {"source": 7}, {"source": -2}, {"values": {"v0": x}}, {"values": {"v2": x}},
                    {"values": {"v1": x, "v0": x}}, {"values": {}}):
        refused(lambda c=changes: from_left.infer(pair.value(new(), x, **c), 5), "PERMISSION_DENIED", "role")
    to_left = pair.connect("left", role="right")
    refused(lambda: to_left.infer(pair.value(new(), x, source=kit.RIGHT), 5), "PERMISSION_DENIED", "role")
    to_left.close()
    refused(lambda: from_left.infer(pair.value(new(), x, wanted=("v2",)), 5), "INVALID_ARGUMENT", "tensor")


def test_a_certificate_for_another_plan_is_refused(pair: kit.Pair, tmp_path: Path) -> None:
    import shutil

    copy = tmp_path / "keys"
    shutil.copytree(pair.keys_folder, copy)
    other = kit.write_split(tmp_path / "other", note="another")
    keys_module.make_keys([other], copy)
    connection = Connection(pair.right.address, "right", read_keys(copy / "coordinator"), pair.limit)
    refused(lambda: connection.infer(pair.call(new()), 5), "PERMISSION_DENIED", "role")
    connection.close()
    outcome = program("serve", pair.directory / "device_1", "--listen", "127.0.0.1:0", "--keys", copy / "right")
    assert outcome.code == 5
    assert "certificate" in outcome.err


def test_a_certificate_without_a_role_may_do_nothing(pair: kit.Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    authority = keys_module._open_authority(pair.keys_folder)
    from gkp.edge import identity

    monkeypatch.setattr(identity, "uris", lambda who: [])
    certificate, key = keys_module.issue(authority, identity.Identity("x", frozenset()), ["localhost"], 1)
    good = read_keys(pair.keys_folder / "coordinator")
    connection = Connection(pair.right.address, "right", Keys(good.identity, good.ca, certificate, key), pair.limit)
    refused(lambda: connection.infer(pair.call(new()), 5), "PERMISSION_DENIED", "role")
    connection.close()


# ---- what arrives ---------------------------------------------------------------------------------------------------
def _raw(pair: kit.Pair, device: str, data: bytes, role: str = "coordinator", timeout: float = 5) -> bytes:
    """ModelInfer with these bytes, whatever they are."""
    served = pair.left if device == "left" else pair.right
    credentials = grpc.ssl_channel_credentials(**kit.credentials(pair.keys_folder / role))
    options = [("grpc.ssl_target_name_override", f"{device}.worker.gkp"), ("grpc.max_send_message_length", -1)]
    with grpc.secure_channel(served.address, credentials, options) as channel:
        answer: bytes = channel.unary_unary(INFER)(data, timeout=timeout)
    return answer


def raw_status(pair: kit.Pair, device: str, data: bytes, role: str = "coordinator") -> tuple[str, str]:
    """(status, gkp-error) of ModelInfer with these bytes."""
    try:
        _raw(pair, device, data, role)
    except grpc.RpcError as e:
        return e.code().name, str(dict(e.trailing_metadata() or ()).get("gkp-error", ""))
    return "OK", ""


def test_wrong_plans_and_models_are_refused_before_anything_is_computed(pair: kit.Pair, right: Connection) -> None:
    refused(lambda: right.infer(pair.call(new(), plan="0" * 64), 5), "NOT_FOUND", "plan")
    refused(lambda: right.infer(pair.call(new(), model="segment_0"), 5), "NOT_FOUND", "model")
    refused(lambda: right.infer(pair.call(new(), model="../segment_1"), 5), "NOT_FOUND", "model")
    assert not right.ready("0" * 64, 5)


@pytest.mark.parametrize("change", [
    {"values": {}}, {"values": {"v1": kit.example()}}, {"values": {"v0": kit.example(), "v1": kit.example()}},
    {"values": {"v0": kit.example().astype(np.float16)}}, {"values": {"v0": kit.example()[:, :2]}},
    {"values": {"v0": kit.example().reshape(1, 8, 4, 8)}}, {"wanted": ("v1",)}, {"wanted": ("nothing",)},
    {"attempt": 0}, {"attempt": -1}, {"attempt": 2**31}, {"request": "a b"}, {"request": "x" * 65}, {"request": "../x"}], ids=str)
def test_requests_that_are_not_the_plans_are_refused(pair: kit.Pair, right: Connection, change: dict[str, Any]) -> None:
    refused(lambda: right.infer(pair.call(**{"request": new(), **change}), 5), "INVALID_ARGUMENT", "tensor")


def _tampered(pair: kit.Pair, change: Callable[[Any], None]) -> bytes:
    message = oip.write_call(pair.call(new(), model="segment_0"))
    change(message)
    data: bytes = message.SerializeToString()
    return data


def _shape(*dims: int) -> Callable[[Any], None]:
    def change(message: Any) -> None:
        message.inputs[0].shape[:] = dims
    return change


TAMPERED = {
    "shape bomb": _shape(2**31, 2**31), "many axes": _shape(*[1] * 1000), "negative": _shape(-1, 4, 8, 8), "no axes": _shape(),
    "truncated": lambda m: m.raw_input_contents.__setitem__(0, m.raw_input_contents[0][:-1]),
    "longer": lambda m: m.raw_input_contents.__setitem__(0, m.raw_input_contents[0] + b"\0"),
    "no contents": lambda m: m.raw_input_contents.__delitem__(0),
    "two contents": lambda m: m.raw_input_contents.append(b"x"),
    "datatype": lambda m: setattr(m.inputs[0], "datatype", "BYTES"),
    "many inputs": lambda m: m.inputs.extend([m.inputs[0]] * 200),
    "same input twice": lambda m: (m.inputs.extend([m.inputs[0]]), m.raw_input_contents.append(m.raw_input_contents[0])),
    "attempt as text": lambda m: setattr(m.parameters["attempt"], "string_param", "1"),
    "crc as text": lambda m: setattr(m.inputs[0].parameters["crc32"], "string_param", "1"),
    "id": lambda m: setattr(m, "id", "\x1b[31m")}


@pytest.mark.parametrize("name", TAMPERED)
def test_malformed_tensors_are_refused(pair: kit.Pair, name: str) -> None:
    status = raw_status(pair, "left", _tampered(pair, TAMPERED[name]))
    assert status in {("INVALID_ARGUMENT", "tensor"), *([("DATA_LOSS", "checksum")] if name == "crc as text" else [])}


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.binary(max_size=200))
def test_bytes_that_are_no_message_are_refused(pair: kit.Pair, data: bytes) -> None:
    assert raw_status(pair, "left", data)[0] in ("INVALID_ARGUMENT", "NOT_FOUND")


def test_an_oversized_message_is_refused_and_takes_no_memory(pair: kit.Pair, left: Connection, right: Connection) -> None:
    message = oip.write_call(pair.call(new()))
    message.raw_input_contents[0] = bytes(64 << 20)
    data = message.SerializeToString()
    before = pair.left.resident()
    for _ in range(5):
        assert raw_status(pair, "left", data)[0] == "RESOURCE_EXHAUSTED"
    assert pair.left.resident() - before < 48 << 20
    answer(pair, left, right, kit.example())


@pytest.mark.parametrize("number", [np.nan, np.inf, -np.inf])
def test_numbers_that_are_not_finite_are_refused(pair: kit.Pair, left: Connection, from_left: Connection, number: float) -> None:
    x = kit.example()
    x[0, 3, 7, 7] = number
    refused(lambda: left.infer(pair.call(new(), x), 5), "INVALID_ARGUMENT", "not-finite")
    refused(lambda: from_left.infer(pair.value(new(), x), 5), "INVALID_ARGUMENT", "not-finite")


def test_an_answer_that_is_not_finite_is_an_error_of_the_device_that_made_it(pair: kit.Pair, left: Connection, right: Connection) -> None:
    x, request = np.full(kit.SHAPE, 1.7e38, np.float32), new()  # v1 is finite, v2 is not
    first, second = left.start(pair.call(request, x), 10), right.start(pair.call(request, x), 10)
    refused(second.result, "INVALID_ARGUMENT", "not-finite", kit.RIGHT)
    first.result()


@pytest.mark.parametrize("at", [0, 500, kit.BYTES - 1])
def test_a_flipped_byte_is_found_by_the_checksum(pair: kit.Pair, at: int) -> None:
    for device, call, role in (("left", pair.call(new()), "coordinator"), ("right", pair.value(new(), kit.example()), "left")):
        message = oip.write_call(call)
        raw = bytearray(message.raw_input_contents[0])
        raw[at] ^= 0x10
        message.raw_input_contents[0] = bytes(raw)
        assert raw_status(pair, device, message.SerializeToString(), role) == ("DATA_LOSS", "checksum")


def test_the_bytes_of_another_attempt_do_not_pass(pair: kit.Pair) -> None:
    message = oip.write_call(pair.value(new(), kit.example(), attempt=1))
    message.parameters["attempt"].int64_param = 2
    assert raw_status(pair, "right", message.SerializeToString(), "left") == ("DATA_LOSS", "checksum")


def test_a_value_without_checksum_is_refused(pair: kit.Pair) -> None:
    message = oip.write_call(pair.value(new(), kit.example()))
    del message.inputs[0].parameters["crc32"]
    assert raw_status(pair, "right", message.SerializeToString(), "left") == ("INVALID_ARGUMENT", "tensor")


# ---- duplicates, attempts, deadlines, limits ------------------------------------------------------------------------
def test_duplicate_and_late_values_are_dropped(pair: kit.Pair, right: Connection, from_left: Connection) -> None:
    x, request = kit.example(), new()
    accepted = [from_left.infer(pair.value(request, 2 * x), 5).parameters["accepted"],
                from_left.infer(pair.value(request, 3 * x), 5).parameters["accepted"]]
    np.testing.assert_allclose(right.infer(pair.call(request, x), 5).values["v2"], kit.expected(x), atol=1e-5)
    accepted.append(from_left.infer(pair.value(request, 2 * x), 5).parameters["accepted"])
    assert accepted == ["new", "duplicate", "late"]
    refused(lambda: right.infer(pair.call(request, x), 5), "ALREADY_EXISTS", "request")


def test_a_newer_attempt_replaces_the_older_one(pair: kit.Pair, right: Connection, from_left: Connection) -> None:
    x, request = kit.example(), new()
    old = right.start(pair.call(request, x, attempt=1), 10)
    _until(lambda: from_left.infer(pair.value(new(), x), 5).parameters["accepted"] == "new")  # the first is open by now
    time.sleep(0.3)
    now = right.start(pair.call(request, x, attempt=2), 10)
    refused(old.result, "ABORTED", "superseded")
    assert from_left.infer(pair.value(request, 9 * x, attempt=1), 5).parameters["accepted"] == "late"
    assert from_left.infer(pair.value(request, 2 * x, attempt=2), 5).parameters["accepted"] == "new"
    np.testing.assert_allclose(now.result().values["v2"], kit.expected(x), atol=1e-5)
    refused(lambda: right.infer(pair.call(request, x, attempt=1), 5), "ABORTED", "superseded")
    time.sleep(1)  # what was opened above without a run call


def test_a_request_ends_at_its_deadline_and_leaves_nothing(pair: kit.Pair, right: Connection, from_left: Connection) -> None:
    for _ in range(20):  # more than the queue holds
        request, start = new(), time.monotonic()
        with pytest.raises(RemoteError) as caught:
            right.infer(pair.call(request), 0.2)
        assert caught.value.status == "DEADLINE_EXCEEDED"  # said by either end, whichever notices first
        assert time.monotonic() - start < 2
        assert from_left.infer(pair.value(request, kit.example()), 5).parameters["accepted"] == "late"


def test_values_whose_run_call_never_comes_are_let_go(pair: kit.Pair, left: Connection, right: Connection, from_left: Connection) -> None:
    for _ in range(6):
        assert from_left.infer(pair.value(new(), kit.example()), 1.0).parameters["accepted"] == "new"
    refused(lambda: from_left.infer(pair.value(new(), kit.example()), 1.0), "RESOURCE_EXHAUSTED", "full")
    time.sleep(1.6)
    answer(pair, left, right, kit.example())


def test_a_full_queue_is_refused_and_recovers(pair: kit.Pair, right: Connection, from_left: Connection) -> None:
    waiting = _fill(pair, right)
    refused(lambda: right.infer(pair.call(new()), 5), "RESOURCE_EXHAUSTED", "full")
    refused(lambda: right.infer(pair.call(new(), model="segment_1", values={"v0": kit.example(), "v1": kit.example()}), 5),
            "RESOURCE_EXHAUSTED", "full")
    for request, pending in waiting.items():
        assert from_left.infer(pair.value(request, 2 * kit.example()), 5).parameters["accepted"] == "new"
        np.testing.assert_allclose(pending.result().values["v2"], kit.expected(kit.example()), atol=1e-5)


def test_a_full_peer_is_named_in_the_error(pair: kit.Pair, left: Connection, right: Connection) -> None:
    waiting = _fill(pair, right).values()
    refused(lambda: left.infer(pair.call(new()), 5), "RESOURCE_EXHAUSTED", "full", kit.RIGHT)
    for pending in waiting:
        pending.cancel()
    for pending in waiting:
        refused(pending.result, "CANCELLED")
    _until(lambda: _status(lambda: answer(pair, left, right, kit.example())) == "OK")


def _fill(pair: kit.Pair, connection: Connection) -> dict[str, Pending]:
    """As many requests as the worker lets open: two more are started, and two are refused."""
    started = {request: connection.start(pair.call(request), 30) for request in (new() for _ in range(8))}
    _until(lambda: sum(p.done() for p in started.values()) == 2)
    for pending in [p for p in started.values() if p.done()]:
        refused(pending.result, "RESOURCE_EXHAUSTED", "full")
    return {request: pending for request, pending in started.items() if not pending.done()}


def _status(call: Callable[[], Any]) -> str:
    try:
        call()
    except RemoteError as e:
        return e.status
    return "OK"


def _until(holds: Callable[[], bool], seconds: float = 40) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_a_coordinator_that_is_gone_frees_its_requests(pair: kit.Pair, left: Connection, right: Connection) -> None:
    gone = pair.connect("right")
    _fill(pair, gone)
    refused(lambda: right.infer(pair.call(new()), 5), "RESOURCE_EXHAUSTED", "full")
    gone.close()
    _until(lambda: _status(lambda: answer(pair, left, right, kit.example())) == "OK")


# ---- processes that end ---------------------------------------------------------------------------------------------
def test_sigterm_drains_and_exits_with_0(tmp_path: Path) -> None:
    with kit.Pair(tmp_path, sockets=True) as pair:
        right, from_left, x, request = pair.connect("right"), pair.connect("right", role="left"), kit.example(), new()
        assert from_left.ready(pair.hash, 5)
        waiting = right.start(pair.call(request, x), 20)
        time.sleep(0.5)
        pair.right.process.send_signal(signal.SIGTERM)
        _until(lambda: not right.ready(pair.hash, 5))
        refused(lambda: right.infer(pair.call(new()), 5), "UNAVAILABLE", "draining")
        assert from_left.infer(pair.value(request, 2 * x), 5).parameters["accepted"] == "new"
        np.testing.assert_allclose(waiting.result().values["v2"], kit.expected(x), atol=1e-5)
        assert pair.right.process.wait(40) == 0
        assert "every open request was answered" in pair.right.errors()
        refused(lambda: pair.connect("left").infer(pair.call(new(), x), 5), "UNAVAILABLE", "peer", kit.RIGHT)


def test_the_time_of_grace_ends(tmp_path: Path) -> None:
    with kit.Pair(tmp_path, "--grace", 1, sockets=True) as pair:
        right = pair.connect("right")
        waiting = right.start(pair.call(new()), 60)
        time.sleep(0.5)
        start = time.monotonic()
        assert pair.right.end() == 0
        assert time.monotonic() - start < 30
        assert "dropped" in pair.right.errors()
        with pytest.raises(RemoteError):
            waiting.result()


def test_a_killed_worker_is_an_error_at_once_and_a_stopped_one_within_two_keepalives(tmp_path: Path) -> None:
    with kit.Pair(tmp_path, sockets=True) as pair:
        left, right = pair.connect("left"), pair.connect("right")
        waiting = right.start(pair.call(new()), 60)
        time.sleep(0.5)
        start = time.monotonic()
        pair.right.process.send_signal(signal.SIGKILL)
        refused(waiting.result, "UNAVAILABLE")
        assert time.monotonic() - start < 1
        refused(lambda: left.infer(pair.call(new()), 20), "UNAVAILABLE", "peer", kit.RIGHT)
        assert left.live(5)
        pair.left.process.send_signal(signal.SIGSTOP)
        start = time.monotonic()
        refused(lambda: left.infer(pair.call(new()), 60), "UNAVAILABLE")
        assert time.monotonic() - start < 4.0
        pair.left.process.send_signal(signal.SIGCONT)
        _until(lambda: _status(lambda: left.live(5)) == "OK")


def test_a_stopped_peer_is_noticed_by_the_worker_that_sends_to_it(tmp_path: Path) -> None:
    with kit.Pair(tmp_path, sockets=True) as pair:
        left, right = pair.connect("left"), pair.connect("right")
        answer(pair, left, right, kit.example())
        pair.right.process.send_signal(signal.SIGSTOP)
        start = time.monotonic()
        refused(lambda: left.infer(pair.call(new()), 60), "UNAVAILABLE", "peer", kit.RIGHT)
        assert time.monotonic() - start < 4.0
        pair.right.process.send_signal(signal.SIGCONT)
        _until(lambda: _status(lambda: answer(pair, left, right, kit.example())) == "OK")


def test_two_workers_cannot_share_a_port(pair: kit.Pair) -> None:
    outcome = program("serve", pair.directory / "device_1", "--listen", pair.right.address, "--keys", pair.keys_folder / "right")
    assert outcome.code == 2
    assert "cannot listen" in outcome.err


# ---- folders --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("break_it", "code", "word"), [
    (lambda f: (f / "segment_1.onnx").write_bytes(b"x"), 6, "checksum"),
    (lambda f: (f / "segment_1.onnx").unlink(), 6, "cannot be read"),
    (lambda f: (f / "plan.json").write_bytes((f / "plan.json").read_bytes().replace(b'"by hand"', b'"by foot"')), 6, "not the plan"),
    (lambda f: (f / "plan.json").write_bytes(b"{"), 6, "not a plan"),
    (lambda f: (f / "manifest.json").write_bytes(b"[]"), 6, "not the manifest"),
    (lambda f: (f / "manifest.json").unlink(), 6, "manifest.json"),
    (lambda f: (f / "manifest.json").write_bytes((f / "manifest.json").read_bytes().replace(b'"device":1', b'"device":9')), 6, "device 9"),
    (lambda f: (f / "manifest.json").write_bytes((f / "manifest.json").read_bytes().replace(b'"device":1', b'"device":0')), 6, "cannot be read")])
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
        assert served.said["plans"] == {first.hash: 1, second.hash: 1}
        for plan in (first, second):
            values = {"v0": kit.example(), "v1": 2 * kit.example()}
            found = connection.infer(Call(plan.hash, new(), model="segment_1", values=values), 10)
            np.testing.assert_allclose(found.values["v2"], kit.expected(kit.example()), atol=1e-5)
        refused(lambda: connection.infer(Call("", new(), model="segment_1"), 5), "NOT_FOUND", "plan")


# ---- what a device needs --------------------------------------------------------------------------------------------
NOT_ON_A_DEVICE = ("torch", "onnx", "onnx_graphsurgeon", "onnxscript", "openvino", "cryptography", "yaml", "networkx", "scipy", "jinja2",
                   "tritonclient", "ray")


def test_a_device_needs_neither_torch_nor_onnx_nor_cryptography(pair: kit.Pair) -> None:
    body = f"""
import numpy as np, sys
from pathlib import Path
from gkp.edge.serve import ServeOptions, Serving
from gkp.edge.client import Call, Connection, message_limit
from gkp.edge.identity import read_keys
from gkp.edge.plan import read_plan
split, keys = Path({str(pair.directory)!r}), Path({str(pair.keys_folder)!r})
serving = Serving(ServeOptions([split / "device_1"], "127.0.0.1:0", keys / "right", {{}}, threads=1))
plan = read_plan(split)
connection = Connection(serving.address, "right", read_keys(keys / "coordinator"), message_limit(plan))
x = np.ones({kit.SHAPE}, np.float32)
print(connection.infer(Call(plan.hash, "r", model="segment_1", values={{"v0": x, "v1": x}}), 10).values["v2"].sum())
connection.close()
print(serving.stop(), [n for n in sys.modules if n.startswith(("gkp.converter", "gkp.pruning", "gkp.benchmarks"))])
"""
    outcome = blocked(NOT_ON_A_DEVICE, body)
    assert (outcome.code, outcome.out.split("\n")[:2]) == (0, [str(2.0 * kit.BYTES / 4), "True []"]), outcome.err


@pytest.mark.parametrize("missing", ["grpc", "google"])
def test_a_missing_package_is_said_in_words(pair: kit.Pair, missing: str) -> None:
    outcome = blocked_gkp([missing], "serve", pair.directory / "device_1", "--listen", "127.0.0.1:0", "--insecure")
    assert outcome.code == 4
    assert "gkp[edge]" in outcome.err


def test_garbage_on_the_port_does_not_end_a_worker(pair: kit.Pair) -> None:
    host, port = pair.right.address.split(":")
    for data in (b"\x16\x03\x01\x00\x05hello", b"GET / HTTP/1.1\r\n\r\n", os.urandom(500)):
        with socket.create_connection((host, int(port)), 5) as s:
            s.sendall(data)
    connection = pair.connect("right")
    assert connection.live(5)
    connection.close()


def test_a_native_library_is_not_opened_without_keys_that_vouch_for_it(pair: kit.Pair, tmp_path: Path) -> None:
    import hashlib

    import msgspec

    segments = [pair.plan.segments[0], msgspec.structs.replace(pair.plan.segments[1], file="segment_1.so")]
    digest = {"0": pair.plan.files["0"], "1": {"segment_1.so": hashlib.sha256(b"\x7fELF").hexdigest()}}
    plan, folder = msgspec.structs.replace(pair.plan, segments=segments, files=digest), tmp_path / "device_1"
    folder.mkdir()
    (folder / "segment_1.so").write_bytes(b"\x7fELF")
    (folder / "plan.json").write_bytes(msgspec.json.encode(plan))
    (folder / "manifest.json").write_bytes(msgspec.json.encode({"schema_version": 1, "device": 1, "plan": plan.hash}))
    assert "program" in gkp("serve", folder, "--listen", "127.0.0.1:0", "--insecure", expect=5).err
    gkp("serve", folder, "--listen", "127.0.0.1:0", "--keys", pair.keys_folder / "right", expect=5)  # they name another plan
    keys_module.make_keys([plan], tmp_path / "keys")
    assert "segment_1.so" in gkp("serve", folder, "--listen", "127.0.0.1:0", "--keys", tmp_path / "keys" / "right", expect=6).err
