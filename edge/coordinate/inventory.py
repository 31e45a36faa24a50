"""cluster.yaml: where the workers of a split model listen.

    keys: keys/coordinator          # what gkp edge keys wrote; relative to this file, as all paths in it
    devices:
      kitchen: 192.0.2.20:7000
      hall: 192.0.2.21:7000
    fallback: [split-for-one]       # plans for fewer of these devices, best first; the workers serve them, too
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import msgspec

from gkp.edge.plan.devices import load_yaml
from gkp.edge.wire.identity import check_address, check_name
from gkp.errors import UsageError


class _File(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    devices: dict[str, str] = {}
    keys: str | None = None
    insecure: bool = False
    fallback: list[str] = []


@dataclass(frozen=True)
class Inventory:
    """addresses: device name -> "host:port"; keys: folder of the coordinator's, None for plaintext on loopback; fallback:
    folders of split models."""

    addresses: dict[str, str]
    keys: Path | None
    fallback: tuple[Path, ...] = ()


def read_inventory(path: Path) -> Inventory:
    """A cluster.yaml. UsageError when an entry makes no sense or there are no keys, FileError when it cannot be read."""
    try:
        found = msgspec.convert(load_yaml(path), _File)
    except msgspec.ValidationError as e:
        raise UsageError(f"{path}: {e}", "it holds devices (name: host:port), keys, and perhaps fallback") from e
    if (found.keys is None) != found.insecure:
        raise UsageError(f"{path} says {'both keys and insecure' if found.keys else 'neither keys nor insecure: true'}",
                         "keys: FOLDER/coordinator, as gkp edge keys wrote it; insecure only on one machine")
    for name, address in found.devices.items():
        check_name(name)
        check_address(address)
    here = path.resolve().parent
    return Inventory(found.devices, None if found.keys is None else here / found.keys,
                     tuple(here / folder for folder in found.fallback))
