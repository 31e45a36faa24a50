"""What a manifest says beside its times, in words: engines, memory, precisions that were tried, verification, layers."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

from gkp.manifest import AccuracyData, Engine, Layer, Left, Manifest, Memory, Tried, Verification
from gkp.report.wording import batch_name, mebibytes, milliseconds, shorten, span
from gkp.text import clean, plural

_BASELINES = {
    "given": "the dense model given with --baseline",
    "twin": "dense twin: every branched convolution at full size, with non-zero random weights in the holes so that no "
            "compiler can exploit them",
    "as_is": "the model as given",
}


def engine_words(engine: Engine) -> str:
    """`engine.sm86+sm89.trt: tensorrt_rtx 1.7.1 for compute capability 8.6, 8.9; 21 convolutions, ...`."""
    convs = [layer for layer in engine.layers if layer.kind == "CONVOLUTION"]
    grouped = sum((layer.groups or 1) > 1 for layer in convs)
    moves = sum(layer.kind in ("GATHER", "SLICE", "CONCATENATION") for layer in engine.layers)
    half = sum(layer.dtype == "float16" for layer in convs)
    return (f"{clean(engine.file, 80)}: {clean(engine.package, 40)} {clean(engine.version, 40)} for compute capability "
            f"{', '.join(clean(c, 10) for c in engine.capabilities)}; {len(convs)} convolutions, {grouped} of them grouped, "
            f"{half} in fp16; {moves} channel copies")


def engine_layers(engine: Engine) -> list[tuple[str, str, str, str]]:
    """(name, kind, groups, dtype) of the layers of an engine, safe to print."""
    return [(clean(layer.name, 80), clean(layer.kind, 40).lower(), "" if layer.groups is None else str(layer.groups),
             clean(layer.dtype, 20)) for layer in engine.layers]


def memory_words(memory: Memory) -> str:
    """What a native model needs."""
    return (f"weights {mebibytes(memory.weights_bytes)}, {mebibytes(memory.arena_bytes_per_thread)} per thread; "
            f"{mebibytes(memory.peak_bytes)} with one thread")


def tried_name(tried: Tried) -> str:
    """`ort int8`; of the checkpoint itself, `checkpoint fp32`."""
    return f"{clean(tried.target, 40) or 'checkpoint'} {clean(tried.precision, 20)}"


def tried_accuracy(tried: Tried) -> str | None:
    """`92.22 % (9222 of 10000)`, else the agreement with fp32 where that was measured."""
    if tried.correct is not None and tried.total:
        return f"{100 * tried.correct / tried.total:.2f} % ({tried.correct} of {tried.total})"
    return None if tried.agreement is None else f"{100 * tried.agreement:.1f} % agree with fp32"


def tried_times(tried: Tried) -> str | None:
    """`batch 1: 0.312 ms; batch 64: 13.6 ms`."""
    found = (tried.latency_ms or {}).items()
    return "; ".join(f"{batch_name(key)}: {milliseconds(t.median)} ms" for key, t in found) or None


def tried_reason(tried: Tried) -> str:
    """Why it was taken, or why not."""
    return f"{'taken: ' if tried.taken else ''}{clean(tried.reason, 300)}"


def accuracy_data_words(data: AccuracyData) -> str:
    """`1,700 images of npz (all); 300 others left out, which models are calibrated with`."""
    left = f"; {plural(data.left_out, 'other')} left out, which models are calibrated with" if data.left_out else ""
    return f"{plural(data.count, 'image')} of {clean(data.kind, 20)} ({clean(data.split, 20)}){left}"


def baseline_words(manifest: Manifest, short: bool = False) -> str:
    """What the dense baseline is. short: not how it was made."""
    if manifest.baseline is None:
        return "none"
    base = manifest.baseline
    kind = _BASELINES.get(base.kind, clean(base.kind, 40))
    kind = kind.partition(", ")[0] if short else kind
    return f"{kind} ({clean(base.description, 300)})" if base.description else kind


def verification_words(verification: Verification | None, short: bool = False) -> str:
    """`passed: largest error 2.1e-06, tolerance 1.0e-05 (random, batch 4); compared with ...`. short: not with what."""
    if verification is None:
        return "not verified"
    text = "passed" if verification.passed else "FAILED"
    if verification.checks:
        worst = max(verification.checks, key=lambda c: math.inf if math.isnan(c.max_abs_error) else
                    c.max_abs_error / c.tolerance if c.tolerance > 0 else c.max_abs_error)
        text += (f": largest error {worst.max_abs_error:.1e}, tolerance {worst.tolerance:.1e} "
                 f"({clean(worst.name, 60)}, batch {worst.batch})")
    if not short:
        text += f"; compared with {clean(verification.reference, 120)}, computed by {clean(verification.engine, 120)}"
    if verification.first_difference:
        text += f"; first difference at {shorten(verification.first_difference, 120)}"
    return text


def operator_changes(manifest: Manifest) -> tuple[tuple[str, int, int], ...]:
    """(operator, count before, count after), the biggest change first."""
    before, after = manifest.operators.get("before", {}), manifest.operators.get("after", {})
    counts = [(clean(name, 60), before.get(name, 0), after.get(name, 0)) for name in {**before, **after}]
    return tuple(sorted(counts, key=lambda c: (-abs(c[1] - c[2]), -max(c[1], c[2]), c[0])))


def left_words(left: Sequence[Left]) -> tuple[tuple[str, tuple[str, ...]], ...]:
    """What stays beside the layers: (in words, names), those with the same reason in one line: `32 steps stay as given (16
    Concat, 16 Transpose, the first is cat_1): its channels come from 2 tensors`."""
    found: dict[str, list[tuple[str, str]]] = {}
    for step in left:
        operator, colon, why = step.reason.partition(": ")
        given = (operator, why) if colon and operator.isidentifier() else ("", step.reason)
        found.setdefault(clean(given[1], 300), []).append((clean(step.name, 80), clean(given[0], 40)))
    return tuple((_left_line(why, steps), tuple(name for name, _ in steps)) for why, steps in found.items())


def _left_line(why: str, steps: Sequence[tuple[str, str]]) -> str:
    (name, operator), *others = steps
    if not others:
        return f"{name} stays as given: {f'{operator}, ' if operator else ''}{why}"
    counts = Counter(operator for _, operator in steps if operator)
    kinds = "".join(f"{count:,} {kind}, " for kind, count in counts.most_common(4))
    return f"{len(steps):,} steps stay as given ({kinds}the first is {name}): {why}"


def why_text(layer: Layer) -> str:
    """Why the layer has its form; first, whether the runtime's fast kernel would take its branches as they stand."""
    reason = clean(layer.reason)
    if layer.branches < 2 or not layer.fast_kernel.startswith("no: "):
        return reason
    return f"no fast kernel ({clean(layer.fast_kernel.removeprefix('no: '), 80)}); {reason}"


def branches_text(layer: Layer) -> str:
    """Branches and the inputs of each: `8 x 4-7`."""
    return f"{layer.branches} x {span(layer.inputs_per_branch)}"
