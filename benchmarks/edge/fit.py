"""The link as it is: tiny split models that do nothing but send arrays to and fro between two workers, and the straight line
through what that takes.

A model of k hops makes an array of b bytes on device 0, which then goes from device to device k times. The time of one hop
is the difference between a long and a short chain over the difference of their hops, less what the segments compute: the
coordinator's part cancels. What a worker spends on a segment that computes nothing is told apart (segment_ms), and so is its
processor time, by the segment alone (hops).

Between segments of a network a message costs several times as much: they go through more memory than the caches hold, and
where a device waits it finds nothing of its program there. The cold chain's segments do so, too."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from gkp import manifest
from gkp.benchmarks.edge.job import Alone, Taken
from gkp.edge.plan.devices import parse_devices
from gkp.edge.plan.schema import COORDINATOR, Link, Plan, Segment, Transfer, Value, device_folder, write_plan

SIZES = (1_000, 16_000, 128_000, 1_000_000)
HOPS = (2, 10)
COLD_BYTES = 16 << 20
"""That a segment of the cold chain writes and reads."""
_ANY = Link(name="any", bandwidth=1e9, rtt=0.0)


@dataclass(frozen=True)
class Fitted:
    """alpha_ms + bytes * beta_ns_per_byte; residual: largest relative error at the points."""

    alpha_ms: float
    beta_ns_per_byte: float
    residual: float

    def link(self, name: str, rtt_ms: float | None, shared: bool, cpu_ms: float | None = None,
             request_ms: float | None = None, speed: float = 1.0, cpu_ns_per_byte: float | None = None) -> Link:
        """As gkp.edge counts: half a round trip, the processors' part at the speed of the devices, and the rest. cpu_ms and
        cpu_ns_per_byte (at speed 1), request_ms: of the functions of these names; of a request, the input's message is
        alpha, and the answer the rest."""
        half, cpu, each = min((rtt_ms or 0.0) / 2, self.alpha_ms), cpu_ms or 0.0, cpu_ns_per_byte or 0.0
        software, slower = self.alpha_ms - half, 1 / speed - 1  # the forecast adds what slow processors add
        rest = None if request_ms is None else min(max(request_ms - self.alpha_ms - half, 0.0), software)
        overhead = max(software - cpu * slower, software * speed)
        beta = max(self.beta_ns_per_byte - each * slower, self.beta_ns_per_byte * speed, 1e-3)
        return Link(name=name, bandwidth=1e9 / beta, rtt=2e-3 * half, shared=shared, overhead=overhead / 1e3, cpu=cpu / 1e3,
                    cpu_per_byte=each * 1e-9, answer=None if rest is None else rest / 1e3)


def straight_line(points: Sequence[tuple[int, float]]) -> Fitted:
    """Least squares of the relative errors, neither number below 0. points: (bytes, milliseconds), two at least."""
    sizes, times = (np.array(column, float) for column in zip(*points, strict=True))
    best: tuple[float, float, float] | None = None
    for columns in ((0, 1), (0,), (1,)):  # both, or one of them alone where the other would be negative
        matrix = np.stack([1 / times, sizes / times], axis=1)[:, columns]
        found, *_ = np.linalg.lstsq(matrix, np.ones(len(times)), rcond=None)
        full = np.zeros(2)
        full[list(columns)] = found
        error = (full[0] + full[1] * sizes) / times - 1
        if full.min() >= 0 and (best is None or float(error @ error) < best[2] - 1e-12):
            best = float(full[0]), float(full[1]), float(error @ error)
    assert best is not None
    alpha, beta, _ = best
    return Fitted(alpha, beta * 1e6, float(np.abs((alpha + beta * sizes) / times - 1).max()))


def write_chains(folder: Path, devices: int, sizes: Sequence[int] = SIZES) -> dict[Path, Plan]:
    """The models, by folder: their names are those of chain_name."""
    return {path: _write(path, size, hops, devices, cold=False) for size in sizes for hops in HOPS
            for path in [folder / chain_name(size, hops)]}


def write_cold_chains(folder: Path, devices: int) -> dict[Path, Plan]:
    """The same for the smallest size, with segments that leave nothing in the caches."""
    return {path: _write(path, SIZES[0], hops, devices, cold=True) for hops in HOPS
            for path in [folder / chain_name(SIZES[0], hops, cold=True)]}


def hops(chains: Mapping[str, tuple[Path, Plan]], sizes: Sequence[int] = (SIZES[0], SIZES[-1])) -> list[Alone]:
    """What hands arrays on in the chains, each by itself: its processor time is no part of a message's. chains: by name."""
    wanted = [(size, False) for size in sizes] + [(SIZES[0], True)]
    return [Alone(name=_hop_name(size, cold), kind="hop", path=str(chains[name][0]))
            for size, cold in wanted if (name := chain_name(size, HOPS[0], cold)) in chains]


def _hop_name(size: int, cold: bool) -> str:
    return f"{size}-bytes-hop{'-cold' * cold}"


def chain_name(size: int, hops: int, cold: bool = False) -> str:
    return f"{size}-bytes-{hops}-hops{'-cold' * cold}"


def hop_times(taken: Mapping[str, Taken], sizes: Sequence[int] = SIZES) -> list[tuple[int, float]]:
    """(bytes, milliseconds of one hop), where both chains of a size were measured."""
    found = []
    for size in sizes:
        short, long = (taken.get(chain_name(size, hops)) for hops in HOPS)
        if short and long and short.ms and long.ms and short.counted and long.counted:
            spent = statistics.median(b - a for a, b in zip(short.ms, long.ms, strict=False))  # of one round each
            computed = long.counted.compute_ms - short.counted.compute_ms
            found.append((size, max(1e-3, (spent - max(0.0, computed)) / (HOPS[1] - HOPS[0]))))
    return found


