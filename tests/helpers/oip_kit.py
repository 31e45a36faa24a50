"""A client of the Open Inference Protocol that is written from its messages, for what stock clients do not send."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import grpc
import numpy as np

from gkp.edge.wire import oip
from gkp.edge.wire.client import RemoteError, Reply
from gkp.edge.wire.oip import DATATYPES, DEVICE_KEY, ERROR_KEY, MESSAGES, MODEL, SERVICE

INFER = f"/{SERVICE}/ModelInfer"


@dataclass(frozen=True)
class Call:
    """A ModelInfer request, as the coordinator's."""

    plan: str
    request: str
    attempt: int = 1
    values: Mapping[str, Any] = field(default_factory=dict)
    wanted: tuple[str, ...] = ()
    profile: bool = False
    model: str = MODEL


def write_call(call: Call) -> Any:
    """The ModelInferRequest."""
    made = MESSAGES["ModelInferRequest"](model_name=call.model, model_version=call.plan, id=call.request)
    made.parameters["attempt"].int64_param = call.attempt
    if call.profile:
        made.parameters["profile"].bool_param = True
    for name in call.wanted:
        made.outputs.add(name=name)
    for name, value in call.values.items():
        datatype = DATATYPES[value.dtype.name]
        raw = np.ascontiguousarray(value, value.dtype.newbyteorder("<")).tobytes()
        tensor = made.inputs.add(name=name, datatype=datatype, shape=value.shape)
        tensor.parameters["crc32"].int64_param = oip.checksum(raw, call.plan, call.request, call.attempt, name, datatype, value.shape)
        made.raw_input_contents.append(raw)
    return made


def read_reply(call: Call, reply: Any) -> Reply:
    """Asserts that its tensors are what their checksums say."""
    assert (reply.model_name, reply.model_version, reply.id) == (call.model, call.plan, call.request)
    values = {}
    for tensor, raw in zip(reply.outputs, reply.raw_output_contents, strict=True):
        said = oip.checksum(raw, call.plan, call.request, call.attempt, tensor.name, tensor.datatype, tensor.shape)
        assert tensor.parameters["crc32"].int64_param == said
        dtype = next(ours for ours, theirs in DATATYPES.items() if theirs == tensor.datatype)
        values[tensor.name] = np.frombuffer(raw, np.dtype(dtype).newbyteorder("<")).reshape(tuple(tensor.shape))
    parameters = {name: getattr(p, p.WhichOneof("parameter_choice")) for name, p in reply.parameters.items()}
    return Reply(values, parameters)


def credentials(folder: Path) -> dict[str, bytes]:
    """root_certificates, private_key and certificate_chain of a role's folder, as gRPC calls them; nothing is checked."""
    return {"root_certificates": (folder / "ca.pem").read_bytes(), "private_key": (folder / "key.pem").read_bytes(),
            "certificate_chain": (folder / "cert.pem").read_bytes()}


class Front:
    """The front door of the device `name`. keys: folder of a role, None: plaintext."""

    def __init__(self, address: str, name: str, keys: Path | None, **options: Any) -> None:
        said = [("grpc.ssl_target_name_override", f"{name}.worker.gkp"), ("grpc.use_local_subchannel_pool", 1),
                ("grpc.max_send_message_length", -1)]
        self.channel = grpc.insecure_channel(address, said[1:]) if keys is None else grpc.secure_channel(
            address, grpc.ssl_channel_credentials(**{**credentials(keys), **options}), said)

    def live(self, timeout: float) -> bool:
        return bool(self._ask("ServerLive", timeout).live)

    def ready(self, plan: str, timeout: float) -> bool:
        return bool(self._ask("ModelReady", timeout, name=MODEL, version=plan).ready)

    def infer(self, call: Call, timeout: float) -> Reply:
        return read_reply(call, self._answer("ModelInfer", write_call(call), timeout))

    def _ask(self, method: str, timeout: float, **fields: str) -> Any:
        return self._answer(method, MESSAGES[f"{method}Request"](**fields), timeout)

    def _answer(self, method: str, message: Any, timeout: float) -> Any:
        call = self.channel.unary_unary(f"/{SERVICE}/{method}", MESSAGES[f"{method}Request"].SerializeToString,
                                        MESSAGES[f"{method}Response"].FromString)
        try:
            return call(message, timeout=timeout)
        except grpc.RpcError as e:
            said = dict(e.trailing_metadata() or ())
            device = said.get(DEVICE_KEY)
            raise RemoteError(e.code().name, str(said.get(ERROR_KEY, "")), None if device is None else int(device), str(e.details())) from None

    def close(self) -> None:
        self.channel.close()

    def __enter__(self) -> Front:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()
