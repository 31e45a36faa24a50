"""Who computes a node: whole on one device or on several, or divided by output channels or by rows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from gkp.converter.graph import Node
from gkp.edge.divide.tiles import Tile, whole, without
from gkp.edge.plan.schema import Layout
from gkp.errors import UsageError
from gkp.text import clean


@dataclass(frozen=True)
class NodePlacement:
    """devices[k] computes the output channels channels[k] (sorted), or the rows rows[k] = (first, end), or all of the
    output where both are empty. Parts may overlap: both devices compute what they share.

    A device may be named several times in a division by channels: these parts are *lanes*, which it computes beside each
    other instead of together. What its n-th part of one node makes is what its n-th part of the next node should read: then
    aligned groups are independent chains of small dense convolutions, also where several share a device."""

    devices: tuple[int, ...]
    channels: tuple[tuple[int, ...], ...] = ()
    rows: tuple[tuple[int, int], ...] = ()

    @property
    def kind(self) -> str:
        """whole, channels or rows."""
        return "channels" if self.channels else "rows" if self.rows else "whole"

    def layout(self) -> Layout:
        """Where the output lies then."""
        kind = self.kind if self.kind != "whole" else "one" if len(self.devices) == 1 else "replicated"
        devices = list(dict.fromkeys(self.devices))
        mine = [sorted(c for d, part in zip(self.devices, self.channels, strict=True) if d == device for c in part)
                for device in (devices if self.channels else ())]
        return Layout(kind=kind, devices=devices, channels=mine, rows=list(self.rows))


Assignment = Mapping[str, NodePlacement]


def tiles_of(node: Node, placement: NodePlacement, count: int) -> list[tuple[int, Tile]]:
    """(device, part of the output) of a node, a device's lanes together; devices with nothing to do are left out.
    UsageError when a part is missing, a device does not exist, or two lanes of a device overlap."""
    merged: dict[int, Tile] = {}
    for lane, tile in lanes_of(node, placement, count):
        before = merged.get(lane % count)
        merged[lane % count] = tile if before is None else Tile(
            tuple(sorted((*before.channels, *tile.channels))), tile.rows)
    return list(merged.items())


def lanes_of(node: Node, placement: NodePlacement, count: int) -> list[tuple[int, Tile]]:
    """(lane, part of the output) of a node: `lane % count` is the device, `lane // count` says which of its parts. Errors
    like `tiles_of`."""
    where = f"placement of {clean(node.name)}"
    if not placement.devices or (len(set(placement.devices)) < len(placement.devices) and not placement.channels):
        raise UsageError(f"{where}: devices {list(placement.devices)}", "name each device once")
    if any(not 0 <= d < count for d in placement.devices):
        raise UsageError(f"{where}: devices {list(placement.devices)}, there are {count}")
    everything = whole(node.outputs[0])
    if placement.kind == "whole":
        return [(d, everything) for d in placement.devices]
    lists = placement.channels or placement.rows
    if len(lists) != len(placement.devices):
        raise UsageError(f"{where}: {len(lists)} parts for {len(placement.devices)} devices")
    tiles = ([Tile(c, everything.rows) for c in placement.channels] if placement.channels
             else [Tile(everything.channels, r) for r in placement.rows])
    lanes = [d + count * placement.devices[:k].count(d) for k, d in enumerate(placement.devices)]
    found = [(lane, r) for lane, r in zip(lanes, tiles, strict=True) if r.size > 0]
    rest = [everything]
    for lane, tile in found:
        if tile & everything != tile or list(tile.channels) != sorted(set(tile.channels)):
            raise UsageError(f"{where}: a part lies outside of the output, or is not in order")
        if any(other < lane and (lane - other) % count == 0 and part & tile for other, part in found):
            raise UsageError(f"{where}: two parts on device {lane % count} overlap")
        rest = without(rest, tile)
    if rest:
        raise UsageError(f"{where}: nobody computes {len(rest[0].channels)} channels of rows {rest[0].rows}")
    return found
