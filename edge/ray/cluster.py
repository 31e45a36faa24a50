"""`gkp edge up`: one worker per device of a split model, placed, watched and restarted by Ray.

A node says with a custom resource which device it is ("gkp:kitchen"). The device's own folder and its own keys travel to it
through Ray, and nobody else's; what workers and coordinator then say to each other does not pass through Ray. Ray starts the
process again (max_restarts), here it gets its folder and its old address again.
"""

from __future__ import annotations

import contextlib
import json
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from gkp._version import __version__
from gkp.edge.coordinate.supervise import Supervisor
from gkp.edge.device.shard import check_plan
from gkp.edge.plan.schema import DEVICE_FILE, FILE_NAME, Plan, device_folder, read_plan
from gkp.edge.ray.join import encrypted, joined
from gkp.edge.ray.worker import Place, RayWorker, WorkerSpec
from gkp.edge.wire.client import Connection, message_limit
from gkp.edge.wire.identity import Keys, check_address, check_name, read_keys
from gkp.edge.wire.keys import COORDINATOR_FOLDER
from gkp.errors import BackendMissingError, FileError, GkpError, UnsafeFileError
from gkp.files import read_plain, write_file
from gkp.require import install
from gkp.text import clean
from gkp.types import Closing

RESOURCE = "gkp:"
"""Before a device's name: the resource of the node that is this device."""
FIRST_LINE = "# Written by gkp edge up, which removes it when it ends."
_MAX_FOLDER = 4 << 30
_PLACE_S, _START_S, _CHECK_S, _STOP_S = 60.0, 120.0, 3.0, 5.0
_REACH_S, _FREE_S = 15.0, 3.0
Say = Callable[[str], None]


@dataclass(frozen=True)
class UpOptions:
    """directories: of a split model, and of the same one split for fewer of the devices (fallback plans); address: of the
    Ray cluster, "host:port"; keys: folder that gkp edge keys wrote; output: the cluster file; threads: of every worker,
    None: the physical cores of its node."""

    directories: Sequence[Path]
    address: str
    keys: Path
    output: Path
    threads: int | None = None


@dataclass(frozen=True)
class DeviceFolder:
    """The folder of one device in one plan."""

    directory: Path
    plan: Plan
    device: int


def up(options: UpOptions, say: Say) -> None:
    """Start a worker for every device that computes something, write the cluster file, and watch them until
    KeyboardInterrupt, which ends the workers. say: gets every change. Errors of read_plan, read_keys and joined();
    BackendMissingError when a device is no node of the cluster, GkpError when a worker does not start."""
    plans = {directory: read_plan(directory) for directory in options.directories}
    for plan in plans.values():
        check_plan(plan)
    folders = _folders(plans)
    keys = {name: _keys(options.keys / name, name, [p.plan for p in folders[name]]) for name in folders}
    coordinator = _keys(options.keys / COORDINATOR_FOLDER, None, list(plans.values()))
    _check_ours(options.output)
    with joined(options.address) as ray, RayWorkers(ray, options, folders, keys) as workers:
        if not encrypted() and workers.hosts != {ray.util.get_node_ip_address()}:
            say("note: Ray's connections are not encrypted (RAY_USE_TLS): token, folders and keys travel as they are")
        limit = max(map(message_limit, plans.values()))
        hashes = {name: [folder.plan.hash for folder in folders[name]] for name in folders}
        connections = {n: Connection(address, n, coordinator, limit, hashes[n]) for n, address in workers.addresses.items()}
        with Supervisor(connections, hashes, revive=workers.revive) as supervisor, \
                workers.closing():  # before the supervisor waits for its threads, which may wait for a worker
            _await_all(supervisor, workers)
            with _cluster_file(options, workers.addresses):
                say(f"written: {options.output}; Ctrl-C ends the workers, and removes it")
                with contextlib.suppress(KeyboardInterrupt):
                    _watch(supervisor, workers, say)


