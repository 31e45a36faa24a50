"""Workers as real processes on loopback: whole requests, stock clients, refused handshakes, roles."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import worker_kit as kit
from cli_kit import gkp, program
from oip_kit import Call, Front, credentials, write_call
from service_kit import answer, new, raw_answer, refused

from gkp.edge.wire import keys as keys_module
from gkp.edge.wire import oip
from gkp.edge.wire.client import Connection
from gkp.edge.wire.identity import Keys, read_keys

triton = pytest.importorskip("tritonclient.grpc")


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


def test_what_is_quantised_travels_as_integers_between_devices(tmp_path: Path) -> None:
    with kit.Pair(tmp_path, wire="int8", sockets=True) as pair:
        left, right, request = pair.connect("left"), pair.connect("right"), new()
        x = np.rint(kit.example() * 4).astype(np.float32) / 8  # twice that is on the grid
        first, second = left.start(pair.call(request, x), 10), right.start(pair.call(request, x), 10)
        assert first.result().parameters["sent_bytes"] == kit.BYTES // 4
        np.testing.assert_allclose(second.result().values["v2"], kit.expected(x), atol=1e-6)
        request, large = new(), np.full(kit.SHAPE, 3e38, np.float32)  # twice that is infinity
        refused(lambda: left.infer(pair.call(request, large), 10), "INVALID_ARGUMENT", "not-finite", kit.LEFT)


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
    message = write_call(Call("", "", model="segment_0", values={"v0": x}))
    del message.raw_input_contents[:]
    message.inputs[0].contents.fp32_contents.extend(x.ravel().tolist())
    del message.inputs[0].parameters["crc32"]
    reply = oip.MESSAGES["ModelInferResponse"].FromString(raw_answer(pair, "left", message.SerializeToString()))
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
    name, good = "right.worker.gkp", credentials(pair.keys_folder / "coordinator")
    keys_module.make_keys([pair.plan], tmp_path / "strangers")
    strangers = credentials(tmp_path / "strangers" / "coordinator")
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
    expired = credentials(copy / "coordinator")
    assert _handshake(pair.right.address, "right.worker.gkp", **expired) is grpc.StatusCode.UNAVAILABLE
    outcome = program("serve", pair.directory / "device_1", "--listen", "127.0.0.1:0", "--keys", copy / "right")
    assert outcome.code == 6
    assert "expired" in outcome.err


def test_a_connection_insists_on_the_device_it_is_for(pair: kit.Pair) -> None:
    connection = pair.connect("left", name="right")
    error = refused(lambda: connection.ready(pair.hash, 5), "UNAVAILABLE")
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
    found = _handshake(f"127.0.0.1:{port}", "right.worker.gkp", **credentials(pair.keys_folder / "left"))
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
        np.testing.assert_allclose(answer(pair, *connections, kit.example(3)), kit.expected(kit.example(3)), atol=1e-5)  # type: ignore[call-arg]


# ---- roles ----------------------------------------------------------------------------------------------------------
def test_a_worker_cannot_act_as_coordinator(pair: kit.Pair, from_left: Connection) -> None:
    refused(lambda: from_left.infer(pair.call(new()), 5), "PERMISSION_DENIED", "role")
    values = {"v0": kit.example(), "v1": kit.example()}
    with pair.front("right", "left") as front:
        for model in ("segment_1", "gkp"):
            refused(lambda m=model: front.infer(Call(pair.hash, new(), values=values, model=m), 5), "PERMISSION_DENIED", "role")  # type: ignore[misc]


def test_a_coordinator_cannot_act_as_a_worker(pair: kit.Pair, right: Connection) -> None:
    refused(lambda: right.infer(pair.value(new(), kit.example()), 5), "PERMISSION_DENIED", "role")


def test_a_worker_sends_only_its_own_values_and_only_along_the_plan(pair: kit.Pair, from_left: Connection) -> None:
    x = kit.example()
    for changes in ({"source": kit.RIGHT}, {"source": 7}, {"source": -2}, {"values": {"v0": x}}, {"values": {"v2": x}}):
        refused(lambda c=changes: from_left.infer(pair.value(new(), x, **c), 5), "PERMISSION_DENIED", "role")  # type: ignore[misc]
    to_left = pair.connect("left", role="right")
    refused(lambda: to_left.infer(pair.value(new(), x, source=kit.RIGHT), 5), "PERMISSION_DENIED", "role")
    to_left.close()


def test_a_certificate_for_another_plan_is_refused(pair: kit.Pair, tmp_path: Path) -> None:
    import shutil

    copy = tmp_path / "keys"
    shutil.copytree(pair.keys_folder, copy)
    other = kit.write_split(tmp_path / "other", note="another")
    keys_module.make_keys([other], copy)
    connection = Connection(pair.right.address, "right", read_keys(copy / "coordinator"), pair.limit)
    refused(lambda: connection.infer(pair.call(new()), 5), "PERMISSION_DENIED", "role")
    connection.close()
    with Front(pair.right.address, "right", copy / "coordinator") as front:
        refused(lambda: front.infer(Call(pair.hash, new(), values={"v0": kit.example()}), 5), "PERMISSION_DENIED", "role")
    outcome = program("serve", pair.directory / "device_1", "--listen", "127.0.0.1:0", "--keys", copy / "right")
    assert outcome.code == 5
    assert "certificate" in outcome.err


def test_a_certificate_without_a_role_may_do_nothing(pair: kit.Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    authority = keys_module._open_authority(pair.keys_folder)
    from gkp.edge.wire import identity

    monkeypatch.setattr(identity, "uris", lambda who: [])
    certificate, key = keys_module.issue(authority, identity.Identity("x", frozenset()), ["localhost"], 1)
    good = read_keys(pair.keys_folder / "coordinator")
    connection = Connection(pair.right.address, "right", Keys(good.identity, good.ca, certificate, key), pair.limit)
    refused(lambda: connection.infer(pair.call(new()), 5), "PERMISSION_DENIED", "role")
    connection.close()


