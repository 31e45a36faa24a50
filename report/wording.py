"""What a manifest says, in words and rounded numbers; shared by the terminal tables and the HTML page.

Strings that come from a model or a file (names, paths, reasons) go through `gkp.text.clean` before they are shown.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from gkp.manifest import CandidateTime, Latencies, Load, Manifest, Measurement, Ratio, Rival, Speedup, Timing
from gkp.text import clean, plural

NOT_MEASURED = "not measured"
ROW_LABELS = {"dense": "dense baseline", "as_is": "as given", "converted": "converted"}
ENGINES = {"ort": "ONNX Runtime", "openvino": "OpenVINO", "ncnn": "ncnn", "native": "native kernels"}
_RIVALS = {"dense": "dense", "as_is": "as given"}
_EXPECTED_LOSS = 0.9
"""Ratio of two estimates: closer to 1 they tell nothing apart."""
FASTER_NOTE = "above 1 is faster"


def shorten(text: object, width: int) -> str:
    """`clean` text cut in the middle to `width` characters: both ends of a layer's name tell layers apart."""
    line = clean(text)
    if len(line) <= width:
        return line
    head = (width - 1) // 2
    return f"{line[:head]}…{line[head + 1 - width:]}"


def milliseconds(value: float) -> str:
    """Three significant digits, without an exponent where that is readable."""
    if not math.isfinite(value):
        return str(value)
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}" if value >= 1 else f"{value:#.3g}"


def mega(count: int) -> str:
    """A count in millions, without the unit."""
    value = count / 1e6
    if value >= 1000:
        return f"{value:,.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}" if value >= 0.01 or not count else f"{value:.1g}"


def mebibytes(count: int) -> str:
    """Bytes in MiB, with the unit."""
    return f"{count / 2**20:.3g} MiB" if count >= 1 << 14 else f"{count} B"


def times(value: float) -> str:
    """A speedup: `1.31x`."""
    return f"{value:.2f}x"


def interval(ratio: Ratio) -> str:
    """A speedup with its 95 % interval: `1.31x (1.29 to 1.33)`."""
    return f"{times(ratio.value)} ({ratio.low:.2f} to {ratio.high:.2f})"


def span(values: Sequence[int]) -> str:
    """`9` when all are equal, else `4-7`; `-` when there are none."""
    if not values:
        return "-"
    return str(min(values)) if min(values) == max(values) else f"{min(values)}-{max(values)}"


def cross(sizes: Sequence[int]) -> str:
    """Sizes as people write them: `3x3`."""
    return "x".join(str(s) for s in sizes) or "-"


def candidate_time(candidate: CandidateTime) -> str | None:
    """Measured milliseconds, else estimated ones marked so, else None."""
    if candidate.ms is not None:
        return f"{milliseconds(candidate.ms)} ms"
    return None if candidate.estimated_ms is None else f"{milliseconds(candidate.estimated_ms)} ms (estimated)"


def setting_name(batch: int, threads: int) -> str:
    return f"batch {batch}, {plural(threads, 'thread')}"


def batch_name(key: str) -> str:
    """The label of a key of CandidateTime.ratios."""
    return f"batch {key}" if key.isdecimal() else clean(key, 40)


@dataclass(frozen=True)
class SettingRow:
    """One row of a setting. speedup: reference time / this time, None when not measured; interval: its 95 % interval where
    there is one. key: dense, rival, stock (the model itself in a stock engine), as_is or converted; converted: time of
    this / converted, of a rival or a stock engine; missing: why a rival has no time."""

    key: str
    label: str
    timing: Timing | None
    speedup: float | None
    interval: Ratio | None
    is_reference: bool
    converted: Ratio | None = None
    missing: str | None = None

    @property
    def wins(self) -> bool:
        """Is it faster than the converted model beyond doubt?"""
        return self.converted is not None and self.converted.high < 1

    @property
    def speedup_text(self) -> str:
        if self.timing is not None and self.is_reference:
            return "1.00x (reference)"
        if self.interval is not None:
            return interval(self.interval)
        return NOT_MEASURED if self.speedup is None else times(self.speedup)


@dataclass(frozen=True)
class Setting:
    """One measured setting: its name, and the dense baseline, its other rivals, the model in a stock engine, as given and
    converted, in order."""

    name: str
    rows: tuple[SettingRow, ...]
    theoretical: float | None

    @property
    def as_given(self) -> SettingRow:
        return self.rows[-2]

    @property
    def converted(self) -> SettingRow:
        return self.rows[-1]

    @property
    def lost(self) -> tuple[SettingRow, ...]:
        """The rivals that are faster than the converted model beyond doubt, but for the reference."""
        return tuple(row for row in self.rows if row.wins and row.key == "rival")


def reference_key(manifest: Manifest) -> str:
    """What speedups are relative to: `dense`, or `as_is` for a model without a dense ancestor."""
    return "as_is" if manifest.baseline is not None and manifest.baseline.kind == "as_is" else "dense"


def reference_name(manifest: Manifest) -> str:
    if reference_key(manifest) != "dense":
        return "the model as given"
    engines = max((len(_same_precision(manifest, m.rivals)) for m in manifest.measurements), default=0)
    if not engines:
        return "the dense baseline"
    return f"{'the fastest dense' if engines > 1 else 'dense'} {clean(manifest.precision, 20)}"


def settings(manifest: Manifest) -> tuple[Setting, ...]:
    """Every setting in which something was measured, the one that the headline speaks of first."""
    measured = [m for m in manifest.measurements if _any_timing(m.latency_ms)]
    measured.sort(key=lambda m: m.latency_ms != manifest.latency_ms)
    if measured:
        return tuple(_setting(manifest, setting_name(m.batch, m.threads), m) for m in measured)
    if _any_timing(manifest.latency_ms):
        return (_setting(manifest, _declared_setting(manifest), manifest),)
    return ()


def _declared_setting(manifest: Manifest) -> str:
    """The declared batch and threads, for a manifest that lists no settings."""
    batch = manifest.inputs[0].shape[0] if manifest.inputs and manifest.inputs[0].shape else None
    name = setting_name(batch if isinstance(batch, int) else 0, manifest.threads)
    return name if isinstance(batch, int) else name.partition(", ")[2]


def _any_timing(latencies: Latencies) -> bool:
    return any(t is not None for t in (latencies.dense, latencies.as_is, latencies.converted))


def _setting(manifest: Manifest, name: str, measured: Measurement | Manifest) -> Setting:
    latencies, speedup = measured.latency_ms, measured.speedup
    reference = reference_key(manifest)
    base = latencies.dense if reference == "dense" else latencies.as_is
    rivals = measured.rivals if isinstance(measured, Measurement) else []
    stock = fastest_rival(measured.stock) if isinstance(measured, Measurement) else None
    first = fastest_rival(_same_precision(manifest, rivals)) if reference == "dense" else None
    dense = _row("dense", latencies.dense, base, reference, None, rival_name(first) if first else "")
    return Setting(name, (
        *([dense] if latencies.dense is not None or not rivals else []),
        *(_rival_row("rival", rival, base, reference) for rival in _others(manifest, rivals)),
        *([_rival_row("stock", stock, base, reference)] if stock else []),
        _row("as_is", latencies.as_is, base, reference, None),
        _row("converted", latencies.converted, base, reference, _converted_ratio(speedup, reference)),
    ), speedup.theoretical if speedup.theoretical is not None else manifest.speedup.theoretical)


def _converted_ratio(speedup: Speedup, reference: str) -> Ratio | None:
    return speedup.vs_dense if reference == "dense" else speedup.vs_as_is


def _row(key: str, timing: Timing | None, base: Timing | None, reference: str, ratio: Ratio | None,
         label: str = "") -> SettingRow:
    value = ratio.value if ratio is not None else None
    if value is None and timing is not None and base is not None and timing.median > 0:
        value = base.median / timing.median
    return SettingRow(key, label or ROW_LABELS[key], timing, value, ratio, key == reference)


# ---- rivals ---------------------------------------------------------------------------------------------------------
def rival_name(rival: Rival, model: str = "dense") -> str:
    """`dense fp32, ONNX Runtime`, `OpenVINO as installed, bf16`. model: what runs on it."""
    engine, precision = ENGINES.get(rival.engine, clean(rival.engine, 20)), clean(rival.precision or "", 10)
    if not rival.as_installed:
        return f"{model} {precision}, {engine}"
    return f"{engine} as installed" + (f", {precision}" if precision else "")


def fastest_rival(rivals: Sequence[Rival]) -> Rival | None:
    """None: none of them was measured."""
    return min((r for r in rivals if r.ms is not None), key=lambda r: r.ms.median if r.ms else math.inf, default=None)


def _same_precision(manifest: Manifest, rivals: Sequence[Rival]) -> list[Rival]:
    return [r for r in rivals if r.precision == manifest.precision and not r.as_installed and r.ms is not None]


def fastest_of_kinds(rivals: Sequence[Rival]) -> list[Rival]:
    """The fastest in every precision, and as installed; where none was measured, one that says why."""
    kinds: dict[str | None, list[Rival]] = {}
    for rival in rivals:
        kinds.setdefault(None if rival.as_installed else rival.precision, []).append(rival)
    return [fastest_rival(found) or found[0] for found in kinds.values()]


def _others(manifest: Manifest, rivals: Sequence[Rival]) -> list[Rival]:
    """The kinds but for that of a dense reference."""
    told = manifest.precision if reference_key(manifest) == "dense" else None
    return [rival for rival in fastest_of_kinds(rivals) if rival.as_installed or rival.precision != told]


def _rival_row(key: str, rival: Rival, base: Timing | None, reference: str) -> SettingRow:
    label = rival_name(rival, _RIVALS[reference] if key == "rival" else "this model,")
    return replace(_row(key, rival.ms, base, reference, None, label), converted=rival.ratio, missing=rival.missing)


def _lost(shown: Sequence[Setting], model: str) -> str:
    """Which rivals are faster, and in which settings. model: what runs on them."""
    found: dict[str, list[str]] = {}
    for setting in shown:
        for row in setting.lost:
            if row.converted is not None:
                name = row.label if row.label.startswith(model) else f"{model} on {row.label}"
                found.setdefault(name, []).append(f"{times(row.converted.value)} at {setting.name}")
    return ", ".join(f"slower than {name} ({'; '.join(where)})" for name, where in found.items())


def _outrun(manifest: Manifest) -> str:
    """Of a target with kernels of its own: which stock engine is faster, with the model itself or the dense network, and
    what to do. "": none is."""
    found: dict[str, list[str]] = {}
    fix: dict[str, None] = {}
    for m in manifest.measurements:
        best = fastest_rival([*m.stock, *_same_precision(manifest, m.rivals)]) if m.stock else None
        if best is None or best.ratio is None or best.ratio.value >= 1:
            continue
        model = "this model" if best in m.stock or reference_key(manifest) != "dense" else "the dense network"
        sure = "faster" if best.ratio.high < 1 else "about as fast or faster"
        engine = ENGINES.get(best.engine, clean(best.engine, 20))
        where = f"{times(1 / best.ratio.value)} at {setting_name(m.batch, m.threads)}"
        found.setdefault(f"{engine} runs {model} {sure}", []).append(where)
        fix[f"--target {clean(best.engine, 20)}"] = None
    told = ", ".join(f"{words} ({'; '.join(where)})" for words, where in found.items())
    return f"{told}: {' or '.join(['--target cpu', *fix])} uses that" if told else ""


def _estimated_slower(manifest: Manifest) -> str:
    """"": it was measured, or the cost models expect no loss."""
    found = manifest.estimated_vs_stock
    if found is None or found > _EXPECTED_LOSS:
        return ""
    return (f"estimated slower than a stock engine, {times(found)} by the cost models: leave --no-benchmark out, or use "
            "--target cpu")


def load_words(loads: Iterable[Load | None]) -> str:
    """`measured under load: others took 35 % of the processor time`; "" where they did not, or nothing is known."""
    shares = [load.taken for load in loads if load is not None and load.heavy and load.taken is not None]
    return f"measured under load: others took {100 * max(shares):.0f} % of the processor time" if shares else ""


# ---- the headline ---------------------------------------------------------------------------------------------------
def verdict(manifest: Manifest) -> str:
    """`faster` (the interval is above 1 in every setting, and no rival is faster), `mixed` (in some but not in all, or than
    some), `dense` (nothing beat dense), `slower`, `same` or `unmeasured`."""
    kind = _kind(manifest)
    beaten = any(s.lost for s in settings(manifest)) or bool(_outrun(manifest))
    return "mixed" if kind == "faster" and beaten else kind


def _kind(manifest: Manifest) -> str:
    """The verdict by the reference alone."""
    ratios = [s.converted.interval for s in settings(manifest)]
    known = [r for r in ratios if r is not None]
    if not ratios or ratios[0] is None:
        return "unmeasured"
    if all(r.low > 1 for r in known):
        return "faster"
    if manifest.layers and all(layer.chosen.startswith("dense") for layer in manifest.layers):
        return "dense"
    if ratios[0].low > 1:
        return "mixed"
    return "slower" if ratios[0].high < 1 else "same"


def headline(manifest: Manifest) -> str:
    """One honest sentence: whether anything was changed, which engines are faster, what the conversion gained, in which
    setting, what was to be gained, which network a state dict was assumed to be, when int8 was calibrated with no images,
    and when others used the processor meanwhile."""
    lost = _lost(settings(manifest), _RIVALS[reference_key(manifest)])
    parts = (_unchanged(manifest), _outrun(manifest), _estimated_slower(manifest), lost, _gain(manifest))
    text = "; ".join(part for part in parts if part)
    if manifest.source.assumed:
        text = f"{text}; assumed {clean(manifest.source.assumed, 200)}"
    if manifest.calibration is not None and manifest.calibration.kind == "random":
        text = f"{text}; calibrated with random numbers: for timing only"
    if load := load_words(m.load for m in manifest.measurements):
        text = f"{text}; {load}"
    if manifest.verification is not None and not manifest.verification.passed:
        text = f"verification failed; {text}"
    return text


def _unchanged(manifest: Manifest) -> str:
    """"": something was changed, or nobody knows."""
    start = "written unchanged" if manifest.files else "unchanged"
    return f"{start}: operators and weights are those of the model as given" if manifest.unchanged else ""


def _gain(manifest: Manifest) -> str:
    shown, kind, reference = settings(manifest), _kind(manifest), reference_name(manifest)
    theory = "" if manifest.speedup.theoretical is None else f"theoretical {times(manifest.speedup.theoretical)}"
    ratio = shown[0].converted.interval if shown else None
    if ratio is None:
        start = "engines built, not run here: " if manifest.engines else ""
        return f"{start}speed {NOT_MEASURED}" + (f"; {theory} from the multiply-accumulates kept" if theory else "")
    where = f"({_where(shown)})"
    if kind == "dense":
        start = ("dense was written, as asked" if manifest.strategy == "dense"
                 else "no form beats dense on this runtime: dense was written")
        given = shown[0].as_given
        if given.is_reference:
            return f"{start} ({times(ratio.value)} of {reference})"
        tail = "" if given.speedup is None else f"; as given the model runs at {times(given.speedup)}"
        return f"{start} ({times(ratio.value)}){tail}"
    text = {
        "faster": f"{times(ratio.value)} faster than {reference} {where}",
        "mixed": f"{times(ratio.value)} faster than {reference} {where}, but not in every setting",
        "slower": f"slower than {reference}: {times(ratio.value)} {where}",
        "same": f"no measurable difference from {reference}: {times(ratio.value)} {where}",
    }[kind]
    return f"{text}; {theory}" if theory else text


def _where(shown: Sequence[Setting]) -> str:
    """The first setting, and what the others gave."""
    first, *others = shown
    known = [(s.name, s.converted.interval.value) for s in others if s.converted.interval is not None]
    if not known or first.converted.interval is None:
        return first.name
    if len(known) == 1:
        return f"{first.name}; {times(known[0][1])} at {known[0][0]}"
    values = [first.converted.interval.value, *(value for _, value in known)]
    return f"{first.name}; {times(min(values))} to {times(max(values))} over {len(values)} settings"