class RayWorkers(Closing):
    """Workers as actors of a Ray cluster. folders, keys: by device name. addresses: of the workers, the same after a
    restart; hosts: of their nodes. A context manager, which ends the workers."""

    def __init__(self, ray: Any, options: UpOptions, folders: Mapping[str, Sequence[DeviceFolder]],
                 keys: Mapping[str, Keys]) -> None:
        self._ray, self._device_folders, self._keys, self._threads = ray, folders, keys, options.threads
        self._closed = threading.Event()
        self._reasons: dict[str, str] = {}
        _check_nodes(ray, options.address, list(folders))
        self._folders = {name: ray.put([read_folder(device_folder(p.directory, p.device), p.plan, p.device) for p in mine])
                         for name, mine in folders.items()}
        self._actors: dict[str, Any] = {}
        try:
            self._actors = {name: self._actor(name) for name in folders}
            asked = {name: self._actors[name].place.remote(_port(mine)) for name, mine in folders.items()}
            self._places: dict[str, Place] = {name: self._placed(name, ref) for name, ref in asked.items()}
            self.addresses = {name: place.address for name, place in self._places.items()}
            self.hosts = {place.host for place in self._places.values()}
            started = {name: self._start(name) for name in self._actors}
            for name, ref in started.items():
                if reason := self._outcome(ref, _START_S):
                    raise GkpError(f"the worker of device {name} does not start: {reason}",
                                   "start it by hand on its node with gkp serve to see more")
        except BaseException:
            self.close()
            raise

    def reason(self, name: str) -> str:
        """Why the device is lost, or what is done about it."""
        return self._reasons.get(name, "it does not answer")

    def recovered(self, name: str) -> None:
        """It answers: the reason is forgotten."""
        self._reasons.pop(name, None)

    def revive(self, name: str) -> None:
        """Called while the device does not answer: gives a new process its folder, and ends one that is stuck."""
        errors = self._ray.exceptions
        try:
            self._reasons[name] = self._revived(name, self._actors[name])
        except errors.ActorUnavailableError:
            self._reasons[name] = "Ray starts it again"
        except errors.RayActorError:  # for good: Ray has given it up
            self._actors[name] = self._actor(name)
        except errors.RayError as e:
            self._reasons[name] = _one_line(e)

    def _revived(self, name: str, actor: Any) -> str:
        """What was done, in words."""
        if not self._wait(check := actor.check.remote(), _CHECK_S):
            if not self._closed.is_set():
                self._kill(actor, no_restart=False)
            return "its process is stuck, or its node is gone; Ray starts it again"
        if self._ray.get(check):
            return "its worker runs, and does not answer here"
        return self._outcome(self._start(name), _START_S) or "it was started again"

    @contextlib.contextmanager
    def closing(self) -> Iterator[None]:
        """A context at whose end nothing is started again any more."""
        try:
            yield
        finally:
            self._closed.set()

    def close(self) -> None:
        """Lets the workers answer what is open, and ends them."""
        self._closed.set()
        with contextlib.suppress(Exception):  # a worker that is gone, or a cluster: both have ended
            self._ray.wait([actor.stop.remote() for actor in self._actors.values()], num_returns=len(self._actors),
                           timeout=_STOP_S)
        for actor in self._actors.values():
            self._kill(actor, no_restart=True)

    def _actor(self, name: str) -> Any:
        return self._ray.remote(RayWorker).options(num_cpus=0, resources={RESOURCE + name: 1}, max_restarts=-1,
                                                   max_concurrency=4).remote()

    def _placed(self, name: str, ref: Any) -> Place:
        try:
            place: Place = self._ray.get(ref, timeout=_PLACE_S)
        except self._ray.exceptions.GetTimeoutError:
            raise BackendMissingError(f"Ray did not start the worker of device {name} in {_PLACE_S:g} s",
                                      "ray status shows the nodes and what they wait for") from None
        except Exception as e:  # Ray raises its own, and what unpickling raises on a node without gkp
            last = next((line for line in reversed(str(e).splitlines()) if line.strip()), type(e).__name__)
            raise BackendMissingError(f"the node of device {name} cannot run gkp: {clean(last, 200)}",
                                      f"{install('ray')}, in the Python of its ray start") from e
        if place.version != __version__:
            raise BackendMissingError(f"the node of device {name} has gkp {place.version}, here is {__version__}",
                                      "install the same version on all nodes")
        return place

    def _start(self, name: str) -> Any:
        known = {device.name for folder in self._device_folders[name] for device in folder.plan.devices} - {name}
        peers = {other: address for other, address in self.addresses.items() if other in known}
        return self._actors[name].start.remote(WorkerSpec(name, self._places[name], self._keys[name], peers, self._threads),
                                               self._folders[name])

    def _outcome(self, ref: Any, timeout: float) -> str:
        """What came of a start: "" when it serves."""
        if not self._wait(ref, timeout):
            return f"it took over {timeout:g} s"
        try:
            return str(self._ray.get(ref))
        except Exception as e:  # the process died, the object store is full, ...
            return _one_line(e)

    def _wait(self, ref: Any, timeout: float) -> bool:
        end = time.monotonic() + timeout
        while not self._closed.is_set() and time.monotonic() < end:
            if self._ray.wait([ref], timeout=min(0.5, timeout))[0]:
                return True
        return False

    def _kill(self, actor: Any, no_restart: bool) -> None:
        with contextlib.suppress(Exception):  # it is gone already
            self._ray.kill(actor, no_restart=no_restart)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


# ---- what is checked before -----------------------------------------------------------------------------------------
def _folders(plans: Mapping[Path, Plan]) -> dict[str, list[DeviceFolder]]:
    """The folders of those devices that compute something in any plan, by name."""
    found: dict[str, list[DeviceFolder]] = {}
    for directory, plan in plans.items():
        for k in plan.busy_devices:
            found.setdefault(check_name(plan.devices[k].name), []).append(DeviceFolder(directory, plan, k))
    return found


def _keys(folder: Path, name: str | None, plans: Sequence[Plan]) -> Keys:
    keys = read_keys(folder)
    if keys.identity.worker != name:
        raise UnsafeFileError(f"the keys in {folder} are not of {name or 'the coordinator'}",
                              "give the folder that gkp edge keys wrote")
    if not {plan.hash for plan in plans} <= keys.identity.plans:
        raise UnsafeFileError(f"the keys in {folder} do not name {'this plan' if len(plans) == 1 else 'these plans'}",
                              "run gkp edge keys on the split models again, all at once")
    return keys


