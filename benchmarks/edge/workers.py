"""Worker processes of the suite: one per device, serving every plan of a case, each pinned to a core, with mTLS."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec

from gkp.benchmarks.edge.net import Net
from gkp.benchmarks.edge.quota import Quota
from gkp.edge.plan.schema import Plan, device_folder
from gkp.edge.wire.keys import make_keys
from gkp.errors import GkpError
from gkp.types import Closing

_START_S = 180.0
_STOP_S = 10.0


class Workers(Closing):
    """Started and listening. folders: of the split models, whose devices have the same names. cores: device k runs on
    cores[k % len(cores)]; quotas: device k's, none when empty. cluster_files: folder -> its cluster.yaml. A context
    manager; GkpError with a worker's own words when it does not start."""

    def __init__(self, folders: Mapping[Path, Plan], net: Net, cores: Sequence[int], work: Path,
                 quotas: Sequence[Quota] = ()) -> None:
        self._net, self._cores, self._quotas, self._work = net, cores, quotas, work
        self._processes: dict[int, subprocess.Popen[bytes]] = {}
        plans = list(folders.values())
        names = [device.name for device in max(plans, key=lambda p: len(p.devices)).devices]
        self._addresses = {name: net.workers[k].address for k, name in enumerate(names)}
        try:
            make_keys(plans, work / "keys", days=2)
            for k, name in enumerate(names):
                mine = [device_folder(folder, k) for folder, plan in folders.items()
                        if any(s.device == k for s in plan.segments)]
                if mine:
                    self._processes[k] = self._start(k, name, mine, folders)
            for k in self._processes:
                self._await(k)
        except BaseException:
            self.close()
            raise
        self.cluster_files = {folder: self._cluster_file(number, plan)
                              for number, (folder, plan) in enumerate(folders.items())}

    @property
    def pids(self) -> dict[int, int]:
        """By device."""
        return {k: process.pid for k, process in self._processes.items()}

    def addresses(self) -> list[str]:
        """Of the workers there are."""
        return [self._net.workers[k].address for k in self._processes]

    def _start(self, k: int, name: str, mine: Sequence[Path], folders: Mapping[Path, Plan]) -> subprocess.Popen[bytes]:
        known = set.intersection(*({d.name for d in plan.devices} for plan in folders.values()))
        wanted = {plan.devices[t.target].name for plan in folders.values() for t in plan.transfers
                  if t.source == k and t.target >= 0}
        peers = [f"--peer={other}={address}" for other, address in self._addresses.items()
                 if other != name and (other in wanted or other in known)]
        words = [*self._net.workers[k].prefix, sys.executable, "-m", "gkp.edge.device.child", "serve", *map(str, mine),
                 "--listen", self._net.workers[k].address, "--keys", str(self._work / "keys" / name), "--threads", "1",
                 "--queue", "64", "--grace", "1", "--json", "-", *peers]
        with (self._work / f"worker_{k}.log").open("wb") as errors:
            process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors,
                                       start_new_session=True)
        with contextlib.suppress(OSError):
            os.sched_setaffinity(process.pid, {self._cores[k % len(self._cores)]})  # before it has threads
        if self._quotas:
            self._quotas[k].add(process.pid)
        return process

    def _await(self, k: int) -> None:
        process, end = self._processes[k], time.monotonic() + _START_S
        assert process.stdout is not None
        ready, _, _ = select.select([process.stdout], [], [], max(0.1, end - time.monotonic()))
        try:
            msgspec.json.decode(process.stdout.readline() if ready else b"")
        except msgspec.DecodeError:
            said = " ".join((self._work / f"worker_{k}.log").read_text("utf-8", "replace").split())[-300:]
            raise GkpError(f"worker {k} did not start: {said or 'it says nothing'}", "run with -v") from None

    def _cluster_file(self, number: int, plan: Plan) -> Path:
        lines = [f"keys: {self._work / 'keys' / 'coordinator'}", "devices:"]
        lines += [f"  {name}: {msgspec.json.encode(address).decode()}" for name, address in self._addresses.items()
                  if name in {d.name for d in plan.devices}]
        path = self._work / f"cluster_{number}.yaml"
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
        return path

    def close(self) -> None:
        """Ends them; none is left."""
        for process in self._processes.values():
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(signal.SIGTERM)
        end = time.monotonic() + _STOP_S
        for process in self._processes.values():
            try:
                process.wait(max(0.1, end - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            for stream in (process.stdin, process.stdout):
                if stream is not None:
                    with contextlib.suppress(OSError):
                        stream.close()
