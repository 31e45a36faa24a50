"""The network's side of a worker: the Open Inference Protocol over gRPC. Who may ask what, and every check of a message,
happens here, before the worker's book is touched.

A call holds a thread from its headers on, while its message arrives. Every peer has a share of these threads, and there are
as many as all shares together: calls that are begun and never finished keep nobody else out."""

from __future__ import annotations

import re
import socket
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent import futures
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import grpc

from gkp._version import __version__
from gkp.edge.device.shard import Shard
from gkp.edge.device.worker import Worker
from gkp.edge.plan.schema import COORDINATOR
from gkp.edge.wire import oip
from gkp.edge.wire.client import DEVICE_KEY, ERROR_KEY, channel_options
from gkp.edge.wire.identity import Identity, Keys, is_local, peer_identity
from gkp.edge.wire.oip import DATATYPES, MESSAGES, MODEL, SERVICE, Asked, Refusal, Spec, bad_tensor, read_tensors, shown
from gkp.errors import UsageError

DEADLINE_S = 30.0
"""What a request has whose client names none."""
MAX_DEADLINE_S = 600.0
_FOREVER_S = 1e9
"""gRPC says of a call without deadline that it has more than this left."""
EXTENSION = "gkp.edge/1"
_OTHERS = 16
"""Calls at once of the coordinator besides its open requests (health checks, and requests that are being refused), and of
all certificates together that take no part in the plans."""
_SENDER = 32
"""Calls at once of a device that sends values here."""
_IN_TRANSIT = 4
"""Calls that wait for a thread, which refuses them or reads their message: so many times the threads."""
_SEGMENT = re.compile(r"segment_([0-9]{1,6})", re.ASCII)


