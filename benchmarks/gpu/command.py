"""`gkp bench --suite gpu` and `gkp bench --calibrate trt`."""

from __future__ import annotations

from gkp.console import Screen
from gkp.require import require


def require_all(artefacts: bool = True) -> tuple[int, int]:
    """Compute capability of the GPU here. BackendMissingError without PyTorch, onnx or a GPU, or (artefacts) when nothing
    that gkp convert writes would run on it."""
    require("torch", "torch", "measuring a GPU")
    require("onnx", "convert", "measuring a GPU")
    from gkp.benchmarks.gpu.device import require_gpu
    from gkp.benchmarks.gpu.ways import require_artefacts

    capability = require_gpu()
    if artefacts:
        require_artefacts()
    return capability


def gpu_bench(screen: Screen, calibrate: bool, json_to: str | None) -> None:
    """Measure, show the tables, write the JSON; calibrate: only what the cost table needs, which is written for this user.
    Errors of require_all."""
    capability = require_all(artefacts=not calibrate)
    from gkp.benchmarks.gpu import suite
    from gkp.benchmarks.gpu.tables import gpu_tables

    with screen.progress() as progress:
        found = suite.run_sweep(suite.Settings(budget_s=suite.CALIBRATION_S), progress) if calibrate \
            else suite.run_suite(suite.Settings(), progress)
    screen.show(gpu_tables(found))
    if calibrate:
        from gkp.benchmarks.gpu.calibrate import write_table

        screen.say(f"\nwritten: {write_table(found, capability)}")
    screen.json(json_to, found.json())
