"""Write a split model as one folder per device: the plan and the segments, verified against the unsplit model."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from gkp import manifest
from gkp.converter.artefact import check_destination, staged
from gkp.converter.pixels import of_pixels
from gkp.converter.sources import GroupedModel
from gkp.converter.verify import check_inputs, verify, worst
from gkp.edge.device.in_process import InProcessExecutor
from gkp.edge.divide.decide import Decision
from gkp.edge.divide.draft import Draft
from gkp.edge.divide.engines import Engine
from gkp.edge.plan.schema import FILE_NAME, Plan, SplitModel, device_folder, write_plan
from gkp.errors import GkpError, VerificationError
from gkp.images.normalisation import Normalisation
from gkp.types import Array, Progress, silent

TOLERANCE = 5e-5
"""Relative to max(1, largest output): across devices, sums are taken in another order."""


def write(opened: GroupedModel, made: Draft, decision: Decision, out: Path, *, model: str = "", sha256: str | None = None,
          force: bool = False, engine: Engine | None = None, normalisation: Normalisation | None = None,
          progress: Progress = silent) -> Plan:
    """Write a draft and verify it, all devices in this process, against the opened model; the plan as it was written. model,
    sha256: name and hash of the source; engine: that the draft was made for, by default ONNX Runtime's; normalisation: of
    the pixels that it was made for. Nothing is left behind when it fails."""
    engine = engine or Engine()
    if normalisation is not None:
        opened = of_pixels(opened, normalisation)
    check_destination(out, force, FILE_NAME, "gkp split")
    with staged(out) as folder:
        files: dict[str, dict[str, str]] = {}
        for device in range(len(made.plan.devices)):
            device_folder(folder, device).mkdir()
            files[str(device)] = {}
        for segment, subgraph in zip(made.plan.segments, made.subgraphs, strict=True):
            progress("writing segments", segment.index / len(made.subgraphs))
            path = device_folder(folder, segment.device) / segment.file
            engine.write(subgraph, path)
            files[str(segment.device)][segment.file] = manifest.sha256(path)
        progress("verifying", None)
        verified = check(opened, made, folder, engine)
        plan = Plan(**{name: getattr(made.plan, name) for name in SplitModel.__struct_fields__}, model=model,
                    model_sha256=sha256, objective=decision.objective, predicted=decision.chosen.prediction,
                    rejected=list(decision.rejected), notes=[*decision.notes, verified], files=files,
                    mean=None if normalisation is None else list(normalisation.mean),
                    std=None if normalisation is None else list(normalisation.std))
        write_plan(plan, folder)
    return plan


def check(opened: GroupedModel, made: Draft, folder: Path, engine: Engine) -> str:
    """Run the split model that was written on random and edge inputs beside the opened one; what to note. VerificationError
    when they differ by more than TOLERANCE, with arrays between devices as they are; what rounding those to the plan's wire
    type changes is noted."""
    name = opened.model.graph.input[0].name
    executor = InProcessExecutor(made.plan, lambda s: engine.open(made.subgraphs[s.index],
                                                                  device_folder(folder, s.device) / s.file, 1))
    try:
        inputs = check_inputs(opened.model, {})
        result = verify(lambda feeds: [executor.run(feeds[name])], engine.about, opened.reference, opened.reference_name,
                        inputs, relative=TOLERANCE)
        rounding = _rounding(executor, made.plan.wire, inputs[0][2][name])
    finally:
        executor.close()
    bad = worst(result)
    if not result.passed:
        raise VerificationError(f"the split model computes something else: max error {bad.max_abs_error:.3g}, allowed "
                                f"{bad.tolerance:.3g} (inputs: {bad.name})", "nothing was written; please report this model")
    return (f"verified against {opened.reference_name}: max error {bad.max_abs_error:.2g}, allowed {bad.tolerance:.2g}"
            + rounding)


def _rounding(executor: InProcessExecutor, wire: str, x: Array) -> str:
    """How much the outputs change when values between devices are rounded, in words; "" where they are not."""
    if wire == "float32":
        return ""
    exact, executor.wire = executor.run(x), wire
    try:
        changed = float(np.abs(executor.run(x) - exact).max())
    except GkpError:  # a runtime refused infinity
        changed = float("nan")
    if not np.isfinite(changed):
        return f"; {wire} between devices overflows on a random input: --wire float32 does not"
    return (f"; not counting {wire} between devices, which on a random input changes outputs of up to "
            f"{np.abs(exact).max():.2g} by up to {changed:.2g}")
