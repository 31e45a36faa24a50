"""Hand-made manifests: what a conversion can look like, without converting anything."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec
import pytest

from gkp.manifest import (
    Baseline,
    CandidateTime,
    Check,
    Latencies,
    Layer,
    Macs,
    Manifest,
    Measurement,
    Ratio,
    Rival,
    Source,
    Speedup,
    Tensor,
    Timing,
    Verification,
)


def timing(median: float) -> Timing:
    return Timing(median=median, q1=median * 0.985, q3=median * 1.02, runs=200)


def ratio(value: float, spread: float = 0.02) -> Ratio:
    return Ratio(value=value, low=value - spread, high=value + spread)


def measured(batch: int, threads: int, dense: float, as_is: float, converted: float,
             spread: float = 0.02) -> Measurement:
    latencies = Latencies(dense=timing(dense), as_is=timing(as_is), converted=timing(converted))
    speedup = Speedup(vs_dense=ratio(dense / converted, spread), vs_as_is=ratio(as_is / converted, spread),
                      theoretical=1.7583)
    return Measurement(batch=batch, threads=threads, latency_ms=latencies, speedup=speedup)


def rivals() -> list[Rival]:
    """One that is faster, one that is not here."""
    return [Rival(engine="openvino", precision="bf16", as_installed=True, ms=timing(0.2), ratio=ratio(0.64)),
            Rival(engine="ort", precision="int8", missing="ONNX Runtime is not installed")]


def layer(number: int = 0, **changes: Any) -> Layer:
    channels = 16 << min(number // 7, 2)
    plane = 32 >> min(number // 7, 2)
    dense = channels * channels * 9 * plane * plane
    kept = dense * 9 // 16
    fields: dict[str, Any] = {
        "name": f"layer{number // 7 + 1}.{number % 7 // 2}.conv{number % 2 + 1}", "branches": 8,
        "channels": (channels, channels), "kernel": (3, 3), "strides": (1, 1), "plane": (plane, plane),
        "inputs_per_branch": [9 * channels // 16] * 8, "outputs_per_branch": [channels // 8] * 8, "overlap": 4.5,
        "macs_dense": dense, "macs_kept": kept, "macs_executed": kept, "chosen": "native",
        "fast_kernel": "row tile 2x2",
        "reason": "1.31x the whole model against dense in this layer, above 1 at every batch measured",
        "candidates": [
            CandidateTime(name="dense", macs_executed=dense, ms=0.0214, ratios={"1": ratio(1.0, 0.005)}),
            CandidateTime(name="grouped-4-padded", macs_executed=dense * 3 // 4, ms=0.0308,
                          ratios={"1": ratio(0.83), "64": ratio(0.79)}),
            CandidateTime(name="native", macs_executed=kept, ms=0.0163, ratios={"1": ratio(1.31), "64": ratio(1.22)}),
            CandidateTime(name="split-8", macs_executed=kept, estimated_ms=0.051),
        ],
    }
    return Layer(**{**fields, **changes})


def manifest(**changes: Any) -> Manifest:
    """A TMI-GKP ResNet-20, measured in two settings, unless changed."""
    settings = [measured(1, 1, 0.412, 1.873, 0.314), measured(64, 2, 15.31, 92.4, 13.6)]
    layers = [layer(n) for n in range(3)] + [
        layer(8, name="layer2.0.shortcut", branches=3, inputs_per_branch=[4, 6, 7], outputs_per_branch=[8, 12, 12],
              kernel=(1, 1), strides=(2, 2), chosen="dense", overlap=1.0, candidates=[],
              reason="1x1 with 3 unequal branches: no other form executes fewer multiply-accumulates")]
    fields: dict[str, Any] = {
        "gkp_version": "0.1.0", "target": "ort", "precision": "fp32", "threads": 1, "provider": "CPUExecutionProvider",
        "source": Source(path="checkpoints/resnet20_tmi_gkp.pth", sha256="3f" * 32, system="tmi-gkp",
                         description="TMI-GKP ResNet-20, 8 groups"),
        "strategy": "auto", "inputs": [Tensor(name="x", shape=["N", 3, 32, 32], dtype="float32")],
        "outputs": [Tensor(name="y", shape=["N", 10], dtype="float32")], "layers": layers,
        "macs": Macs(dense=40_551_936, kept=23_063_040, executed=25_901_056), "params": 152_410,
        "baseline": Baseline(kind="twin", description="19 convolutions at full size"),
        "latency_ms": settings[0].latency_ms, "speedup": settings[0].speedup, "measurements": settings,
        "verification": Verification(passed=True, reference="the opened checkpoint in PyTorch 2.13",
                                     engine="ONNX Runtime 1.31", checks=[
            Check(name="random", batch=1, max_abs_error=2.1e-6, tolerance=1e-5, max_abs_reference=11.2,
                  top1_agreement=1.0, passed=True),
            Check(name="zeros", batch=4, max_abs_error=3.0e-7, tolerance=1e-5, max_abs_reference=4.0,
                  top1_agreement=1.0, passed=True)]),
        "operators": {"before": {"Conv": 21, "Gather": 38, "BatchNormalization": 19, "Relu": 19, "Add": 9},
                      "after": {"Conv": 21, "Relu": 19, "Add": 9}},
        "notes": ["the shortcut of layer2.0 stays a stock convolution"],
        "environment": {"cpu": {"model": "AMD EPYC", "cores": 2, "features": ["avx2", "avx512f"]},
                        "python": "3.11.4", "onnxruntime": "1.31.0"},
        "files": {"model.onnx": "ab" * 32}, "seconds": {"open": 0.41, "choose": 21.7, "verify": 1.2},
    }
    return Manifest(**{**fields, **changes})


def unmeasured(**changes: Any) -> Manifest:
    """Every number that can be null is null."""
    nothing: dict[str, Any] = {
        "latency_ms": Latencies(), "speedup": Speedup(), "measurements": [], "verification": None, "baseline": None,
        "operators": {}, "notes": [], "environment": {}, "files": {}, "seconds": {}, "provider": None,
        "layers": [layer(candidates=[], chosen="dense", reason="not measured: no runtime")],
        "source": Source(path="net.onnx", sha256=None, system="onnx")}
    return manifest(**{**nothing, **changes})


HOSTILE = "<script>alert(1)</script>[red]x[/red]\x1b[31m\x07\u202e\n]]>\"'&{{7*7}}" + "n" * 5000


def hostile() -> Manifest:
    """A manifest with HOSTILE wherever a string can stand."""

    def poison(value: Any) -> Any:
        if isinstance(value, dict):
            return {k if k in fixed else f"{k}{HOSTILE}": poison(v) for k, v in value.items()}
        if isinstance(value, list):
            return [poison(v) for v in value]
        return HOSTILE if isinstance(value, str) else value

    fixed = {*Manifest.__struct_fields__, *(f for s in (
        Baseline, CandidateTime, Check, Latencies, Layer, Macs, Measurement, Ratio, Rival, Source, Speedup, Tensor, Timing,
        Verification) for f in s.__struct_fields__), "before", "after"}
    settings = [msgspec.structs.replace(m, rivals=rivals()) for m in manifest().measurements]
    return msgspec.convert(poison(msgspec.to_builtins(manifest(measurements=settings))), Manifest)


@pytest.fixture
def make_manifest() -> Callable[..., Manifest]:
    return manifest


@pytest.fixture
def make_unmeasured() -> Callable[..., Manifest]:
    return unmeasured


@pytest.fixture
def make_layer() -> Callable[..., Layer]:
    return layer


@pytest.fixture
def make_measurement() -> Callable[..., Measurement]:
    return measured


@pytest.fixture
def hostile_manifest() -> Manifest:
    return hostile()
