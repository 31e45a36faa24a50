"""The devices and the link that a model is split for: a number or a devices.yaml, and a link by name or in numbers.

    devices:
      - {name: kitchen, speed: 0.12, memory: 2G, address: "192.0.2.20:7000"}
      - {name: hall,    speed: 0.70, memory: 8G, address: "192.0.2.21:7000"}
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from decimal import Decimal
from pathlib import Path
from typing import Any

import msgspec

from gkp.edge.plan.schema import Device, Link
from gkp.errors import FileError, UsageError
from gkp.require import require
from gkp.text import one_line

MAX_DEVICES = 256
_MAX_FILE = 256 * 1024
_COLLECTIONS = 4 * MAX_DEVICES
"""Lists and mappings in a file, at most."""
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}", re.ASCII)
"""Of a device: a folder, and a part of its certificate."""
ADDRESS = re.compile(r"(?:\[(?P<six>[0-9A-Fa-f:.]{2,45})\]|(?P<host>[A-Za-z0-9._-]{1,253})):(?P<port>[0-9]{1,5})", re.ASCII)

OVERHEAD, CPU, ANSWER, CPU_PER_BYTE = 5e-4, 5e-4, 2.7e-4, 2e-9
"""Seconds: what a message of a worker (a frame on a stream, mutual TLS) takes and costs on one core of a server, between
segments that use the caches: see docs/tasks/split.md for how it was measured."""


def _link(name: str, bandwidth: float, rtt: float, shared: bool = False) -> Link:
    return Link(name=name, bandwidth=bandwidth, rtt=rtt, shared=shared, overhead=OVERHEAD, cpu=CPU,
                cpu_per_byte=CPU_PER_BYTE, answer=ANSWER)


LINKS: tuple[Link, ...] = (_link("1gbe", 117e6, 2e-4), _link("wifi", 6.25e6, 3e-3, shared=True),
                           _link("loopback", 750e6, 3e-5))
"""1gbe: switched, what TCP leaves of a gigabit; wifi: 50 Mbit/s that all devices share; loopback: processes of one machine,
whose bandwidth is what encryption and copies leave."""


class _DeviceEntry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    name: str
    speed: float = 1.0
    memory: str | int | float | None = None
    address: str | None = None


class _Inventory(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    devices: list[_DeviceEntry]


def parse_devices(text: str) -> list[Device]:
    """`--devices`: a number from 1 to 256 makes equal devices without limits, anything else names a devices.yaml.
    UsageError for what makes no sense, FileError for a file that cannot be read."""
    if re.fullmatch(r"[+-]?[0-9]+", text.strip(), re.ASCII):
        count = int(text) if len(text) < 10 else MAX_DEVICES + 1
        if not 1 <= count <= MAX_DEVICES:
            raise UsageError(f"--devices {text} is not a number of devices", f"from 1 to {MAX_DEVICES}")
        return [Device(name=f"device-{k}") for k in range(count)]
    return read_devices(Path(text))


def read_devices(path: Path) -> list[Device]:
    """The devices of a devices.yaml (see the module). Anchors and aliases are refused: a small file cannot grow."""
    try:
        inventory = msgspec.convert(load_yaml(path, "give a number of devices, or a devices.yaml"), _Inventory)
    except msgspec.ValidationError as e:
        raise UsageError(f"{path}: {e}", "an entry has name, speed, memory and address; only name must be there") from e
    if not 1 <= len(inventory.devices) <= MAX_DEVICES:
        raise UsageError(f"{path} lists {len(inventory.devices)} devices", f"from 1 to {MAX_DEVICES}")
    devices = [_device(entry, path) for entry in inventory.devices]
    for field in ("name", "address"):
        values = [value for d in devices if (value := getattr(d, field)) is not None]
        if twice := next((v for v in values if values.count(v) > 1), None):
            raise UsageError(f"{path}: two devices have the {field} {twice}", "each device has its own")
    return devices


def load_yaml(path: Path, hint: str) -> Any:
    """Plain data of a small YAML file. hint: what to do when it is missing. FileError when it is that, too large, or not
    YAML; BackendMissingError without PyYAML."""
    yaml = require("yaml", "edge", "reading YAML files")
    try:
        with path.open("rb") as f:
            data = f.read(_MAX_FILE + 1)
        if len(data) > _MAX_FILE:
            raise FileError(f"{path} is larger than {_MAX_FILE // 1024} KiB", "it cannot be an inventory")
        _check_tokens(yaml, data, path)
        return yaml.safe_load(data)
    except FileNotFoundError:
        raise FileError(f"no such file: {path}", hint) from None
    except OSError as e:
        raise FileError(f"{path} cannot be read: {e.strerror}", "check its permissions") from e
    except (yaml.YAMLError, UnicodeDecodeError, ValueError, RecursionError) as e:
        raise FileError(f"{path} is not YAML: {one_line(e, 160)}", "see docs/tasks/split.md") from e


def _check_tokens(yaml: Any, data: bytes, path: Path) -> None:
    """No anchors, and not so many lists and mappings that nested ones, whose time grows by the square, keep the reader."""
    starts = (yaml.FlowSequenceStartToken, yaml.FlowMappingStartToken, yaml.BlockSequenceStartToken,
              yaml.BlockMappingStartToken)
    count = 0
    for token in yaml.scan(data):
        if isinstance(token, yaml.AliasToken | yaml.AnchorToken):
            raise FileError(f"{path} uses YAML anchors", "write every entry out")
        count += isinstance(token, starts)
        if count > _COLLECTIONS:
            raise FileError(f"{path} has more than {_COLLECTIONS} lists and mappings", "it cannot be an inventory")


def _device(entry: _DeviceEntry, path: Path) -> Device:
    where = f"{path}: device {entry.name[:64]!r}"
    if not NAME.fullmatch(entry.name):
        raise UsageError(f"{where}: not a name", "letters, digits, dots, dashes and underscores, 63 at most")
    if not 1e-6 <= entry.speed <= 1e6:  # false for NaN, too
        raise UsageError(f"{where}: speed {entry.speed} makes no sense",
                         "1.0 is the machine that the profile was measured on, 0.5 half as fast")
    address = None if entry.address is None else ADDRESS.fullmatch(entry.address)
    if entry.address is not None and (address is None or not 1 <= int(address["port"]) <= 65535):
        raise UsageError(f"{where}: address {entry.address[:80]!r} is not HOST:PORT", "e.g. 192.0.2.20:7000")
    return Device(name=entry.name, speed=entry.speed, address=entry.address,
                  memory_bytes=None if entry.memory is None else _bytes(entry.memory, where))


def _bytes(size: str | float, where: str) -> int:
    match = re.fullmatch(r"(\d{1,15}(?:\.\d{1,3})?) ?([KMGT]?)(?:i?B)?", str(size).strip(), re.ASCII | re.IGNORECASE)
    found = int(Decimal(match[1]) * 1024 ** " KMGT".index(match[2].upper() or " ")) if match else 0
    if not found:
        raise UsageError(f"{where}: memory {str(size)[:40]!r} is not a size", "e.g. 512M or 1.5G, in units of 1024")
    return found


def parse_link(text: str) -> Link:
    """`--link`: a name of LINKS, or "BANDWIDTH,RTT[,shared]" such as "100mbit,2ms" (bits) or "12MB,2ms" (bytes)."""
    named: Mapping[str, Link] = {link.name: link for link in LINKS}
    if text.strip().lower() in named:
        return named[text.strip().lower()]
    parts = [part.strip() for part in text.split(",")]
    number = r"(\d{1,9}(?:\.\d{1,9})?)\s*"
    rate = re.fullmatch(number + r"([kmgKMG])(bit|b|B)(?:/s|ps)?", parts[0], re.ASCII)
    delay = re.fullmatch(number + r"(us|ms|s)", parts[1], re.ASCII | re.IGNORECASE) if len(parts) > 1 else None
    if rate is None or delay is None or parts[2:] not in ([], ["shared"]) or float(rate[1]) == 0:
        raise UsageError(f"--link {text[:80]!r} is not a link", f"{', '.join(named)}, or BANDWIDTH,RTT[,shared] such as "
                         "100mbit,2ms or 12MB,2ms")
    bandwidth = float(rate[1]) * 1e3 ** (1 + "kmg".index(rate[2].lower())) / (1 if rate[3] == "B" else 8)
    rtt = float(delay[1]) * {"us": 1e-6, "ms": 1e-3, "s": 1.0}[delay[2].lower()]
    if rtt > 60:
        raise UsageError(f"--link {text[:80]!r}: a round trip of {rtt:g} s makes no sense", "e.g. 100mbit,2ms")
    return _link(",".join(parts), bandwidth, rtt, bool(parts[2:]))
