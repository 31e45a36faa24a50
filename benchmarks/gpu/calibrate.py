"""`gkp bench --calibrate trt`: the sweep's points become this GPU's entry in the user's cost table."""

from __future__ import annotations

from pathlib import Path

from gkp.benchmarks.gpu.results import GpuBench
from gkp.benchmarks.gpu.sweep import TENSORRT
from gkp.converter.trt.costs import Entry, Point, write_entry
from gkp.errors import GkpError
from gkp.options.trt import Capability

OTHER_KERNELS = 1.1
"""Margin of a table that was measured with cuDNN's kernels: TensorRT may have others."""


def entry_of(bench: GpuBench) -> Entry:
    """The entry of the cost table that a run's points make. GkpError when nothing was measured."""
    found = [p for p in bench.points if p.ratio is not None]
    if not found:
        reason = next((p.missing for p in bench.points if p.missing), "no layer was timed")
        raise GkpError(f"nothing was measured: {reason}", "free the GPU, and try again")
    engine = found[0].engine
    points = [Point(precision="fp16" if p.precision == "fp16" else "fp32", kernel=p.kernel, stride=p.stride,
                    channels=p.channels, groups=p.groups, plane=p.plane, batch=p.batch, ratio=round(p.ratio.value, 4),
                    dense_ms=p.dense_ms) for p in found if p.ratio is not None]
    return Entry(source=f"measured with gkp bench --calibrate trt on {bench.environment['gpu']}: {engine}", measured=True,
                 environment=bench.environment, margin=1.0 if engine == TENSORRT else OTHER_KERNELS,
                 gather_gbs=bench.gather_gbs, points=points)


def write_table(bench: GpuBench, capability: Capability, path: Path | None = None) -> Path:
    """Write the entry into the user's file; where it is."""
    return write_entry(capability, entry_of(bench), path)
