"""Owner maps: which device makes each channel of each tensor in mode branch, so that little has to move.

Channels that channel-wise operators tie together (activations, residual additions, pooling, depthwise convolutions,
concatenation) are one *atom*, and lie on one device. Grouped convolutions tie atoms to each other. Where these ties leave
the network in several components (aligned groups), a component stays on its device, and nothing moves. Where they do not,
the atoms of each layer are assigned so that few channels move between neighbouring layers, layer by layer.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, prod

import numpy as np
import numpy.typing as npt

from gkp.converter.graph import Graph, Node, spatial, values
from gkp.edge.divide.balance import balance, require_scipy
from gkp.edge.divide.rules import Branched, Channelwise, Concatenated, Elementwise, Flattened, Taken, rule_of

Index = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
_FINEST = 256
_SWEEPS = 2
_FAIR = 1.2
"""A device may get this much more than its share before branches are cut."""
_VECTOR = 16
_PER_LAYER = 5e5
"""What starting a convolution costs, in multiply-accumulates (about 4 microseconds)."""
_DOMINATES = 0.6
"""A component with more than this share of the work is no division."""


@dataclass(frozen=True, eq=False)
class _Layer:
    """A branched convolution over atoms. branches: (atoms read, atoms written); outs: all atoms that it writes, macs: what
    each of them costs; plane_bytes of an input channel; pair_macs: of one input channel for one output channel."""

    branches: list[tuple[Index, Index]]
    outs: Index
    macs: Floats
    plane_bytes: int
    pair_macs: int


def owner_maps(graph: Graph, shares: Sequence[float]) -> dict[str, list[int]]:
    """Tensor's name -> owner of each of its channels, for every tensor with channels of a prepared graph: the device, plus a
    multiple of the number of devices where a device computes several aligned groups in lanes of their own (by_owner of
    gkp.edge.divide.modes). shares add up to one."""
    require_scipy()
    labels, count = _atoms(graph)
    layers = [_layer(node, labels) for node in graph.branched()]
    weights = np.zeros(count)
    for layer in layers:
        np.add.at(weights, layer.outs, layer.macs)
    component = _components(layers, count)
    grouped = np.zeros(count, dtype=bool)
    for layer in layers:
        if len(layer.branches) > 1:
            for ins, outs in layer.branches:
                grouped[ins] = grouped[outs] = True
    sums = np.zeros(int(component.max(initial=0)) + 1)
    np.add.at(sums, component[grouped], weights[grouped])
    if np.count_nonzero(sums) > 1 and sums.max() <= _DOMINATES * sums.sum():
        owner = _by_component(layers, labels, component, grouped, sums, shares, count)
    else:
        owner = _by_layer(layers, labels, shares, weights)
    return {name: owner[atoms].tolist() for name, atoms in labels.items()}


# ---- atoms ------------------------------------------------------------------------------------------------------------
def _atoms(graph: Graph) -> tuple[dict[str, Index], int]:
    """Tensor's name -> the atom of each of its channels; the number of atoms."""
    labels: dict[str, Index] = {}
    ties: list[tuple[Index, Index]] = []
    count = 0
    for tensor in (*graph.inputs, *(t for n in graph.nodes for t in n.outputs)):
        node = tensor.inputs[0] if tensor.inputs else None
        if tensor.shape is None or len(tensor.shape) < 2:
            continue
        width = int(tensor.shape[1])
        made = _followed(node, labels, ties) if node is not None else None
        if made is None or made.size != width:
            made = np.arange(count, count + width)
            count += width
        labels[tensor.name] = made
    number, atom = _connected(ties, count)
    return {name: atom[ids].astype(np.int64) for name, ids in labels.items()}, number


