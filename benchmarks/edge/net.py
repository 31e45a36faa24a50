"""The networks that workers run on: this machine's loopback, or a namespace for each of them and a shaped link between.

Which emulator shapes the link is found by trying, and named in the report: netem where the kernel has it, else the relay."""

from __future__ import annotations

import contextlib
import json
import select
import subprocess
import sys
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

from gkp.benchmarks.edge import relay
from gkp.benchmarks.edge.counters import WORD
from gkp.benchmarks.edge.netns import RUN, Namespaces, command, ip, unavailable
from gkp.edge.plan.schema import Link
from gkp.errors import BackendMissingError

PORT = 7000
MTU = 9000
"""Of shaped links: with smaller frames the relay's own work would shape them."""
_START_S = 20.0


@dataclass(frozen=True)
class Place:
    """Where a process runs: command words before it, and the address where a worker listens there; interface: by which it
    sends, None: nothing can be counted."""

    prefix: tuple[str, ...]
    address: str
    interface: str | None


@dataclass
class Net:
    """coordinator, workers: their places; emulator: in words; matrix: the relay's counts. A context manager."""

    emulator: str
    coordinator: Place
    workers: list[Place]
    matrix: Path | None = None
    open: ExitStack = field(default_factory=ExitStack)

    def __enter__(self) -> Net:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.open.close()


def loopback(devices: int, folder: Path) -> Net:
    """TCP over the loopback device of one namespace; Unix sockets in `folder` where there can be no namespaces."""
    if (reason := unavailable()) is not None:
        places = [Place((), f"unix:{folder / f'{k}.sock'}", None) for k in range(devices)]
        return Net(f"none: Unix sockets, no frames to count ({reason})", Place((), "", None), places)
    with ExitStack() as stack:
        (name,) = stack.enter_context(Namespaces(1)).names
        prefix = _inside(name)
        places = [Place(prefix, f"127.0.0.1:{PORT + k}", "lo") for k in range(devices)]
        return Net("none: TCP over loopback", Place(prefix, "", "lo"), places, open=stack.pop_all())


def shaped(link: Link, devices: int, folder: Path, core: int) -> Net:
    """A namespace for the coordinator and one for each device, any two of them `link` apart; core: for the relay.
    BackendMissingError with the reason where this cannot be."""
    if (reason := unavailable()) is not None:
        raise BackendMissingError(reason, "run as root on Linux, with iproute2")
    if devices + 1 > relay.MAX_PORTS:
        raise BackendMissingError(f"{devices} devices are more than the emulated switch has ports", "fewer devices")
    with ExitStack() as stack:
        if not link.shared and has_netem():
            return _netem(link, devices, stack)
        return _relayed(link, devices, folder, core, stack)


def has_netem() -> bool:
    """Found by trying."""
    try:
        with Namespaces(1) as spaces:
            command(*_inside(spaces.names[0]), "tc", "qdisc", "add", "dev", "lo", "root", "netem", "delay", "1ms")
    except BackendMissingError:
        return False
    return True


def _relayed(link: Link, devices: int, folder: Path, core: int, stack: ExitStack) -> Net:
    names = stack.enter_context(Namespaces(devices + 1)).names
    matrix, spec = folder / "matrix", folder / "relay.json"
    matrix.write_bytes(bytes(len(names) ** 2 * WORD))
    spec.write_text(json.dumps({"namespaces": names, "rate": link.bandwidth, "delay": link.rtt / 2, "shared": link.shared,
                                "matrix": str(matrix), "core": core}), encoding="utf-8")
    process = subprocess.Popen([sys.executable, "-m", "gkp.benchmarks.edge.relay", str(spec)], stdin=subprocess.PIPE,
                               stdout=subprocess.PIPE, start_new_session=True)
    stack.callback(end_process, process)
    assert process.stdout is not None
    ready, _, _ = select.select([process.stdout], [], [], _START_S)
    said = process.stdout.readline().decode("utf-8", "replace").strip() if ready else ""
    if said != "ready":
        raise BackendMissingError(f"the relay did not start: {said[:160] or 'it says nothing'}", "it needs /dev/net/tun")
    for k, name in enumerate(names):
        _address(name, k)
        for j in range(len(names)):
            if j != k:  # no frame but those of the messages
                ip("-n", name, "neigh", "add", _host(j), "lladdr", relay.hardware(j), "dev", relay.INTERFACE,
                   "nud", "permanent")
    medium = "one medium for all" if link.shared else "switched"
    return Net(f"relay over TAP devices ({medium}, MTU {MTU})", *_places(names), matrix=matrix, open=stack.pop_all())


def _netem(link: Link, devices: int, stack: ExitStack) -> Net:
    """A bridge in a namespace of its own; each port is slow in both directions, the delay is on the way in."""
    switch, *names = stack.enter_context(Namespaces(devices + 2)).names
    for words in bridge_commands(link, switch, names):
        command(*words)
    for k, name in enumerate(names):
        _address(name, k)
    return Net(f"netem (switched, MTU {MTU})", *_places(names), open=stack.pop_all())


def bridge_commands(link: Link, switch: str, names: list[str]) -> list[tuple[str, ...]]:
    """What makes the bridge and its slow ports."""
    rate, delay = f"{link.bandwidth * 8:.0f}bit", f"{link.rtt / 2 * 1e6:.0f}us"
    found: list[tuple[str, ...]] = [("ip", "-n", switch, "link", "add", "bridge", "type", "bridge"),
                                    ("ip", "-n", switch, "link", "set", "bridge", "mtu", str(MTU), "up")]
    for k, name in enumerate(names):
        port = f"port{k}"
        found += [
            ("ip", "-n", switch, "link", "add", port, "type", "veth", "peer", "name", relay.INTERFACE, "netns", name),
            ("ip", "-n", switch, "link", "set", port, "mtu", str(MTU), "master", "bridge", "up"),
            (*_inside(switch), "tc", "qdisc", "add", "dev", port, "root", "netem", "limit", "100000", "rate", rate),
            (*_inside(name), "tc", "qdisc", "add", "dev", relay.INTERFACE, "root", "netem", "limit", "100000", "delay",
             delay, "rate", rate)]
    return found


def _address(name: str, port: int) -> None:
    with contextlib.suppress(BackendMissingError):  # no IPv6: nothing to silence
        ip("-n", name, "link", "set", relay.INTERFACE, "addrgenmode", "none")
    ip("-n", name, "link", "set", relay.INTERFACE, "address", relay.hardware(port), "mtu", str(MTU), "up")
    ip("-n", name, "addr", "add", f"{_host(port)}/24", "dev", relay.INTERFACE)


def _places(names: list[str]) -> tuple[Place, list[Place]]:
    first, *others = [Place(_inside(name), f"{_host(k)}:{PORT}", relay.INTERFACE) for k, name in enumerate(names)]
    return first, others


def _inside(name: str) -> tuple[str, ...]:
    """nsenter, and not ip netns exec, which also hides the control groups."""
    return ("nsenter", f"--net={RUN / name}")


def _host(port: int) -> str:
    return f"10.77.0.{port + 1}"


def end_process(process: subprocess.Popen[bytes]) -> None:
    """Of a child that ends when its stdin does; killed where it does not."""
    for stream in (process.stdin, process.stdout):
        if stream is not None:
            with contextlib.suppress(OSError):
                stream.close()
    try:
        process.wait(5)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
