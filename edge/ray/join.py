"""The way into a Ray cluster. Whoever may talk to Ray may run programs on every node of it, so only a cluster that asks for
a token is joined; whether it does is tried out: a call without one must be refused.

Ray's own documentation on token authentication: https://docs.ray.io/en/latest/ray-security/token-auth.html
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import signal
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from gkp.edge.wire.identity import check_address, require_grpc
from gkp.errors import BackendMissingError, FileError, UsageError
from gkp.require import require

MODE, TOKEN, TOKEN_PATH = "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"
_DEFAULT_TOKEN = Path(".ray") / "auth_token"
_OLDEST = (2, 52)
_PROBE = "/ray.rpc.NodeInfoGcsService/GetAllNodeInfo"
"""Lists the nodes. Nobody without the token may do that."""
_PROBE_S = 10.0
_MAX_TOKEN = 64 << 10


@contextlib.contextmanager
def joined(address: str) -> Iterator[Any]:
    """The module ray, connected to the cluster at "HOST:PORT" until the end of the context. UsageError when the cluster
    has no token authentication or the token is not right, BackendMissingError when Ray is missing, is another version than
    the cluster's, or no cluster answers."""
    ray = import_ray()
    check_authentication(address)
    before = signal.getsignal(signal.SIGTERM)
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):  # where Ray tells of nodes that come and go
        try:
            ray.init(address=address, log_to_driver=False, configure_logging=False, logging_level=logging.ERROR)
        except (Exception, SystemExit) as e:  # Ray raises its own, and ends the process when it waited too long
            raise _not_joined(address, e) from e
        try:
            signal.signal(signal.SIGTERM, before)  # Ray has put its own there
            yield ray
        finally:
            ray.shutdown()


def import_ray() -> Any:
    """The module. BackendMissingError when Ray is not installed or too old to ask for a token."""
    os.environ[MODE] = "token"  # the one way to tell Ray, which reads it when it is imported
    ray = require("ray", "ray", note="on every node")
    if tuple(int(n) for n in ray.__version__.split(".")[:2] if n.isdigit()) < _OLDEST:
        raise BackendMissingError(f"Ray {ray.__version__} has no token authentication",
                                  f'pip install "ray>={_OLDEST[0]}.{_OLDEST[1]}", on every node')
    return ray


# ---- the token ------------------------------------------------------------------------------------------------------
def check_authentication(address: str) -> None:
    """Errors of joined(). Nothing but a refusal of the call without a token counts as a guarded cluster."""
    if address.startswith("unix:"):
        raise UsageError("a Ray cluster has an address with a port", "e.g. --ray 192.0.2.20:6379, as ray start --head says")
    check_address(address)
    require_grpc()
    without = _probe(address, None)
    if without == "OK":
        raise UsageError(f"the Ray cluster at {address} lets everybody in: it runs without token authentication",
                         f"ray get-auth-token --generate, the same token on every node, and {MODE}=token ray start ...")
    if without in ("UNAVAILABLE", "DEADLINE_EXCEEDED"):
        raise BackendMissingError(f"no Ray cluster answers at {address}",
                                  "ray start --head says the address; with TLS set RAY_USE_TLS=1 here, too")
    if without != "UNAUTHENTICATED":
        raise UsageError(f"what answers at {address} is no Ray cluster that asks for a token ({without})",
                         "give the address that ray start --head says")
    token = find_token(os.environ, Path.home())
    if token is None:
        raise UsageError(f"the Ray cluster at {address} asks for a token, and there is none here",
                         f"copy ~/.ray/auth_token of the head node here, or set {TOKEN_PATH}=FILE")
    if (found := _probe(address, token)) != "OK":
        raise UsageError(f"the Ray cluster at {address} does not accept the token ({found})",
                         f"it must be the same on all nodes: {TOKEN}, {TOKEN_PATH} or ~/.ray/auth_token")


def find_token(environment: Mapping[str, str], home: Path) -> str | None:
    """Where Ray looks for it, in its order. FileError when the file that is named cannot be read."""
    if environment.get(TOKEN):
        return environment[TOKEN].strip()
    named = environment.get(TOKEN_PATH)
    path = Path(named) if named else home / _DEFAULT_TOKEN
    try:
        with path.open("rb") as file:
            token = file.read(_MAX_TOKEN).decode("ascii").strip()
    except (OSError, UnicodeDecodeError) as e:
        if named:
            raise FileError(f"{path} ({TOKEN_PATH}) cannot be read", "it holds the cluster's token") from e
        return None
    return token or None


def _probe(address: str, token: str | None) -> str:
    """The status of the answer of the cluster's control service."""
    import grpc

    metadata = [("authorization", f"Bearer {token}")] if token else []
    with _channel(address) as channel:
        try:
            channel.unary_unary(_PROBE)(b"", timeout=_PROBE_S, metadata=metadata)
        except grpc.RpcError as e:
            return str(e.code().name)
        except ValueError:  # what gRPC says of characters that cannot be in a header
            return "not a token"
    return "OK"


def _channel(address: str) -> Any:
    """A channel like Ray's own: with TLS when its variables say so."""
    import grpc

    if not encrypted():
        return grpc.insecure_channel(address)
    try:
        ca, key, certificate = (Path(os.environ[f"RAY_TLS_{name}"]).read_bytes()
                                for name in ("CA_CERT", "SERVER_KEY", "SERVER_CERT"))
    except (KeyError, OSError) as e:
        raise FileError(f"RAY_USE_TLS is set, and a file of it is missing: {e}",
                        "set RAY_TLS_CA_CERT, RAY_TLS_SERVER_CERT and RAY_TLS_SERVER_KEY") from e
    return grpc.secure_channel(address, grpc.ssl_channel_credentials(ca, key, certificate))


def encrypted() -> bool:
    """Does Ray use TLS, by its variables?"""
    return os.environ.get("RAY_USE_TLS", "0").lower() in ("1", "true")


def _not_joined(address: str, error: BaseException) -> BackendMissingError:
    said = " ".join(str(error).split())
    versions = re.findall(r"Ray: (\S+) Python: (\S+)", said)
    if len(versions) == 2:
        (their_ray, their_python), (our_ray, our_python) = versions
        return BackendMissingError(f"the Ray cluster at {address} runs Ray {their_ray} on Python {their_python}, here is "
                                   f"Ray {our_ray} on Python {our_python}",
                                   "all nodes need the same Ray and Python 3.x; gkp serve under systemd does not")
    return BackendMissingError(f"cannot join the Ray cluster at {address}: {said[:200]}",
                               "this machine must be a node of it: ray start --address=... here first")
