"""cluster.yaml: where the workers of a split model listen.

    keys: keys/coordinator          # what gkp edge keys wrote; relative to this file, as all paths in it
    devices:
      kitchen: 192.0.2.20:7000
      hall: 192.0.2.21:7000
    fallback: [split-for-one]       # plans for fewer of these devices, best first; the workers serve them, too
"""

from __future__ import annotations

from pathlib import Path

import msgspec

from gkp.edge.plan.devices import load_yaml
from gkp.edge.wire.identity import check_address, check_name
from gkp.errors import UsageError


class Inventory(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """devices: name -> "host:port"; keys: folder of the coordinator's, None for plaintext on loopback (insecure); fallback:
    folders of split models. Paths are relative to the file."""

    devices: dict[str, str] = {}
    keys: str | None = None
    insecure: bool = False
    fallback: list[str] = []


def read_inventory(path: Path) -> Inventory:
    """A cluster.yaml. UsageError when an entry makes no sense or there are no keys, FileError when it cannot be read."""
    try:
        found = msgspec.convert(load_yaml(path, "check the path"), Inventory)
    except msgspec.ValidationError as e:
        raise UsageError(f"{path}: {e}", "it holds devices (name: host:port), keys, and perhaps fallback") from e
    if (found.keys is None) != found.insecure:
        raise UsageError(f"{path} says {'both keys and insecure' if found.keys else 'neither keys nor insecure: true'}",
                         "keys: FOLDER/coordinator, as gkp edge keys wrote it; insecure only on one machine")
    for name, address in found.devices.items():
        check_name(name)
        check_address(address)
    return found