class Service:
    """Answers calls for a worker. secured: every peer has a certificate, and its role is checked; queue: requests that the
    coordinator may have open."""

    def __init__(self, worker: Worker, secured: bool, queue: int) -> None:
        self._worker, self._secured = worker, secured
        senders = {shard.plan.devices[k].name for shard in worker.shards.values() for k, _ in shard.arriving}
        self._shares = {"coordinator": queue + _OTHERS, "other": _OTHERS, **{f"worker {name}": _SENDER for name in senders}}
        self._calls, self._lock = Counter[str](), threading.Lock()

    @property
    def most_calls(self) -> int:
        """All shares together: threads that are enough for them."""
        return sum(self._shares.values())

    def handlers(self) -> grpc.GenericRpcHandler:
        """What a grpc.server answers its calls with."""
        answers: Mapping[str, Callable[[Any, Any], Any]] = {
            "ServerLive": self._server_live, "ServerReady": self._server_ready, "ModelReady": self._model_ready,
            "ServerMetadata": self._server_metadata, "ModelMetadata": self._model_metadata, "ModelInfer": self._infer}
        return grpc.method_handlers_generic_handler(SERVICE, {  # not unary_unary: that would wait for the message first
            name: grpc.stream_unary_rpc_method_handler(self._answering(name, answer)) for name, answer in answers.items()})

    def _answering(self, name: str, answer: Callable[[Any, Any], Any]) -> Callable[[Iterator[bytes], Any], bytes]:
        """A gRPC handler on bytes: refusals become statuses, anything unexpected INTERNAL without a word about what."""
        def handle(messages: Iterator[bytes], context: Any) -> bytes:
            try:
                with self._share(context):
                    made: bytes = answer(_only(messages), context).SerializeToString()
                return made
            except Refusal as e:
                refusal = e.with_traceback(None)  # else it would keep the call, and with it a stream of the connection
            except Exception as e:
                refusal = Refusal("INTERNAL", "compute", f"{name} failed: {type(e).__name__}")
            trailing = [(ERROR_KEY, refusal.error)]
            if refusal.device is not None:
                trailing.append((DEVICE_KEY, str(refusal.device)))
            context.set_trailing_metadata(tuple(trailing))
            context.abort(grpc.StatusCode[refusal.status], refusal.message)
            raise AssertionError  # abort raises

        return handle

    @contextmanager
    def _share(self, context: Any) -> Iterator[None]:
        """Within it the call counts as one of its peer's. Refusal when that has too many."""
        peer, most = self._peer(context)
        with self._lock:
            if self._calls[peer] >= most:
                raise Refusal("RESOURCE_EXHAUSTED", "full", f"{most} calls of yours are under way already")
            self._calls[peer] += 1
        try:
            yield
        finally:
            with self._lock:
                self._calls[peer] -= 1
                if not self._calls[peer]:
                    del self._calls[peer]

    def _peer(self, context: Any) -> tuple[str, int]:
        """Who calls, and how many calls it may have at once. By what its certificate says; on a plaintext connection by the
        connection, which may be anybody's."""
        if not self._secured:
            return str(context.peer()), self._shares["coordinator"]
        who, peer = peer_identity(context.auth_context()), "other"
        if who is not None and who.plans & set(self._worker.shards):
            peer = "coordinator" if who.worker is None else f"worker {who.worker}"
        return (peer, self._shares[peer]) if peer in self._shares else ("other", self._shares["other"])

    # ---- health and metadata --------------------------------------------------------------------------------------
    def _server_live(self, data: bytes, context: Any) -> Any:
        return MESSAGES["ServerLiveResponse"](live=True)

    def _server_ready(self, data: bytes, context: Any) -> Any:
        return MESSAGES["ServerReadyResponse"](ready=self._worker.ready)

    def _model_ready(self, data: bytes, context: Any) -> Any:
        asked = oip.parse("ModelReadyRequest", data)
        try:
            self._served(asked.name, asked.version)
        except Refusal:
            return MESSAGES["ModelReadyResponse"](ready=False)
        return MESSAGES["ModelReadyResponse"](ready=self._worker.ready)

    def _server_metadata(self, data: bytes, context: Any) -> Any:
        return MESSAGES["ServerMetadataResponse"](name="gkp", version=__version__, extensions=[EXTENSION])

    def _model_metadata(self, data: bytes, context: Any) -> Any:
        asked = oip.parse("ModelMetadataRequest", data)
        shard, index = self._served(asked.name, asked.version)
        if index is None:
            inputs, outputs = shard.entering, [shard.answer] if shard.answer else []
        else:
            inputs, outputs = _ports(shard, index)
        made = MESSAGES["ModelMetadataResponse"](name=asked.name, platform="gkp", versions=sorted(self._worker.shards))
        for side, specs in ((made.inputs, inputs), (made.outputs, outputs)):
            for spec in specs:
                side.add(name=spec.name, datatype=DATATYPES[spec.dtype], shape=spec.shape)
        return made

    # ---- inference ------------------------------------------------------------------------------------------------
    def _infer(self, data: bytes, context: Any) -> Any:
        who = peer_identity(context.auth_context()) if self._secured else None
        if self._secured and who is None:
            raise _denied("the certificate names no role")
        asked = oip.read_call(data)
        shard, index = self._served(asked.model, asked.plan)
        _check_role(who, asked, shard)
        left = context.time_remaining()
        deadline = time.monotonic() + (DEADLINE_S if left is None or left > _FOREVER_S else min(left, MAX_DEADLINE_S))
        if asked.source != COORDINATOR:
            return self._take(asked, shard, index, deadline)
        if index is not None:
            return self._segment(asked, shard, index, deadline)
        return self._run(asked, shard, deadline, context)

    def _run(self, asked: Asked, shard: Shard, deadline: float, context: Any) -> Any:
        if not set(asked.wanted) <= ({shard.answer.name} if shard.answer else set()):
            raise bad_tensor("this device does not make the outputs that were asked for")
        values = read_tensors(asked, shard.entering, must=False)
        asked = replace(asked, plan=shard.hash, request=asked.request or uuid.uuid4().hex)
        request = self._worker.begin(shard, asked.request, asked.attempt, values, deadline)
        if not context.add_callback(lambda: self._worker.cancel(request)):
            self._worker.cancel(request)
        outputs, counters = self._worker.wait(request, asked.profile)
        return oip.write_reply(asked, outputs, counters)

    def _segment(self, asked: Asked, shard: Shard, index: int, deadline: float) -> Any:
        inputs, outputs = _ports(shard, index)
        if not set(asked.wanted) <= {spec.name for spec in outputs}:
            raise bad_tensor("the segment does not make the outputs that were asked for")
        feeds = read_tensors(asked, inputs, must=False)
        asked = replace(asked, plan=shard.hash, request=asked.request or uuid.uuid4().hex)
        made, ms = self._worker.compute(shard, index, feeds, deadline)
        named = {spec.name: array for spec, array in zip(outputs, made, strict=True)}
        return oip.write_reply(asked, {n: named[n] for n in asked.wanted or named}, {"compute_ms": ms})

    def _take(self, asked: Asked, shard: Shard, index: int | None, deadline: float) -> Any:
        if index is not None or asked.wanted or not asked.plan or not asked.request:
            raise bad_tensor("a device sends a value with plan and request id, and nothing else")
        names = [tensor.name for tensor in asked.message.inputs]
        spec = shard.arriving.get((asked.source, names[0])) if len(names) == 1 else None
        if spec is None:
            what = shown(names[0]) if len(names) == 1 else f"{len(names)} values"
            raise _denied(f"the plan sends no {what} from device {asked.source} to device {shard.device}")
        array = read_tensors(asked, [spec], must=True)[spec.name]
        verdict = self._worker.take(shard, asked.request, asked.attempt, asked.source, spec.name, array, deadline)
        return oip.write_reply(asked, {}, {"accepted": verdict})

    def _served(self, model: str, version: str) -> tuple[Shard, int | None]:
        """Shard and segment that a model's name and version stand for. Version: the plan's hash; it may be left out where
        one plan is served. Refusal (NOT_FOUND) when they are not here."""
        shards = self._worker.shards
        shard = next(iter(shards.values())) if not version and len(shards) == 1 else shards.get(version)
        if shard is None:
            raise Refusal("NOT_FOUND", "plan", f"plan {shown(version)} is not served here")
        if model == MODEL:
            return shard, None
        match = _SEGMENT.fullmatch(model)
        if match is None or int(match[1]) not in shard.runners:
            raise Refusal("NOT_FOUND", "model", f"model {shown(model)} is not served here")
        return shard, int(match[1])


