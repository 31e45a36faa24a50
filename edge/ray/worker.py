"""What runs on a node of a Ray cluster: the worker of one device, in an actor's process. Ray starts it, starts it again, and
brings it its folder and its keys; requests and activations go through the worker's own port and never through Ray."""

from __future__ import annotations

import os
import random
import socket
import tempfile
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from gkp._version import __version__
from gkp.edge.device.serve import ServeOptions, Serving
from gkp.edge.wire import identity
from gkp.edge.wire.identity import Keys
from gkp.errors import GkpError, UsageError

_GRACE_S = 2.0
_PORTS = range(20_000, 32_768)
"""Below those that Linux gives to outgoing connections, and not those of Ray's own workers: a worker that was killed finds
its port free again."""
_TRIES = 64


@dataclass(frozen=True)
class Place:
    """Where a worker is and what is there: address of its node, a port, the version of gkp."""

    host: str
    port: int
    version: str

    @property
    def address(self) -> str:
        """Host and port as gkp edge writes them."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


@dataclass(frozen=True)
class WorkerSpec:
    """What a worker serves besides its files. place: where it was first, and where the others look for it; peers: name ->
    address of the other devices of its plans; threads: of every segment, None: physical cores."""

    name: str
    place: Place
    keys: Keys
    peers: Mapping[str, str]
    threads: int | None


class RayWorker:
    """An actor. A new process of it (the first, or after a crash) serves nothing until start() is called."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._serving: Serving | None = None

    def place(self, port: int | None) -> Place:
        """This node. port: to use, None: a free one. UsageError when none is free."""
        host = _node_address()
        return Place(host, _free_port(host) if port is None else port, __version__)

    def check(self) -> bool:
        """Whether it serves. (A worker that does not answer this is stuck.)"""
        return self._serving is not None

    def start(self, spec: WorkerSpec, folders: Sequence[Mapping[str, bytes]]) -> str:
        """Serve the device's folders, one per plan: files by name. Returns "", or in words why that cannot be. What lies on
        the disk for it, keys included, is gone again when this returns."""
        with self._lock:
            if self._serving is not None:
                return ""
            if (here := _node_address()) != spec.place.host:
                return f"its node came back at {here} instead of {spec.place.host}: start gkp edge up again"
            try:
                with tempfile.TemporaryDirectory(prefix="gkp-") as folder:  # mode 0700
                    self._serving = Serving(_unpack(Path(folder), spec, folders))
            except GkpError as e:
                return f"{e.message} ({e.hint})" if e.hint else e.message
            except OSError as e:
                return f"cannot write its files: {e.strerror}"
            return ""

    def stop(self) -> bool:
        """Drain: requests that are open get an answer. Whether all did."""
        with self._lock:
            serving, self._serving = self._serving, None
        return serving is None or serving.stop()


def _unpack(root: Path, spec: WorkerSpec, folders: Sequence[Mapping[str, bytes]]) -> ServeOptions:
    keys = spec.keys
    pem = {identity.CA: keys.ca, identity.CERTIFICATE: keys.certificate, identity.KEY: keys.key}
    places = [root / "keys", *(root / f"plan_{i}" for i in range(len(folders)))]
    for place, files in zip(places, [pem, *folders], strict=True):
        place.mkdir()
        for name, data in files.items():
            with open(place / name, "xb", opener=_private) as file:
                file.write(data)
    return ServeOptions(folders=places[1:], listen=spec.place.address, keys=places[0], peers=spec.peers,
                        threads=spec.threads, grace=_GRACE_S)


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


def _node_address() -> str:
    import ray

    return str(ray.util.get_node_ip_address())


def _free_port(host: str) -> int:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    for port in random.sample(_PORTS, _TRIES):
        with suppress(OSError), socket.create_server((host, port), family=family):
            return port
    raise UsageError(f"no port is free on {host}", "give the device an address with a port in devices.yaml, and split again")
