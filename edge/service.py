"""The network's side of a worker: the Open Inference Protocol over gRPC. Who may ask what, and every check of a message,
happens here, before the worker's book is touched."""

from __future__ import annotations

import re
import socket
import threading
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from concurrent import futures
from dataclasses import replace
from typing import Any

import grpc

from gkp._version import __version__
from gkp.edge import oip
from gkp.edge.client import DEVICE_KEY, ERROR_KEY, channel_options
from gkp.edge.identity import Identity, Keys, is_local, peer_identity
from gkp.edge.oip import DATATYPES, MESSAGES, MODEL, SERVICE, Asked, Refusal, Spec, bad_tensor, read_tensors, shown
from gkp.edge.plan import COORDINATOR
from gkp.edge.served import Shard
from gkp.edge.worker import Worker
from gkp.errors import UsageError

DEADLINE_S = 30.0
"""What a request has whose client names none."""
MAX_DEADLINE_S = 600.0
_FOREVER_S = 1e9
"""gRPC says of a call without deadline that it has more than this left."""
EXTENSION = "gkp.edge/1"
_OTHERS = 16
"""Threads and calls besides the open requests: health checks, values, and requests that are being refused."""
_SEGMENT = re.compile(r"segment_([0-9]{1,6})", re.ASCII)


class Service:
    """Answers calls for a worker. secured: every peer has a certificate, and its role is checked."""

    def __init__(self, worker: Worker, secured: bool) -> None:
        self._worker, self._secured = worker, secured

    def handlers(self) -> grpc.GenericRpcHandler:
        """What a grpc.server answers its calls with."""
        answers: Mapping[str, Callable[[Any, Any], Any]] = {
            "ServerLive": self._server_live, "ServerReady": self._server_ready, "ModelReady": self._model_ready,
            "ServerMetadata": self._server_metadata, "ModelMetadata": self._model_metadata, "ModelInfer": self._infer}
        return grpc.method_handlers_generic_handler(SERVICE, {
            name: grpc.unary_unary_rpc_method_handler(_answering(name, answer)) for name, answer in answers.items()})

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


def _answering(name: str, answer: Callable[[Any, Any], Any]) -> Callable[[bytes, Any], bytes]:
    """A gRPC handler on bytes: refusals become statuses, anything unexpected INTERNAL without a word about the inside."""
    def handle(data: bytes, context: Any) -> bytes:
        try:
            made: bytes = answer(data, context).SerializeToString()
            return made
        except Refusal as e:
            refusal = e
        except Exception as e:
            refusal = Refusal("INTERNAL", "compute", f"{name} failed: {type(e).__name__}")
        trailing = [(ERROR_KEY, refusal.error)]
        if refusal.device is not None:
            trailing.append((DEVICE_KEY, str(refusal.device)))
        context.set_trailing_metadata(tuple(trailing))
        context.abort(grpc.StatusCode[refusal.status], refusal.message)
        raise AssertionError  # abort raises

    return handle


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
        self._server = grpc.server(_threads(queue + _OTHERS),
                                   handlers=[Service(worker, keys is not None).handlers()], options=options,
                                   maximum_concurrent_rpcs=2 * (queue + _OTHERS))
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
        """Calls that are under way have `grace` seconds to be answered."""
        self._server.stop(grace).wait()
