"""`gkp verify` where an artefact is in int8: as its conversion verified it, as far as the artefact says how.

What its file says, run by onnx.reference, is the definition. The runtime is held to it (see gkp.converter.verify_int8), and
the definition to the other model: on the images that int8 was calibrated with it may be as far from it as it was then; on
random numbers, no further than a share of what the outputs of the other model differ by.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from gkp.converter.calibration import Calibration, image_shape
from gkp.converter.encoding import Encoding
from gkp.converter.graph import Graph
from gkp.converter.recognise import recognise, simplify
from gkp.converter.sources import GroupedModel, OpenOptions, open_model
from gkp.converter.sources._torchfile import read_pickle_file
from gkp.converter.stages import Opened
from gkp.converter.targets import make_target
from gkp.converter.verify_int8 import (
    SHARE_OF_ROUNDING,
    Compute,
    agreement,
    check_form,
    check_layers,
    check_network,
    definition,
    drawn_inputs,
    int8_inputs,
    stock,
    without_rounding,
)
from gkp.errors import UsageError
from gkp.images.reading import read_samples
from gkp.manifest import Check, Manifest, Verification
from gkp.text import clean
from gkp.types import Array, Progress, Run

AGAINST = "int8 against "
"""Starts the name of the check of the definition against the other model."""
_FILE = "model.onnx"
_ON_CPU = ("onnx", "ort", "openvino")
_FARTHER = 1.5
_OF_SPREAD = 0.75
"""On random numbers the example's ResNet-20 in int8 is 0.55 of it from its checkpoint, and 1.05 from the dense network that
it was pruned from."""
_FORMS = 2
"""Inputs that the form is computed for in float64, which takes long."""
Inputs = Sequence[tuple[str, int, Mapping[str, Array]]]


@dataclass(frozen=True)
class Pair:
    """directory, written: an artefact in int8; run: what it computes; other: what it is compared with, under the same names
    of inputs; batch: the only one that this takes, or None."""

    directory: Path
    written: Manifest
    run: Run
    other: Run
    other_name: str
    batch: int | None


def compare_int8(pair: Pair, options: OpenOptions, calibration: str | None, progress: Progress) -> Verification:
    """calibration: the images that the artefact was calibrated with, as of --calibration; random numbers need not be given.
    UsageError where they are others, or the artefact has no ONNX file."""
    if _FILE not in pair.written.files:
        raise UsageError(f"{pair.directory} holds no {_FILE} that says what int8 is", "compare with --precision fp32")
    model = open_model(pair.directory / _FILE, options)
    opened = Opened(model, model.dynamic, (), None, ())
    images = _images(pair.written, model, calibration, progress)
    inputs = [given for given in (drawn_inputs(opened) if images is None else int8_inputs(opened, images))
              if pair.batch in (None, given[1])]
    graph = simplify(recognise(Graph(model.model, model.budget)))
    progress("computing the form in int8", None)
    checks = check_form(model.model, graph, inputs[:_FORMS], model.dynamic)
    if pair.written.calibration is None:  # it came in int8: the other model is in int8, too
        smooth = stock(without_rounding(graph), model.dynamic)
        for run in (pair.run, pair.other):
            checks += check_network(run, graph, smooth, inputs, model.dynamic, SHARE_OF_ROUNDING)
    else:
        checks += check_network(pair.run, graph, pair.other, inputs, model.dynamic)
        if pair.written.target in _ON_CPU and pair.written.provider in (None, "cpu"):
            checks += check_layers(graph, {}, _engine(pair.written), inputs[0][2], progress)
        checks.append(_against(pair, definition(graph, model.dynamic), inputs, known=images is not None))
    return Verification(passed=all(c.passed for c in checks), reference=f"{pair.other_name}, and the int8 form",
                        engine=pair.directory.name, checks=checks)


def _engine(written: Manifest) -> Compute:
    """What the artefact's runtime computes of a part here: on a processor without VNNI it may saturate weights of 8 bits."""
    target = make_target(written.target, "int8")
    return lambda parts, forms: target.compute(parts, forms, Encoding(), written.threads)


def _against(pair: Pair, run_definition: Run, inputs: Inputs, known: bool) -> Check:
    """The definition against the other model. known: on the inputs that the conversion looked at."""
    same, error = agreement(run_definition, pair.other, inputs)
    wants = [pair.other(feeds)[0].astype(np.float64) for _, _, feeds in inputs]
    recorded = pair.written.calibration.max_abs_error if known and pair.written.calibration is not None else None
    allowed = _OF_SPREAD * _spread(wants) if recorded is None else _FARTHER * recorded
    return Check(name=f"{AGAINST}{clean(pair.other_name)}", batch=sum(batch for _, batch, _ in inputs), max_abs_error=error,
                 tolerance=allowed, max_abs_reference=max(float(np.abs(y).max(initial=0.0)) for y in wants),
                 top1_agreement=same, passed=error <= allowed)


def _spread(outputs: Sequence[Array]) -> float:
    """How far outputs of single inputs lie from their mean, at most."""
    stacked = np.concatenate(outputs)
    return float(np.abs(stacked - stacked.mean(0)).max(initial=0.0))


def _images(written: Manifest, model: GroupedModel, spec: str | None, progress: Progress) -> Calibration | None:
    """The images that the artefact was calibrated with; None where they are not at hand."""
    how, shape = written.calibration, image_shape(model)
    if how is None or shape is None:
        if spec is not None:
            raise UsageError("the artefact was not calibrated by gkp", "leave --calibration out")
        return None
    spec = "random" if spec is None and how.kind == "random" else spec
    if spec is None:
        return None
    mean, std = (None if values is None else tuple(values) for values in (how.mean, how.std))
    samples = read_samples(spec, shape, how.count, how.seed or 0, read_pickle_file, mean=mean, std=std,
                           system=written.source.system, progress=progress)
    if samples.origin.sha256 != how.sha256:
        raise UsageError(f"these are not the {how.count} images of the artefact's calibration ({how.kind} {how.split})",
                         "give those, or leave --calibration out")
    return Calibration(samples, progress)