def _connected(ties: Sequence[tuple[Index, Index]], count: int) -> tuple[int, Index]:
    """(how many there are, which one each of `count` belongs to) of the components that ties connect: each element of an
    array to that at its place in the other."""
    from scipy.sparse import coo_matrix
    from scipy.sparse.csgraph import connected_components

    a, b = (np.concatenate([np.zeros(0, np.int64), *(tie[side] for tie in ties)]) for side in (0, 1))
    number, component = connected_components(coo_matrix((np.ones(a.size), (a, b)), (count, count)), directed=False)
    return int(number), component


def _followed(node: Node, labels: dict[str, Index], ties: list[tuple[Index, Index]]) -> Index | None:
    """The labels of a channel-wise node's output; None where its channels are new ones."""
    rule = rule_of(node)
    known = [labels[t.name] for t in node.inputs if values(t) is None and t.name in labels]
    if not known:
        return None
    if isinstance(rule, Channelwise):
        return known[0]
    if isinstance(rule, Flattened):
        return np.repeat(known[0], rule.pixels)
    if isinstance(rule, Taken):
        return known[0][rule.index]
    if isinstance(rule, Concatenated):
        return np.concatenate(known)
    if isinstance(rule, Elementwise):
        wide = [k for k in known if k.size == node.outputs[0].shape[1]]
        ties.extend((wide[0], other) for other in wide[1:])
        return wide[0] if wide else None
    return None


def _layer(node: Node, labels: dict[str, Index]) -> _Layer:
    rule = rule_of(node)
    assert isinstance(rule, Branched)
    conv = rule.branches.conv
    ins, outs = labels[node.inputs[0].name], labels[node.outputs[0].name]
    plane = prod(spatial(node.outputs[0]) or (1,))
    macs = np.full(conv.out_channels, float(plane))  # also for channels that only hold their bias
    for b in conv.branches:
        macs[b.out_index] += plane * prod(b.weight.shape[1:])
    return _Layer([(ins[b.in_index], outs[b.out_index]) for b in conv.branches], outs, macs,
                  4 * prod(spatial(node.inputs[0]) or (1,)), plane * prod(conv.kernel_shape))


def _components(layers: Sequence[_Layer], count: int) -> Index:
    """Component of each atom, tied by the branches of grouped convolutions."""
    branches = [np.concatenate(branch) for layer in layers if len(layer.branches) > 1 for branch in layer.branches]
    return _connected([(atoms[:-1], atoms[1:]) for atoms in branches], count)[1]


def _classes(layers: Sequence[_Layer], labels: dict[str, Index]) -> list[tuple[Index, list[_Layer]]]:
    """(atoms, layers that write them): atoms by the layer that writes them first, then those that no layer writes."""
    found: list[tuple[Index, list[_Layer]]] = []
    seen: set[int] = set()
    for atoms in (*(layer.outs for layer in layers), *labels.values()):
        new = [a for a in dict.fromkeys(atoms.tolist()) if a not in seen]
        seen.update(new)
        if new:
            mine = set(new)
            found.append((np.asarray(new, np.int64), [w for w in layers if not mine.isdisjoint(w.outs.tolist())]))
    return found


def proportional(n: int, shares: Sequence[float]) -> list[int]:
    """n things in proportion to the shares, by largest remainders; nothing for a share of 0."""
    exact = [n * s / sum(shares) for s in shares]
    counts = [int(e) for e in exact]
    order = sorted((k for k, s in enumerate(shares) if s > 0), key=lambda k: counts[k] - exact[k])
    for k in order[:n - sum(counts)]:
        counts[k] += 1
    return counts