def _check_nodes(ray: Any, address: str, names: list[str]) -> None:
    """Every device is one node of the cluster, and free. (That of a worker that just ended may take a moment.)"""
    nodes = [set(node["Resources"]) for node in ray.nodes() if node["Alive"]]
    count = {name: sum(RESOURCE + name in resources for resources in nodes) for name in names}
    if missing := [name for name in names if not count[name]]:
        commands = "; ".join(f"ray start --address={address} --resources='{json.dumps({RESOURCE + name: 1})}'"
                             for name in missing)
        raise BackendMissingError(f"no node of the Ray cluster says that it is {', '.join(missing)}", f"on each: {commands}")
    if twice := [name for name in names if count[name] > 1]:
        raise BackendMissingError(f"several nodes of the Ray cluster say that they are {', '.join(twice)}",
                                  "start each with the resource of its own device")
    end = time.monotonic() + _FREE_S
    while taken := [name for name in names if ray.available_resources().get(RESOURCE + name, 0) < 1]:
        if time.monotonic() > end:
            raise BackendMissingError(f"somebody else uses {', '.join(taken)} of the Ray cluster",
                                      "is another gkp edge up running? ray status shows it")
        time.sleep(0.25)


def read_folder(folder: Path, plan: Plan, device: int) -> dict[str, bytes]:
    """The files of one device, by name: those that the plan lists, and nothing else that may lie there. FileError when one
    is missing, is no plain file, or all are over 4 GiB together. (Checksums are compared where they are served.)"""
    names = [FILE_NAME, DEVICE_FILE, *plan.files.get(str(device), {})]
    found: dict[str, bytes] = {}
    for name in names:
        if PurePosixPath(name).name != name or name in (".", "..") or not name.isprintable():
            raise FileError(f"the plan names the file {name[:80]!r}", "split the model again")
        found[name] = read_plain(folder / name, _MAX_FOLDER, "split the model again")
        if sum(map(len, found.values())) > _MAX_FOLDER:
            raise FileError(f"the files in {folder} are over {_MAX_FOLDER >> 30} GiB", "split over more devices")
    return found


def _port(folders: Sequence[DeviceFolder]) -> int | None:
    """The one that devices.yaml gives the device."""
    for address in (folder.plan.devices[folder.device].address for folder in folders):
        if address is not None and not address.startswith("unix:"):
            return int(check_address(address).rpartition(":")[2]) or None
    return None


# ---- the cluster file -----------------------------------------------------------------------------------------------
def _check_ours(path: Path) -> None:
    """A cluster file that somebody wrote by hand is left alone."""
    try:
        with path.open(encoding="utf-8", errors="replace") as file:
            if file.readline(200).rstrip("\n") != FIRST_LINE:
                raise FileError(f"{path} is not of gkp edge up, and would be overwritten", "choose another name with -o")
    except FileNotFoundError:
        return
    except OSError as e:
        raise FileError(f"{path} cannot be read: {e.strerror}", "choose another name with -o") from e


@contextlib.contextmanager
def _cluster_file(options: UpOptions, addresses: Mapping[str, str]) -> Iterator[None]:
    """It is there as long as the workers are."""
    folder = options.output.resolve().parent
    keys, *others = (json.dumps(os.path.relpath(path.resolve(), folder))
                     for path in (options.keys / COORDINATOR_FOLDER, *options.directories[1:]))
    lines = [FIRST_LINE, f"keys: {keys}", "devices:",
             *(f"  {json.dumps(name)}: {json.dumps(address)}" for name, address in addresses.items()),
             *(["fallback:", *(f"  - {other}" for other in others)] if others else [])]
    write_file(options.output, ("\n".join(lines) + "\n").encode())
    try:
        yield
    finally:
        options.output.unlink(missing_ok=True)


# ---- watching -------------------------------------------------------------------------------------------------------
def _await_all(supervisor: Supervisor, workers: RayWorkers) -> None:
    """GkpError when the coordinator's machine does not reach a worker."""
    if not supervisor.wait(lambda: all(state.alive for state in supervisor.states().values()), _REACH_S):
        name, state = next((n, s) for n, s in supervisor.states().items() if not s.alive)
        raise BackendMissingError(f"the worker of device {name} runs at {workers.addresses[name]} and cannot be reached "
                                  f"from here: {state.reason}", "let this machine reach that port")


def _watch(supervisor: Supervisor, workers: RayWorkers, say: Say) -> None:
    """Say what changes, until KeyboardInterrupt."""
    said: dict[str, str] = {}
    while True:
        for name, state in supervisor.states().items():
            if state.alive:
                workers.recovered(name)
                now = f"{name} is ready on {workers.addresses[name]}"
            else:
                now = f"{name} is lost: {workers.reason(name)}"
            if said.get(name) != now:
                say(now)
                said[name] = now
        time.sleep(0.25)
