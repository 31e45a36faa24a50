"""The coordinator: runs a split model on its devices. An answer is complete and right, or there is none: an error says
why."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np

from gkp.edge.coordinate.dispatch import Backend, Dispatch
from gkp.edge.coordinate.fallback import LocalFallback
from gkp.edge.coordinate.inflight import InFlight
from gkp.edge.coordinate.inventory import read_inventory
from gkp.edge.coordinate.local_workers import LocalWorkers
from gkp.edge.coordinate.routes import Route, Routes, routes_of
from gkp.edge.coordinate.supervise import PATIENCE, DeviceState, Supervisor
from gkp.edge.coordinate.trace import Trace
from gkp.edge.device.shard import check_plan
from gkp.edge.plan.schema import Plan, read_plan
from gkp.edge.wire.client import KEEPALIVE_S, Connection, message_limit
from gkp.edge.wire.identity import Keys, read_keys
from gkp.edge.wire.loop import Loop
from gkp.errors import UnsafeFileError, UsageError
from gkp.manifest import Tensor
from gkp.runtime.load import check_input
from gkp.types import Array, Closing

MAX_DEADLINE_S = 600.0


class Cluster(Closing):
    """Opens the split model in `directory` (what `gkp split` wrote) on the workers of the inventory file `cluster`, or
    with local=True on worker processes of its own, on this machine.

    fallback: compute on the coordinator, in this process, what the devices cannot compute because some of them are lost;
    needs the devices' folders in `directory`, and memory for the whole model. deadline: seconds for a request. in_flight:
    requests under way at once; more wait. threads: of each local worker. trust_code: run native libraries here that no
    authority of yours signed for (with cluster, its keys say so; local workers run them only if told to).

    Use as a context manager, or call close(). run() may be called from several threads. UsageError for options or files
    that do not fit, FileError for a folder that is no split model, DeviceLostError when no request could be computed
    now."""

    def __init__(self, directory: str | Path, cluster: str | Path | None = None, *, local: bool = False,
                 fallback: bool = True, deadline: float = 30.0, in_flight: int = 8, threads: int | None = None,
                 trust_code: bool = False) -> None:
        if local == (cluster is not None):
            raise UsageError("a cluster runs either on the workers of a cluster file, or on local ones",
                             "give one of the two")
        if in_flight < 1:
            raise UsageError(f"{in_flight} requests under way make no sense", "at least 1")
        self.directory, self.plan = Path(directory), _plan(Path(directory))
        self._deadline, self._closed = _checked(deadline), False
        self._in_flight, self._pool = in_flight, ThreadPoolExecutor(in_flight, "gkp-request")
        self._input, self._output = (next(v for v in self.plan.values if v.name == name)
                                     for name in (self.plan.input, self.plan.output))
        self._open = ExitStack()
        self._local_workers: LocalWorkers | None = None
        try:
            self._connect(cluster, fallback, threads, trust_code)
        except BaseException:
            self.close()
            raise

    @property
    def output_name(self) -> str:
        """What the network calls its output."""
        return self._output.tensor

    # ---- requests ---------------------------------------------------------------------------------------------------
    def run(self, x: Array, deadline: float | None = None) -> Array:
        """One batch. x: [N, C, H, W], N the plan's batch or a multiple of it (then the batches are under way together).
        deadline: seconds. Returns the network's output. UsageError when x does not fit, a ClusterError when there is no
        right answer in time."""
        end = time.monotonic() + (self._deadline if deadline is None else _checked(deadline))
        batches = self._batches(x)
        with self._said_when_closed():
            if len(batches) == 1:
                return Dispatch(self._backend, batches[0], end).run()[0]
            tasks = [self._pool.submit(Dispatch(self._backend, batch, end).run) for batch in batches]
            try:
                return np.concatenate([task.result()[0] for task in tasks])
            finally:
                for task in tasks:
                    task.cancel()

    def trace(self, x: Array, deadline: float | None = None) -> tuple[Array, Trace]:
        """run() for one batch of the plan's size, and where its time and bytes went. Waits for the report of every
        device."""
        end = time.monotonic() + (self._deadline if deadline is None else _checked(deadline))
        batches = self._batches(x)
        if len(batches) != 1:
            raise UsageError(f"{len(batches)} batches cannot be traced together", f"give {self._input.shape[0]} samples")
        with self._said_when_closed():
            y, trace = Dispatch(self._backend, batches[0], end, profile=True).run()
        assert trace is not None
        return y, trace

    def pids(self) -> dict[str, int]:
        """Process ids of the local workers, by device name."""
        return {} if self._local_workers is None else self._local_workers.pids()

    def states(self) -> dict[str, DeviceState]:
        """How every device that computes something is, by its name."""
        return self._backend.supervisor.states()

    @contextmanager
    def _said_when_closed(self) -> Iterator[None]:
        """What goes wrong with a request after close() goes wrong because of that, however it looks from inside."""
        try:
            yield
        except Exception:
            if self._closed:
                raise _closed() from None
            raise

    def _batches(self, x: Array) -> list[Array]:
        if self._closed:
            raise _closed()
        shape = list(self._input.shape)
        batch = np.shape(x)[0] if np.ndim(x) else 0
        many = batch > shape[0] > 0 and batch % shape[0] == 0 and self._output.shape[:1] == shape[:1]
        if not many and batch != shape[0] and list(np.shape(x)[1:]) == shape[1:]:
            raise UsageError(f"input {self._input.tensor!r} has {batch} samples, the model was split for {shape[0]}",
                             f"give a multiple of {shape[0]}, or split again with another batch in --input-shape")
        whole = check_input(x, Tensor(name=self._input.tensor, shape=[batch if many else shape[0], *shape[1:]],
                                      dtype=self._input.dtype))
        if whole.dtype.kind == "f" and not np.isfinite(whole).all():
            raise UsageError(f"input {self._input.tensor!r} holds NaN or infinity", "normalise it")
        return np.split(whole, batch // shape[0]) if many else [whole]

    # ---- opening and closing ----------------------------------------------------------------------------------------
    def _connect(self, cluster: str | Path | None, fallback: bool, threads: int | None, trust_code: bool) -> None:
        plans: list[Plan] = [self.plan]
        keys: Keys | None = None
        addresses: Mapping[str, str] = {}
        if cluster is not None:
            inventory, beside = read_inventory(Path(cluster)), Path(cluster).resolve().parent
            keys, addresses = None if inventory.keys is None else read_keys(beside / inventory.keys), inventory.devices
            folders = [self.directory, *(beside / folder for folder in inventory.fallback)]
            plans += [self._like(folder) for folder in folders[1:]]
            named = {plan.hash for plan in plans} if keys is None else keys.identity.plans
            unknown = [folder for folder, plan in zip(folders, plans, strict=True) if plan.hash not in named]
            if unknown:
                raise UnsafeFileError(f"the keys in {inventory.keys} do not name the plan in {unknown[0]}",
                                      f"run gkp edge keys {' '.join(map(str, folders))}, and copy the keys again")
        trusted = trust_code or keys is not None or not any(s.file.endswith(".so") for s in self.plan.segments)
        if cluster is None and not trusted:
            raise UnsafeFileError(f"{self.directory} holds native libraries, which are programs",
                                  "use --trust-code (trust_code=True) if you built them, or trust who did")
        here = self._open.enter_context(LocalFallback(self.directory, self.plan)) if fallback and trusted else None
        if cluster is None:
            self._local_workers = self._open.enter_context(LocalWorkers(self.directory, self.plan, threads))
            keys, addresses = self._local_workers.keys, self._local_workers.addresses
        routes = [route for tier, plan in enumerate(plans) for route in routes_of(plan, tier)]
        hashes = {name: list(dict.fromkeys(r.hash for r in routes if name in r.names)) for r in routes for name in r.names}
        loop = Loop("gkp-streams")
        self._open.callback(loop.close)
        connections = _connections(routes, addresses, keys, hashes, loop)
        revive = None if self._local_workers is None else self._local_workers.revive
        supervisor = self._open.enter_context(Supervisor(connections, hashes, revive=revive))
        self._backend = Backend(connections, supervisor, Routes(routes, supervisor), here, InFlight(self._in_flight))
        supervisor.wait(supervisor.asked_once, KEEPALIVE_S * PATIENCE + 1.0)
        if not self._backend.routes.usable() and not (here and here.there):
            raise self._backend.nobody()

    def _like(self, folder: Path) -> Plan:
        plan = _plan(folder)
        ends = [(*((v.shape, v.dtype) for name in (p.input, p.output) for v in p.values if v.name == name), p.mean, p.std)
                for p in (self.plan, plan)]
        if ends[0] != ends[1]:
            raise UsageError(f"{folder} splits another model: its input or output differs",
                             "split the same model for fewer devices")
        return plan

    def close(self) -> None:
        """Requests under way fail with UsageError; local workers end."""
        self._closed = True
        self._pool.shutdown(wait=False, cancel_futures=True)
        self._open.close()


def _closed() -> UsageError:
    return UsageError("this cluster was closed", "open another")


def _checked(deadline: float) -> float:
    if not 0 < deadline <= MAX_DEADLINE_S:
        raise UsageError(f"a deadline of {deadline} s makes no sense", f"above 0, at most {MAX_DEADLINE_S:g}")
    return deadline


def _plan(directory: Path) -> Plan:
    plan = read_plan(directory)
    check_plan(plan)
    return plan


def _connections(routes: Sequence[Route], addresses: Mapping[str, str], keys: Keys | None,
                 plans: Mapping[str, Sequence[str]], loop: Loop) -> dict[str, Connection]:
    """A connection, by name, to every device that takes part in a route."""
    limit = max(message_limit(route.plan) for route in routes)
    found: dict[str, Connection] = {}
    for device in (route.plan.devices[k] for route in routes for k in route.devices):
        if device.name not in found:
            address = addresses.get(device.name, device.address)
            if address is None:
                raise UsageError(f"there is no address for device {device.name}", "add it to the cluster file")
            found[device.name] = Connection(address, device.name, keys, limit, plans[device.name], loop)
    return found