def request_ms(taken: Mapping[str, Taken], hop: float) -> float | None:
    """What a request costs apart from hops and segments, by the shortest chain of the smallest array."""
    short = taken.get(chain_name(SIZES[0], HOPS[0]))
    if short is None or not short.ms or short.counted is None:
        return None
    return max(0.0, statistics.median(short.ms) - HOPS[0] * hop - short.counted.compute_ms)


def segment_ms(taken: Mapping[str, Taken]) -> float | None:
    """What a segment that computes next to nothing takes in a worker."""
    long = taken.get(chain_name(SIZES[0], HOPS[1]))
    return None if long is None or long.counted is None else long.counted.compute_ms / (HOPS[1] + 1)


def message_cpu_ms(taken: Mapping[str, Taken], size: int = SIZES[0], cold: bool = False) -> float | None:
    """Processor time of a message (default: of the smallest size), both ends together, less that of its segment alone."""
    short, long = (taken.get(chain_name(size, hops, cold)) for hops in HOPS)
    segment = taken.get(_hop_name(size, cold), Taken()).own_cpu_ms
    if short is None or long is None or short.cpu_ms is None or long.cpu_ms is None or segment is None:
        return None
    return max(0.0, (long.cpu_ms - short.cpu_ms) / (HOPS[1] - HOPS[0]) - segment)


def cpu_ns_per_byte(taken: Mapping[str, Taken]) -> float | None:
    """Processor time of each byte of a message, on both ends together, by the smallest and the largest size."""
    small, large = (message_cpu_ms(taken, size) for size in (SIZES[0], SIZES[-1]))
    return None if small is None or large is None else max(0.0, large - small) * 1e6 / (SIZES[-1] - SIZES[0])


# ---- the models -----------------------------------------------------------------------------------------------------
def _write(folder: Path, size: int, hops: int, devices: int, cold: bool) -> Plan:
    count = size // 4
    shapes = [[1, 1], *([1, count] for _ in range(hops)), [1, 1]]
    values = [Value(name=f"v{k}", tensor=f"v{k}", shape=shape, dtype="float32", producer=k - 1 if k else COORDINATOR)
              for k, shape in enumerate(shapes)]
    segments = [Segment(index=k, device=k % 2, file=f"segment_{k}.onnx", inputs=[f"v{k}"], outputs=[f"v{k + 1}"],
                        layers=[f"hop {k}"], macs=0, weights_bytes=0, estimated_ms=0.0) for k in range(hops + 1)]
    transfers = [Transfer(value="v0", source=COORDINATOR, target=0, bytes=4)]
    transfers += [Transfer(value=f"v{k}", source=(k - 1) % 2, target=k % 2, bytes=4 * count) for k in range(1, hops + 1)]
    transfers.append(Transfer(value=f"v{hops + 1}", source=hops % 2, target=COORDINATOR, bytes=4))
    files: dict[str, dict[str, str]] = {str(k): {} for k in range(devices)}
    for segment, model in zip(segments, _models(shapes, cold), strict=True):
        path = device_folder(folder, segment.device) / segment.file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(model.SerializeToString())
        files[str(segment.device)][segment.file] = manifest.sha256(path)
    plan = Plan(mode="pipeline", objective="latency", model="chain", model_sha256=None, devices=parse_devices(str(devices)),
                link=_ANY, input="v0", output=f"v{hops + 1}", values=values, segments=segments, transfers=transfers,
                layouts={}, files=files, predicted=None, rejected=[], notes=[])
    write_plan(plan, folder)
    return plan


def _models(shapes: Sequence[Sequence[int]], cold: bool) -> Iterator[onnx.ModelProto]:
    """The first one makes the array, the last one its maximum, those between hand it on (cold: and fill the caches with
    copies of its maximum, of which 0 comes in the end)."""
    last = len(shapes) - 2
    for k, (before, after) in enumerate(pairwise(shapes)):
        ends = [[helper.make_tensor_value_info(f"v{k + j}", TensorProto.FLOAT, shape)]
                for j, shape in enumerate((before, after))]
        constants = []
        if k == 0:
            constants.append(numpy_helper.from_array(np.array(after, np.int64), "shape"))
            node = helper.make_node("Expand", ["v0", "shape"], ["v1"])
        elif k == last:
            constants.append(numpy_helper.from_array(np.array([1], np.int64), "axes"))
            node = helper.make_node("ReduceMax", [f"v{k}", "axes"], [f"v{k + 1}"], keepdims=1)
        else:
            node = helper.make_node("Neg", [f"v{k}"], ["negative" if cold else f"v{k + 1}"])
        nodes = [node]
        if cold and node.op_type == "Neg":
            constants += [numpy_helper.from_array(np.array([1], np.int64), "axes"),
                          numpy_helper.from_array(np.array([1, COLD_BYTES // 4], np.int64), "many")]
            nodes += [helper.make_node("ReduceMax", [f"v{k}", "axes"], ["one"], keepdims=1),
                      helper.make_node("Expand", ["one", "many"], ["copies"]),
                      helper.make_node("ReduceMin", ["copies", "axes"], ["least"], keepdims=1),
                      helper.make_node("Sub", ["one", "least"], ["zero"]),
                      helper.make_node("Add", ["negative", "zero"], [f"v{k + 1}"])]
        graph = helper.make_graph(nodes, "hop", *ends, constants)
        yield helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