# ---- aligned groups ---------------------------------------------------------------------------------------------------
def _by_component(layers: Sequence[_Layer], labels: dict[str, Index], component: Index, grouped: npt.NDArray[np.bool_],
                  sums: Floats, shares: Sequence[float], count: int) -> Index:
    """A component stays on its device; where there are more devices than components, several devices share one."""
    working = [d for d in range(len(shares)) if shares[d] > 0]
    components = [int(c) for c in np.argsort(-sums, kind="stable") if sums[c] > 0]
    homes: dict[int, list[int]] = {c: [] for c in components}
    if len(components) >= len(working):
        for c, device in zip(components, balance([float(sums[c]) for c in components], shares), strict=True):
            homes[c].append(device)
    else:
        for device in sorted(working, key=lambda d: (-shares[d], d)):
            neediest = max(components, key=lambda c: sums[c] / (1e-12 + sum(shares[d] for d in homes[c])))
            homes[neediest].append(device)
    lanes = _lanes(layers, component, homes, len(shares))
    owner = np.zeros(count, np.int64)
    for atoms, _ in _classes(layers, labels):
        for c in sorted(set(component[atoms].tolist())):
            mine = atoms[component[atoms] == c]
            devices = homes.get(int(c)) if grouped[mine].any() else None
            if devices is not None:
                owner[mine] = lanes[int(c)] if int(c) in lanes else _blocks(mine.size, devices, shares)
        rest = atoms[[int(c) not in homes or not grouped[a] for a, c in zip(atoms, component[atoms], strict=True)]]
        owner[rest] = _blocks(rest.size, working, shares)
    return owner


def _lanes(layers: Sequence[_Layer], component: Index, homes: dict[int, list[int]], devices: int) -> dict[int, int]:
    """Component -> lane, for those that have a device of their own or share one with others: the components of a device
    beside each other, or together as one where that is less work in vectors of channels."""
    found: dict[int, int] = {}
    for device in range(devices):
        mine = [c for c, home in homes.items() if home == [device]]
        options, number = [], len(mine)
        while mine:
            groups = [g.tolist() for g in np.array_split(np.asarray(mine), number)]
            options.append((sum(_lane_work(layers, component, group) for group in groups), groups))
            if number == 1:
                break
            number = (number + 1) // 2
        for k, group in enumerate(min(options, key=lambda o: o[0])[1] if options else []):
            found.update(dict.fromkeys(group, device + k * devices))
    return found


