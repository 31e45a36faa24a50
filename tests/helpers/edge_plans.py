"""Plans written by hand, for what reads plans: prediction, profiles, planner, report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from gkp.edge.plan.schema import COORDINATOR, Device, Link, Plan, Segment, Transfer, Value

LINK = Link(name="by-hand", bandwidth=1e6, rtt=2e-3, overhead=1e-3)
"""A message of 1,000 bytes holds its directions for 2 ms, and is there 1 ms later."""


def plan(segments: Sequence[tuple[int, Sequence[str], Sequence[str], float]], sizes: Mapping[str, int],
         transfers: Sequence[tuple[str, int, int]], *, devices: int | Sequence[Device] = 2, link: Link = LINK,
         mode: str = "pipeline", output: str = "y", weights: Sequence[int] | None = None, measured: bool = True) -> Plan:
    """segments: (device, inputs, outputs, milliseconds); sizes: bytes of each value, all of them multiples of 4; transfers:
    (value, source, target). The input is "v0"."""
    producer = {name: number for number, (_, _, outputs, _) in enumerate(segments) for name in outputs}
    made = [Device(name=f"d{k}") for k in range(devices)] if isinstance(devices, int) else list(devices)
    values = [Value(name=name, tensor=f"t_{name}", shape=[1, size // 4], dtype="float32", producer=producer.get(name, COORDINATOR))
              for name, size in sizes.items()]
    parts = [Segment(index=k, device=device, file=f"segment_{k}.onnx", inputs=list(inputs), outputs=list(outputs),
                     layers=[f"layer_{k}"], macs=int(ms * 1e6), weights_bytes=weights[k] if weights else 0,
                     estimated_ms=ms, measured_ms=ms if measured else None)
             for k, (device, inputs, outputs, ms) in enumerate(segments)]
    moves = [Transfer(value=name, source=source, target=target, bytes=sizes[name]) for name, source, target in transfers]
    return Plan(mode=mode, objective="latency", model="by-hand.onnx", model_sha256=None, devices=made, link=link, input="v0",
                output=output, values=values, segments=parts, transfers=moves, layouts={}, files={}, predicted=None, rejected=[],
                notes=[])


def chain(times: Sequence[float] = (4.0, 6.0), size: int = 1000, **options: object) -> Plan:
    """Device k computes its segment and sends 1,000 bytes on; the coordinator sends as many, and gets as many back."""
    names = ["v0", *(f"v{k + 1}" for k in range(len(times) - 1)), "y"]
    moves = [(name, k - 1, k if k < len(times) else COORDINATOR) for k, name in enumerate(names)]
    return plan([(k, [names[k]], [names[k + 1]], ms) for k, ms in enumerate(times)], dict.fromkeys(names, size), moves,
                devices=len(times), **options)


def replicas(times: Sequence[float], size: int = 1000, **options: object) -> Plan:
    """Every device holds the network."""
    count = len(times)
    return plan([(k, ["v0"], ["y"], ms) for k, ms in enumerate(times)], {"v0": size, "y": size},
                [*(("v0", COORDINATOR, k) for k in range(count)), *(("y", k, COORDINATOR) for k in range(count))],
                mode="replicas", devices=count, **options)


def of_speed(*speeds: float, memory: int | None = None) -> list[Device]:
    return [Device(name=f"d{k}", speed=s, memory_bytes=memory) for k, s in enumerate(speeds)]