def _ports(shard: Shard, index: int) -> tuple[list[Spec], list[Spec]]:
    segment = shard.plan.segments[index]
    return [shard.spec(name) for name in segment.inputs], [shard.spec(name) for name in segment.outputs]


def _check_role(who: Identity | None, asked: Asked, shard: Shard) -> None:
    """Refusal unless the certificate allows what is asked. who: None on a plaintext connection from this machine."""
    devices = shard.plan.devices
    if asked.source != COORDINATOR and not 0 <= asked.source < len(devices):
        raise _denied(f"the plan has no device {asked.source}")
    if who is None:
        return
    if shard.hash not in who.plans:
        raise _denied("the certificate does not name this plan")
    role = None if asked.source == COORDINATOR else devices[asked.source].name
    if who.worker != role:
        raise _denied(f"the certificate is {'a worker' if who.worker else 'the coordinator'}'s, which may not "
                      f"{'act as coordinator' if role is None else 'send values of this device'}")


def _denied(text: str) -> Refusal:
    return Refusal("PERMISSION_DENIED", "role", text)


def _only(messages: Iterator[bytes]) -> bytes:
    """The call's message. It is read when its peer is known."""
    data = next(messages, None)
    if data is None:
        raise bad_tensor("the call has no message")
    return data


# ---- the server -----------------------------------------------------------------------------------------------------
def _threads(count: int) -> futures.ThreadPoolExecutor:
    """All started now: where memory is short, a thread that cannot start later would stop gRPC's loop for good."""
    pool = futures.ThreadPoolExecutor(count, thread_name_prefix="gkp-rpc")
    together = threading.Barrier(count + 1)
    for _ in range(count):
        pool.submit(together.wait)
    together.wait()
    return pool


def _taken(path: str) -> bool:
    """Does somebody answer on this socket? (One that a killed worker left behind is replaced by gRPC, but so would this.)"""
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            return probe.connect_ex(path) == 0
        except (OSError, ValueError):  # no path that a socket can have
            return False


class Server:
    """Listens for a worker from start() on. listen: "host:port" (0: any free port) or "unix:path"; keys: None for plaintext,
    on this machine only. UsageError when it cannot listen there."""

    def __init__(self, worker: Worker, listen: str, keys: Keys | None, queue: int, max_bytes: int) -> None:
        if keys is None and not is_local(listen):
            raise UsageError(f"without keys a worker listens on this machine only, not on {listen}",
                             "make keys with gkp edge keys, or listen on 127.0.0.1")
        if listen.startswith("unix:") and _taken(listen.removeprefix("unix:")):
            raise UsageError(f"another process listens on {listen}", "end it, or choose another path")
        options: Sequence[tuple[str, Any]] = [
            *channel_options(max_bytes), ("grpc.so_reuseport", 0), ("grpc.max_concurrent_streams", queue + _OTHERS),
            ("grpc.server_handshake_timeout_ms", 10_000)]
        service = Service(worker, keys is not None, queue)
        self._server = grpc.server(_threads(service.most_calls), handlers=[service.handlers()], options=options,
                                   maximum_concurrent_rpcs=_IN_TRANSIT * service.most_calls)
        try:
            if keys is None:
                port = self._server.add_insecure_port(listen)
            else:
                credentials = grpc.ssl_server_credentials([(keys.key, keys.certificate)], keys.ca, True)
                port = self._server.add_secure_port(listen, credentials)
        except RuntimeError:
            port = 0
        if not port:
            raise UsageError(f"cannot listen on {listen}", "is it an address of this machine, and is the port free?")
        self.address = listen if listen.startswith("unix:") else f"{listen.rpartition(':')[0]}:{port}"

    def start(self) -> None:
        self._server.start()

    def stop(self, grace: float) -> None:
        """Calls that are under way have `grace` seconds to be answered, and one more to be told that they are not."""
        self._server.stop(grace).wait(grace + 1.0)
