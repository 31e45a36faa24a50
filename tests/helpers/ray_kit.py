"""A real Ray cluster on this machine, each node a process tree that is found again by the token in its environment, and
`gkp edge up` as a process."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from cli_kit import Outcome, entry_point, program
from cluster_kit import until

_IMPATIENT = {"RAY_health_check_period_ms": "500", "RAY_health_check_failure_threshold": "2", "RAY_kill_worker_timeout_milliseconds": "500"}
"""Ray waits longer before it gives up a node or process: these tests would, too."""
needs_ray = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is not installed")


@dataclass
class Node:
    """`ray start --block`. Its processes are those with `mark` in their environment."""

    process: subprocess.Popen[bytes]
    mark: str

    def kill(self) -> None:
        """As if its power failed."""
        alive = processes(self.mark)
        while alive:
            for pid in alive:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            self.process.poll()
            time.sleep(0.05)
            alive = sorted({*processes(self.mark), *(pid for pid in alive if running(pid))})
        self.process.wait()


@dataclass
class RayCluster:
    """One head and more nodes, all with the token. folder: for its files, its user's home among them; mode: of authentication;
    also: environment of the nodes."""

    folder: Path
    token: str
    mode: str
    also: Mapping[str, str] = field(default_factory=dict)
    port: int = field(default_factory=lambda: free_port())
    nodes: list[Node] = field(default_factory=list)

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    @property
    def environment(self) -> dict[str, str]:
        """Of somebody who may use it."""
        return {**outsider(self.folder), "RAY_AUTH_MODE": self.mode, "RAY_AUTH_TOKEN": self.token}

    def start(self, resources: Sequence[str]) -> Node:
        """A node with these resources; the first one is the head. Returns when it is part of the cluster."""
        mark = f"{self.token}-node-{time.monotonic_ns()}"
        where = [f"--address={self.address}"] if self.nodes else [
            "--head", f"--port={self.port}", "--include-dashboard=false", f"--ray-client-server-port={free_port()}",
            f"--temp-dir={self.folder / 'ray'}"]
        command = [sys.executable, "-m", "ray.scripts.scripts", "start", *where, "--block", "--num-cpus=1", "--disable-usage-stats",
                   "--object-store-memory=100000000", f"--resources={json.dumps({r: 1 for r in resources})}"]
        log = (self.folder / f"node_{len(self.nodes)}.log").open("wb")
        node = Node(subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env={**self.environment, **self.also, "GKP_TEST_MARK": mark}), mark)
        self.nodes.append(node)
        assert until(lambda: b"--block" in Path(log.name).read_bytes() or node.process.poll() is not None, 60)
        assert node.process.poll() is None, Path(log.name).read_text()
        return node

    def workers(self, node: Node | None = None) -> list[int]:
        """Process ids of actors."""
        return [pid for pid in processes(node.mark if node else self.token) if title(pid).startswith("ray::RayWorker")]

    def close(self) -> None:
        for node in self.nodes:
            node.kill()
        shutil.rmtree(self.folder, ignore_errors=True)


@contextlib.contextmanager
def ray_cluster(*nodes: Sequence[str], mode: str = "token", also: Mapping[str, str] | None = None) -> Iterator[RayCluster]:
    """nodes: resources of each. No process of it is left at the end."""
    folder = Path(tempfile.mkdtemp(prefix="r"))  # short: Ray makes sockets deep in it
    cluster = RayCluster(folder, f"t{os.getpid():x}x{time.monotonic_ns():x}", mode, also or {})
    try:
        for resources in nodes:
            cluster.start(resources)
        yield cluster
    finally:
        cluster.close()


@dataclass
class Up:
    """`gkp edge up` as a process. cluster: the file that it writes."""

    process: subprocess.Popen[bytes]
    cluster: Path
    log: Path

    @property
    def said(self) -> str:
        return self.log.read_text()

    def until(self, pattern: str, times: int = 1, seconds: float = 45) -> None:
        """Wait until it said this so often."""
        assert until(lambda: len(re.findall(pattern, self.said)) >= times or self.process.poll() is not None, seconds), self.said
        assert len(re.findall(pattern, self.said)) >= times, self.said

    def end(self, what: int = signal.SIGTERM, seconds: float = 30) -> int:
        """Its exit code after this signal."""
        self.process.send_signal(what)
        return self.process.wait(seconds)


@contextlib.contextmanager
def up(ray: RayCluster, splits: Sequence[Path], keys: Path, folder: Path) -> Iterator[Up]:
    """Running, all workers ready."""
    log = folder / "up.log"
    with log.open("wb") as err:
        process = subprocess.Popen([*entry_point("gkp"), "edge", "up", *map(str, splits), "--ray", ray.address, "--keys", str(keys), "--threads", "1",
                                    "-o", str(folder / "cluster.yaml")], stdin=subprocess.DEVNULL, stderr=err,
                                   env={**ray.environment, "COLUMNS": "300"})
    found = Up(process, folder / "cluster.yaml", log)
    try:
        found.until("is ready on", times=2)
        yield found
    finally:
        process.kill()
        process.wait()


def refused(split: Path, ray: str, keys: Path, folder: Path, environment: Mapping[str, str]) -> Outcome:
    """`gkp edge up` that is expected to give up."""
    return program("edge", "up", split, "--ray", ray, "--keys", keys, "-o", folder / "cluster.yaml", env=environment, timeout=60)


def outsider(folder: Path) -> dict[str, str]:
    """Environment of somebody without a token."""
    home = folder / "home"
    home.mkdir(exist_ok=True)
    (folder / "tmp").mkdir(exist_ok=True)
    return {**{k: v for k, v in os.environ.items() if not k.startswith("RAY_")}, "HOME": str(home), "OMP_NUM_THREADS": "1",
            "RAY_USAGE_STATS_ENABLED": "0", "TMPDIR": str(folder / "tmp"), **_IMPATIENT}


def processes(mark: str) -> list[int]:
    """Those with it in their environment and what they started, this one left out. (Ray's Python processes write their titles
    over their environment.)"""
    parents: dict[int, int] = {}
    found = set()
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError, ValueError, IndexError):
            pid, stat = int(entry.name), (entry / "stat").read_text().rpartition(")")[2].split()
            if stat[0] != "Z":
                parents[pid] = int(stat[1])
                if mark.encode() in (entry / "environ").read_bytes():
                    found.add(pid)
    while more := {pid for pid, parent in parents.items() if parent in found} - found:
        found |= more
    return sorted(found - {os.getpid()})


def running(pid: int) -> bool:
    """It exists, and is no zombie."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def title(pid: int) -> str:
    """What ps shows."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes().decode("utf-8", "replace")
    return ""


def free_port() -> int:
    """On loopback, free a moment ago."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])
