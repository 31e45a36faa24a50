"""One worker process per device on this machine: what `--local` runs on. They listen on sockets in a folder that only this
user can enter, and talk mTLS with certificates of an authority that ends with them."""

from __future__ import annotations

import contextlib
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import msgspec

from gkp.edge.plan.schema import Plan, device_folder
from gkp.edge.wire.identity import Keys, read_keys
from gkp.edge.wire.keys import CA_KEY, make_keys
from gkp.errors import GkpError, UsageError
from gkp.types import Closing

_START_S = 120.0
_STOP_S = 12.0
_PAUSE_S = 1.0
"""Between two starts of the same worker."""
_SOCKET_PATH = 100
"""What the kernel takes is 107 bytes."""


@dataclass
class _Worker:
    command: list[str]
    log: Path
    process: subprocess.Popen[bytes]
    started: float


class LocalWorkers(Closing):
    """Starts a worker for every device of the plan in `directory` that computes something, and waits until they listen.
    threads: of each worker; by default the cores, shared out. A context manager. UsageError for a plan whose devices
    cannot be started here, GkpError with the worker's own words when one ends at once."""

    def __init__(self, directory: Path, plan: Plan, threads: int | None = None) -> None:
        self._lock, self._closed = threading.Lock(), False
        self._folder = Path(tempfile.mkdtemp(prefix="gkp-"))  # mode 0700
        if len(str(self._folder)) > _SOCKET_PATH - 16:
            shutil.rmtree(self._folder)
            raise UsageError(f"the temporary folder's path {self._folder.parent} is too long for a socket",
                             "set TMPDIR to a shorter one")
        self.addresses = {plan.devices[k].name: f"unix:{self._folder / f'{k}.sock'}" for k in plan.busy_devices}
        self._workers: dict[str, _Worker] = {}
        try:
            make_keys([plan], self._folder / "keys", days=30)
            (self._folder / "keys" / CA_KEY).unlink()  # nobody else will ever be let in
            self.keys: Keys = read_keys(self._folder / "keys" / "coordinator")
            each = threads or max(1, (os.cpu_count() or 1) // max(1, len(plan.busy_devices)))
            for k in plan.busy_devices:
                name = plan.devices[k].name
                self._workers[name] = self._start(self._command(device_folder(directory, k), name, each),
                                                  self._folder / f"{k}.log")
            for name in self._workers:
                self._await(name)
        except BaseException:
            self.close()
            raise

    def pids(self) -> dict[str, int]:
        """Process ids by device name."""
        with self._lock:
            return {name: worker.process.pid for name, worker in self._workers.items()}

    def revive(self, name: str) -> None:
        """Start the device's process again if it ended. Does not wait until it listens."""
        with self._lock:
            worker = self._workers[name]
            if self._closed or worker.process.poll() is None or time.monotonic() - worker.started < _PAUSE_S:
                return
            _forget(worker.process)
            self._workers[name] = self._start(worker.command, worker.log)

    def close(self) -> None:
        """Ends the processes, and removes the folder with its keys."""
        with self._lock:
            self._closed = True
            workers = list(self._workers.values())
        for worker in workers:
            with contextlib.suppress(ProcessLookupError):
                worker.process.send_signal(signal.SIGTERM)
                worker.process.send_signal(signal.SIGCONT)  # a stopped process would not hear of the other one
        end = time.monotonic() + _STOP_S
        try:
            for worker in workers:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    worker.process.wait(max(0.1, end - time.monotonic()))
        finally:  # also when Ctrl-C comes once more
            for worker in workers:
                worker.process.kill()
                worker.process.wait()
                _forget(worker.process)
            shutil.rmtree(self._folder, ignore_errors=True)

    def _command(self, folder: Path, name: str, threads: int) -> list[str]:
        peers = [f"--peer={other}={address}" for other, address in self.addresses.items() if other != name]
        return [sys.executable, "-m", "gkp.edge.device.child", "serve", str(folder), "--listen", self.addresses[name],
                "--keys", str(self._folder / "keys" / name), "--threads", str(threads), "--grace", "2", "--json", "-",
                *peers]

    def _start(self, command: list[str], log: Path) -> _Worker:
        with log.open("wb") as errors:
            process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors,
                                       start_new_session=True)  # Ctrl-C is for the coordinator, which then ends them
        return _Worker(command, log, process, time.monotonic())

    def _await(self, name: str) -> None:
        worker = self._workers[name]
        assert worker.process.stdout is not None
        ready, _, _ = select.select([worker.process.stdout], [], [], max(0.1, worker.started + _START_S - time.monotonic()))
        try:
            msgspec.json.decode(worker.process.stdout.readline() if ready else b"")
        except msgspec.DecodeError:
            said = " ".join(worker.log.read_text("utf-8", "replace").split())[-400:]
            raise GkpError(f"the worker of device {name} did not start: {said or 'it says nothing'}",
                           "start it by hand with gkp serve to see more") from None


def _forget(process: subprocess.Popen[bytes]) -> None:
    for stream in (process.stdin, process.stdout):
        if stream is not None:
            with contextlib.suppress(OSError):
                stream.close()
