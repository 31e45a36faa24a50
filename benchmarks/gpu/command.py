"""`gkp bench --suite gpu` and `gkp bench --calibrate trt`."""

from __future__ import annotations

from gkp.console import Screen, write_json
from gkp.errors import BackendMissingError


def gpu_bench(screen: Screen, calibrate: bool, json_to: str | None) -> None:
    """Measure, show the tables, write the JSON; calibrate: only what the cost table needs, which is written for this user.
    BackendMissingError without PyTorch or a GPU."""
    try:
        import torch  # noqa: F401
    except ImportError as e:
        raise BackendMissingError("measuring a GPU needs PyTorch", 'pip install "gkp[torch]", with CUDA') from e
    from gkp.benchmarks.gpu import suite
    from gkp.benchmarks.gpu.device import require_gpu
    from gkp.benchmarks.gpu.tables import gpu_tables

    capability = require_gpu()
    with screen.progress() as progress:
        found = suite.run_sweep(suite.Settings(budget_s=suite.CALIBRATION_S), progress) if calibrate \
            else suite.run_suite(suite.Settings(), progress)
    screen.show(gpu_tables(found))
    if calibrate:
        from gkp.benchmarks.gpu.calibrate import write_table

        screen.say(f"\nwritten: {write_table(found, capability)}")
    write_json(json_to, found.json())
