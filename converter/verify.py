"""Does the artefact compute what the checkpoint computes? Compared on random and edge inputs, several batch sizes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx

from gkp.converter.reference import evaluator
from gkp.converter.sources.base import sample_inputs
from gkp.errors import UnsupportedModelError, UsageError
from gkp.manifest import Check, Verification
from gkp.text import clean
from gkp.types import Array, Progress, Run, silent

TOLERANCE = {"fp32": 1e-5, "fp16": 1e-2, "bf16": 8e-2}
"""Largest error relative to the largest output. fp16 and bf16: about 20 of the type's rounding steps (2^-11 and 2^-8)."""
WINOGRAD_TOLERANCE = 5e-5
"""The tolerance of float32 where Winograd's algorithm computes convolutions: its transforms add rounding errors."""
_TOP1 = {"fp32": 1.0, "fp16": 0.995, "bf16": 0.99}
INFINITE = 1e308
"""Says an error that is infinite, or no number, in JSON."""
_LARGEST = 32
_EDGE = (("random", 1.0), ("zeros", 0.0), ("large", 16.0), ("small", 1e-3))


def check_inputs(model: onnx.ModelProto, dynamic: Mapping[str, Mapping[int, str]],
                 batches: Sequence[int] = (2, 5)) -> list[tuple[str, int, dict[str, Array]]]:
    """(name, batch, inputs): random, zero, large and small inputs in the model's own shape; other batch sizes and, where
    they are dynamic, another height and width."""
    declared = max(1, model.graph.input[0].type.tensor_type.shape.dim[0].dim_value or 1)
    out = []
    for seed, (name, scale) in enumerate(_EDGE):
        feeds = {k: _scaled(v, scale) for k, v in sample_inputs(model, seed=seed).items()}
        out.append((name, declared, feeds))
    if any(0 in axes for axes in dynamic.values()):
        out += [("random", n, sample_inputs(model, seed=10 + n, batch=n, dynamic=dynamic)) for n in batches]
    if any(axis > 1 for axes in dynamic.values() for axis in axes):
        out.append(("larger image", declared, _larger(sample_inputs(model, seed=20), dynamic)))
    return out


def verified_batches(span: tuple[int, int, int]) -> list[int]:
    """The batch sizes at which the ONNX file is compared with the checkpoint: the smallest, the usual and the
    largest that it takes, but none that would keep the CPU busy for long."""
    return sorted({min(batch, max(span[0], _LARGEST)) for batch in span})


def _scaled(x: Array, scale: float) -> Array:
    """In its own type: bytes have an end."""
    return (x * scale if x.dtype.kind == "f" else np.minimum(x * scale, np.iinfo(x.dtype).max)).astype(x.dtype)


def _larger(feeds: dict[str, Array], dynamic: Mapping[str, Mapping[int, str]]) -> dict[str, Array]:
    rng = np.random.default_rng(21)
    grown = {}
    for name, x in feeds.items():
        shape = [n + 32 if axis > 1 and axis in dynamic.get(name, {}) else n for axis, n in enumerate(x.shape)]
        grown[name] = (rng.integers(0, 256, shape) if x.dtype == np.uint8 else rng.standard_normal(shape)).astype(x.dtype)
    return grown


def compare(got: Sequence[Array], want: Sequence[Array], name: str, batch: int, precision: str = "fp32",
            relative: float | None = None) -> Check:
    """fp32: max abs error at most 1e-5 x max(1, max |reference|); fp16: 1e-2, and 99.5 % top-1 agreement. relative: in
    place of these 1e-5."""
    error, largest, agreement = 0.0, 0.0, 1.0
    fits = len(got) == len(want) and all(g.shape == w.shape for g, w in zip(got, want, strict=True))
    for g, w in zip(got, want, strict=True) if fits else ():
        with np.errstate(invalid="ignore"):  # infinity less infinity
            difference = np.abs(g.astype(np.float64) - w.astype(np.float64))
        error = max(error, float(np.nan_to_num(difference, nan=np.inf).max(initial=0.0)))
        largest = max(largest, float(np.abs(w).max(initial=0.0)))
        if w.ndim == 2 and w.shape[1] > 1:
            agreement = min(agreement, _agreement(g, w))
    if not fits:
        error = float("inf")
    allowed = relative if relative is not None and precision == "fp32" else TOLERANCE[precision]
    tolerance = allowed * max(1.0, largest)
    return Check(name=name, batch=batch, max_abs_error=min(error, INFINITE), tolerance=tolerance, max_abs_reference=largest,
                 top1_agreement=agreement,
                 passed=error <= tolerance and (precision == "fp32" or agreement >= _TOP1[precision]))


def _agreement(got: Array, want: Array) -> float:
    return float((got.argmax(1) == want.argmax(1)).mean())


def verify(run: Run, engine: str, reference: Run, reference_name: str,
           inputs: Sequence[tuple[str, int, dict[str, Array]]], precision: str = "fp32",
           relative: float | None = None, progress: Progress = silent) -> Verification:
    """Compare two functions on the given inputs, see `compare`. The reference runs first: what it cannot run is the
    model's fault. UnsupportedModelError when the first one runs at the batch of the first input alone."""
    checks = []
    for number, (name, batch, feeds) in enumerate(inputs):
        progress(f"comparing with {clean(reference_name, 60)}", number / len(inputs))
        want = reference(feeds)
        try:
            got = run(feeds)
        except UsageError as e:
            if batch == inputs[0][1]:
                raise
            raise UnsupportedModelError(f"the converted model runs at batch {inputs[0][1]}, not at {batch}: {e.message}",
                                        "the network keeps the batch that it was exported at: export it with a fixed batch, "
                                        "and leave --dynamic-batch out") from e
        checks.append(compare(got, want, name, batch, precision, relative))
    return Verification(passed=all(c.passed for c in checks), reference=reference_name, engine=engine, checks=checks)


def worst(verification: Verification) -> Check:
    """The check that came closest to its tolerance, or went furthest beyond it."""
    return max(verification.checks, key=lambda c: c.max_abs_error / c.tolerance)


def first_difference(given: onnx.ModelProto, converted: onnx.ModelProto, feeds: Mapping[str, Array]) -> str | None:
    """Name of the first tensor that both models hold, in the same shape, with different values."""
    names = [o for n in given.graph.node for o in n.output if o]
    common = [n for n in names if n in {o for node in converted.graph.node for o in node.output}]
    if not common:
        return None
    a, b = tapped(given, common)(feeds), tapped(converted, common)(feeds)
    for name, x, y in zip(common, a, b, strict=True):
        if x.shape == y.shape and not compare([y], [x], name, len(x)).passed:
            return clean(name)
    return None


def tapped(model: onnx.ModelProto, names: list[str]) -> Run:
    """Computes these tensors of the model."""
    watched = onnx.ModelProto()
    watched.CopyFrom(model)
    del watched.graph.output[:]
    watched.graph.output.extend(onnx.ValueInfoProto(name=n) for n in names)
    inferred = onnx.shape_inference.infer_shapes(watched)
    known = {v.name: v for v in inferred.graph.value_info}
    del watched.graph.output[:]
    watched.graph.output.extend(known.get(n, onnx.ValueInfoProto(name=n)) for n in names)
    return evaluator(watched)[1]
