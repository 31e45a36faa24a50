"""`gkp serve`: one device's worker as a process, from its folders to the drained end."""

from __future__ import annotations

import gc
import os
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from gkp.edge.device.server import Server
from gkp.edge.device.shard import Shard, open_shard
from gkp.edge.device.worker import QUEUE, Worker
from gkp.edge.wire.client import Connection, message_limit
from gkp.edge.wire.identity import Keys, check_address, read_keys
from gkp.edge.wire.loop import Loop
from gkp.errors import UnsafeFileError, UsageError
from gkp.interrupt import INTERRUPTED
from gkp.runtime.environment import physical_cores

GRACE_S = 10.0
_CLOSE_S = 5.0
"""After the time of grace: for connections and threads to end. What does not (a segment that computes for ever, a call into
a library) ends with the process."""


@dataclass(frozen=True)
class ServeOptions:
    """folders: of this device, one per plan; listen: "host:port" or "unix:path"; keys: folder, None: plaintext; peers:
    device name -> address, where the plan names none or another; threads: of every segment, None: physical cores; queue:
    open requests at most; grace: seconds for open requests at the end."""

    folders: Sequence[Path]
    listen: str
    keys: Path | None
    peers: Mapping[str, str]
    threads: int | None = None
    queue: int = QUEUE
    grace: float = GRACE_S


class Serving:
    """A worker that is ready, listening at `address`. plans: hash -> index of this device in it; name: of the device."""

    def __init__(self, options: ServeOptions) -> None:
        check_address(options.listen)
        keys = read_keys(options.keys) if options.keys is not None else None
        threads = options.threads or physical_cores()
        shards = [open_shard(folder, threads, keys.identity.plans if keys else None) for folder in options.folders]
        self.plans = {shard.hash: shard.device for shard in shards}
        if len(self.plans) != len(shards):
            raise UsageError("two folders are of the same plan", "one worker is one device")
        self.name = _only_name(shards, keys, options.keys)
        limit = max(message_limit(shard.plan) for shard in shards)
        self._loop = Loop("gkp-streams")
        self._connections = _connect(shards, options.peers, keys, limit, self._loop)
        self._worker = Worker(shards, self._connections, options.queue)
        self._grace = options.grace
        try:
            self._server = Server(self._worker, options.listen, keys, self._loop, options.queue, limit)
        except BaseException:
            self._close()
            raise
        self.address = self._server.address
        self._server.start()
        for connection in self._connections.values():
            connection.watch(lambda _: None)  # connect now: no request waits for a handshake
        gc.freeze()  # what stays is not looked through again, while a request waits

    def stop(self) -> bool:
        """Refuse new requests, answer the open ones, close. False when the time of grace was too short. Takes the time of
        grace and a few seconds at most, whatever peers and segments do."""
        drained = self._worker.drain(self._grace)
        self._server.stop(1.0 if drained else 0.0)
        self._close()
        return drained

    def _close(self) -> None:
        self._worker.close(_CLOSE_S)
        for connection in self._connections.values():
            connection.close()
        self._loop.close()


def _only_name(shards: Sequence[Shard], keys: Keys | None, folder: Path | None) -> str:
    names = {shard.name for shard in shards}
    if len(names) != 1:
        raise UsageError(f"the folders are of {len(names)} devices: {', '.join(sorted(names))}", "start one worker for each")
    name = names.pop()
    if keys is not None and keys.identity.worker != name:
        whose = f"device {keys.identity.worker}" if keys.identity.worker else "the coordinator"
        raise UnsafeFileError(f"the keys in {folder} are of {whose}, the model's folder is of device {name}",
                              f"give the folder of {name} that gkp edge keys wrote")
    return name


def _connect(shards: Sequence[Shard], peers: Mapping[str, str], keys: Keys | None, limit: int,
             loop: Loop) -> dict[str, Connection]:
    """Connections to all devices that a shard sends to. The addresses are the owner's (options, plan), never a message's."""
    known = {d.name: d.address for shard in shards for d in shard.plan.devices}
    if strange := next((name for name in peers if name not in known), None):
        raise UsageError(f"--peer {strange}: the plan has no such device", f"its devices: {', '.join(known)}")
    wanted = {name: peers.get(name) or known[name] for shard in shards for name in shard.peers.values()}
    for name, address in wanted.items():
        if address is None:
            raise UsageError(f"the plan has no address of device {name}", f"--peer {name}=HOST:PORT")
    plans = {name: [shard.hash for shard in shards if name in shard.peers.values()] for name in wanted}
    return {name: Connection(address, name, keys, limit, plans[name], loop) for name, address in wanted.items()
            if address is not None}


def serve(options: ServeOptions, ready: Callable[[Serving], None]) -> bool:
    """Serve until SIGTERM or SIGINT, then drain; a second signal, or a thread that fails, ends the process at once. Until it
    listens, signals are the caller's. ready: called when it listens. Returns whether every open request was answered. Errors
    of open_shard, read_keys, Server."""
    came: list[int] = []

    def on_signal(signum: int, frame: FrameType | None) -> None:
        if came:
            os._exit(INTERRUPTED)
        came.append(signum)

    def on_error(found: threading.ExceptHookArgs) -> None:
        threading.__excepthook__(found)
        os._exit(1)  # without that thread nothing is answered: who watches this process starts it again

    threading.excepthook, hook = on_error, threading.excepthook
    before: dict[int, Any] = {}
    try:
        serving = Serving(options)
        try:
            before = {s: signal.signal(s, on_signal) for s in (signal.SIGTERM, signal.SIGINT)}
            with _signals() as arrived:
                ready(serving)
                while not came:
                    os.read(arrived, 1)
        finally:
            drained = _stopped(serving, options.grace)
        return drained
    finally:
        threading.excepthook = hook
        for signum, handler in before.items():
            signal.signal(signum, handler)


@contextmanager
def _signals() -> Iterator[int]:
    """A descriptor that holds a byte for every signal. Not an Event, which can miss one for ever: the system may give a
    signal to another thread, and then nothing wakes the main one, where handlers run; and when wait() is just being
    entered it holds the lock that set() in the handler wants."""
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    before = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    try:
        yield reading
    finally:
        signal.set_wakeup_fd(before)
        os.close(reading)
        os.close(writing)


def _stopped(serving: Serving, grace: float) -> bool:
    """serving.stop(). Should it not end, the process does."""
    late = threading.Timer(grace + 2 * _CLOSE_S, os._exit, (1,))
    late.daemon = True
    late.start()
    try:
        return serving.stop()
    finally:
        late.cancel()


def parse_peers(values: Sequence[str]) -> dict[str, str]:
    """["NAME=HOST:PORT", ...] -> {name: address}. UsageError when malformed."""
    found: dict[str, str] = {}
    for text in values:
        name, equals, address = text.partition("=")
        if not name or not equals:
            raise UsageError(f"--peer {text[:80]!r} is not NAME=HOST:PORT", "e.g. --peer kitchen=192.0.2.20:7000")
        found[name] = check_address(address)
    return found


def check_keys_given(keys: Path | None, insecure: bool) -> None:
    """UsageError unless exactly one of --keys and --insecure was given: plaintext is never what one gets by leaving
    something out."""
    if (keys is None) != insecure:
        raise UsageError("give the keys of this device, or --insecure on this machine only" if keys is None
                         else "--keys and --insecure exclude each other", "gkp edge keys DIR -o keys makes them")

