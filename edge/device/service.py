"""The front door of a worker: the Open Inference Protocol over gRPC, for health, metadata, whole requests and single
segments by any client of it. (Coordinators and devices talk over streams: gkp.edge.device.data_plane.) Who may ask what, and
every check of a message, happens here, before the worker's book is touched.

A call holds a thread from its headers on, while its message arrives. Every peer has a share of these threads, and there are
as many as all shares together: calls that are begun and never finished keep nobody else out."""

from __future__ import annotations

import re
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import grpc

from gkp._version import __version__
from gkp.edge.device.shard import Shard
from gkp.edge.device.worker import Worker
from gkp.edge.wire import oip
from gkp.edge.wire.identity import Identity, peer_identity
from gkp.edge.wire.oip import (
    DATATYPES,
    DEVICE_KEY,
    ERROR_KEY,
    MESSAGES,
    MODEL,
    SERVICE,
    Asked,
    Refusal,
    Spec,
    bad_tensor,
    read_tensors,
    shown,
)

DEADLINE_S = 30.0
"""What a request has whose client names none."""
MAX_DEADLINE_S = 600.0
_FOREVER_S = 1e9
"""gRPC says of a call without deadline that it has more than this left."""
EXTENSION = "gkp.edge/1"
OTHERS = 16
"""Calls at once of the coordinator besides its open requests (health checks, and requests that are being refused), and of
all certificates together that take no part in the plans."""
_SEGMENT = re.compile(r"segment_([0-9]{1,6})", re.ASCII)


class _Share:
    """How many calls a peer may have at once."""

    def __init__(self, most: int) -> None:
        self.most, self._left = most, threading.Semaphore(most)

    @contextmanager
    def taken(self) -> Iterator[None]:
        """Within it there is one more. Refusal when there are too many."""
        if not self._left.acquire(blocking=False):
            raise Refusal("RESOURCE_EXHAUSTED", "full", f"{self.most} calls of yours are under way already")
        try:
            yield
        finally:
            self._left.release()


class Service:
    """Answers calls for a worker. secured: every peer has a certificate, and its role is checked; queue: requests that the
    coordinator may have open."""

    def __init__(self, worker: Worker, secured: bool, queue: int) -> None:
        self._worker, self._secured = worker, secured
        self._coordinator, self._others = _Share(queue + OTHERS), _Share(OTHERS)

    @property
    def most_calls(self) -> int:
        """All shares together: threads that are enough for them."""
        return self._coordinator.most + self._others.most

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
                with self._share(context).taken():
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

    def _share(self, context: Any) -> _Share:
        """The calls that count together with this one, by what the peer's certificate says."""
        who = peer_identity(context.auth_context()) if self._secured else None
        own = who is not None and who.worker is None and bool(who.plans & set(self._worker.shards))
        return self._coordinator if own or not self._secured else self._others

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
        if who is not None:
            _check_role(who, shard)
        left = context.time_remaining()
        deadline = time.monotonic() + (DEADLINE_S if left is None or left > _FOREVER_S else min(left, MAX_DEADLINE_S))
        if index is not None:
            return self._segment(asked, shard, index, deadline)
        return self._run(asked, shard, deadline, context)

    def _run(self, asked: Asked, shard: Shard, deadline: float, context: Any) -> Any:
        if not set(asked.wanted) <= ({shard.answer.name} if shard.answer else set()):
            raise bad_tensor("this device does not make the outputs that were asked for")
        values = read_tensors(asked, shard.entering)
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
        feeds = read_tensors(asked, inputs)
        asked = replace(asked, plan=shard.hash, request=asked.request or uuid.uuid4().hex)
        made, ms = self._worker.compute(shard, index, feeds, deadline)
        named = {spec.name: array for spec, array in zip(outputs, made, strict=True)}
        return oip.write_reply(asked, {n: named[n] for n in asked.wanted or named}, {"compute_ms": ms})

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


def _check_role(who: Identity, shard: Shard) -> None:
    """Refusal unless the certificate is the coordinator's, for this plan."""
    if shard.hash not in who.plans:
        raise _denied("the certificate does not name this plan")
    if who.worker is not None:
        raise _denied("the certificate is a worker's, which may not act as coordinator")


def _denied(text: str) -> Refusal:
    return Refusal("PERMISSION_DENIED", "role", text)


def _only(messages: Iterator[bytes]) -> bytes:
    """The call's message. It is read when its peer is known."""
    data = next(messages, None)
    if data is None:
        raise bad_tensor("the call has no message")
    return data