def _lane_work(layers: Sequence[_Layer], component: Index, group: Sequence[int]) -> float:
    """Multiply-accumulates of these components as dense convolutions, output channels in whole vectors."""
    total = 0.0
    for layer in layers:
        outs = int(np.isin(component[layer.outs], group).sum())
        if outs:
            read = {int(a) for ins, written in layer.branches if np.isin(component[written], group).any() for a in ins}
            total += -(-outs // _VECTOR) * _VECTOR * len(read) * layer.pair_macs + _PER_LAYER
    return total


def _blocks(n: int, devices: Sequence[int], shares: Sequence[float]) -> Index:
    """Owners of n neighbours: a block for each device."""
    return np.repeat(np.asarray(devices, np.int64), proportional(n, [shares[d] for d in devices]))


# ---- any groups -------------------------------------------------------------------------------------------------------
def _by_layer(layers: Sequence[_Layer], labels: dict[str, Index], shares: Sequence[float], weights: Floats) -> Index:
    """Layer by layer, given its neighbours: first with those before it, then with those on both sides."""
    owner = np.full(weights.size, -1, np.int64)
    classes = _classes(layers, labels)
    readers: dict[int, list[_Layer]] = defaultdict(list)
    for layer in layers:
        for atom in {int(a) for ins, _ in layer.branches for a in ins}:
            readers[atom].append(layer)
    for _ in range(_SWEEPS):
        for atoms, writers in classes:
            reading = list({id(r): r for a in atoms.tolist() for r in readers[a]}.values())
            cost = _cost(atoms, writers, reading, owner, len(shares), weights.size)
            owner[atoms] = _balanced(cost, atoms, writers, np.maximum(weights[atoms], 1.0), shares)
    return owner


def _balanced(cost: Floats, atoms: Index, writers: Sequence[_Layer], weights: Floats, shares: Sequence[float]) -> Index:
    """Owners of the atoms: in whole branches where that is fair, else in parts of them."""
    owner = np.zeros(atoms.size, np.int64)
    wanted = sum(s > 0 for s in shares)
    for _ in range(3):
        units = _units(atoms, writers, wanted)
        owner = _assigned(cost, units, np.asarray([weights[u].sum() for u in units]), shares)
        load = np.bincount(owner, weights=weights, minlength=len(shares)) / weights.sum()
        if all(part <= _FAIR * share for part, share in zip(load, shares, strict=True)):
            break
        wanted *= 2
    return owner


def _cost(atoms: Index, writers: Sequence[_Layer], readers: Sequence[_Layer], owner: Index, devices: int,
          count: int) -> Floats:
    """[atoms, devices]: bytes that move when the atom lies on the device; unassigned neighbours cost nothing."""
    cost = np.zeros((count, devices))
    for layer in writers:
        for ins, outs in layer.branches:
            known = owner[ins][owner[ins] >= 0]
            missing = known.size - np.bincount(known, minlength=devices)
            cost[outs] += layer.plane_bytes * missing / max(1, outs.size)
    for layer in readers:
        needed = np.zeros((count, devices), dtype=bool)
        for ins, outs in layer.branches:
            needed[np.ix_(ins, np.unique(owner[outs][owner[outs] >= 0]))] = True
        cost += layer.plane_bytes * (needed.sum(1, keepdims=True) - needed)
    return cost[atoms]


def _units(atoms: Index, writers: Sequence[_Layer], wanted: int) -> list[Index]:
    """Places in `atoms` that stay together, at least `wanted` if there are as many atoms: the branches of the layer with
    most branches, or parts of them; single channels, or small blocks of many, where no layer is grouped."""
    main = max(writers, key=lambda w: len(w.branches), default=None)
    place = {int(a): k for k, a in enumerate(atoms)}
    if main is None or len(main.branches) < 2:
        return [p for p in np.array_split(np.arange(atoms.size), min(atoms.size, _FINEST)) if p.size]
    pieces = ceil(wanted / len(main.branches))
    units = []
    for _, outs in main.branches:
        mine = np.asarray([place[int(a)] for a in outs if int(a) in place], np.int64)
        units += [p for p in np.array_split(mine, pieces) if p.size]
    covered = {int(k) for u in units for k in u}
    return units + [np.asarray([k]) for k in range(atoms.size) if k not in covered]


def _assigned(cost: Floats, units: Sequence[Index], weights: Floats, shares: Sequence[float]) -> Index:
    """The owners of the atoms: every device gets its share of the units, at the least cost."""
    from scipy.optimize import linear_sum_assignment

    total = np.stack([cost[u].sum(0) for u in units])
    in_order = np.linspace(0, 1e-9 * (1.0 + total.max()), len(units))
    total = total + in_order[::-1, None] * np.arange(len(shares))[None, :]  # ties: in order
    if weights.max() <= 1.01 * weights.min():
        slots = np.repeat(np.arange(len(shares)), proportional(len(units), shares))
        chosen = slots[linear_sum_assignment(total[:, slots])[1]]
    else:
        chosen = _transported(total, weights, shares)
    owner = np.zeros(len(cost), np.int64)
    for unit, device in zip(units, chosen, strict=True):
        owner[unit] = device
    return owner


def _transported(cost: Floats, weights: Floats, shares: Sequence[float]) -> Index:
    """Units of unequal weight: the transport problem in fractions (at most one unit less than devices is cut), rounded."""
    from scipy.optimize import linprog
    from scipy.sparse import eye, kron

    units, devices = cost.shape
    assigned = kron(eye(units), np.ones((1, devices)))
    carried = kron(weights[None, :], eye(devices))
    room = np.asarray(shares) * weights.sum() * (1 + 1e-9)
    found = linprog(cost.ravel(), A_ub=carried, b_ub=room, A_eq=assigned, b_eq=np.ones(units), bounds=(0, 1), method="highs")
    parts = found.x.reshape(units, devices) if found.x is not None else -cost
    return np.asarray(parts.argmax(1), np.int64)
