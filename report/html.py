"""A conversion as one HTML page, and its head for notebooks: inline style and SVG, no script, nothing fetched from anywhere.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from gkp.files import write_file
from gkp.manifest import Manifest
from gkp.report import facts, roofline, wording
from gkp.require import require
from gkp.text import clean

_FILLERS = {"dense": "", "rival": "", "stock": "", "as_is": "given", "converted": "accent", "theoretical": "outline"}


@dataclass(frozen=True)
class Bar:
    """One horizontal bar. width, low, high: percent of the chart's width; low and high are None without a whisker.
    width is None when there is nothing to draw. text: the value in words. style: CSS class."""

    label: str
    text: str
    width: float | None
    low: float | None = None
    high: float | None = None
    style: str = ""


@dataclass(frozen=True)
class Chart:
    """Bars on one scale. mark: percent of the width where a reference line stands."""

    title: str
    bars: tuple[Bar, ...]
    mark: float | None = None

    @property
    def description(self) -> str:
        return "; ".join(f"{bar.label}: {bar.text}" for bar in self.bars)


def write_html(manifest: Manifest, path: Path) -> None:
    """Write the report of a conversion to `path`, complete or not at all. BackendMissingError without jinja2; FileError
    when the file cannot be written."""
    write_file(path, render_html(manifest).encode("utf-8"))


def require_jinja2() -> Any:
    """The package; to be asked for before a long conversion. BackendMissingError when it is not here."""
    return require("jinja2", "report", "the HTML report")


def render_html(manifest: Manifest) -> str:
    """The page as text. BackendMissingError without jinja2."""
    return _rendered("report.html.j2", m=manifest, heading="h1", **_head(manifest), **_body(manifest))


def render_notebook(manifest: Manifest) -> str:
    """The head of the page as a fragment, whose style touches nothing around it. BackendMissingError without jinja2."""
    return _rendered("notebook.html.j2", m=manifest, heading="div", **_head(manifest))


def _rendered(template: str, **view: Any) -> str:
    filters = {"ms": wording.milliseconds, "mega": wording.mega, "times": wording.times, "span": wording.span,
               "cross": wording.cross, "interval": wording.interval, "shorten": wording.shorten,
               "batch_name": wording.batch_name, "candidate_time": wording.candidate_time}
    return rendered("gkp.report", template, view, filters, _finalize)


def rendered(package: str, template: str, view: Mapping[str, Any], filters: Mapping[str, Any],
             finalize: Callable[[Any], Any]) -> str:
    """A template of a package as text. finalize: cleans what is about to be written: every string is cleaned on its way out
    and then escaped, whatever it is, so no template line can forget it. BackendMissingError without jinja2."""
    jinja2, folder = require_jinja2(), resources.files(package)
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True,
                                     lstrip_blocks=True, finalize=finalize,
                                     loader=jinja2.FunctionLoader(lambda name: folder.joinpath(name).read_text("utf-8")))
    environment.filters.update(filters)
    return str(environment.get_template(template).render(**view))


def _finalize(value: Any) -> Any:
    """Clean what is about to be written; text that the template itself marked as HTML stays."""
    if value is None:
        return wording.NOT_MEASURED
    return clean(value) if type(value) is str else value


def _head(manifest: Manifest) -> dict[str, Any]:
    return {
        "unknown": wording.NOT_MEASURED,
        "headline": wording.headline(manifest),
        "verdict": wording.verdict(manifest),
        "reference": wording.reference_name(manifest),
        "settings": wording.settings(manifest),
        "branched": sum(layer.branches > 1 and layer.macs_kept > 0 for layer in manifest.layers),
        "moves": sum(layer.macs_kept == 0 for layer in manifest.layers),
        "title": wording.shorten(Path(clean(manifest.source.path)).name, 80),
    }


def _body(manifest: Manifest) -> dict[str, Any]:
    settings, reference = wording.settings(manifest), wording.reference_name(manifest)
    return {
        "left": facts.left_words(manifest.left),
        "charts": [(s.name, latency_chart(s), speedup_chart(s, reference)) for s in settings],
        "tried": [(facts.tried_name(t), facts.tried_accuracy(t), facts.tried_times(t),
                   facts.tried_reason(t), t.taken) for t in manifest.tried],
        "accuracy_data": None if manifest.accuracy_data is None else facts.accuracy_data_words(manifest.accuracy_data),
        "work": work_chart(manifest),
        "layer_scale": max((max(n.macs_dense, n.macs_executed) for n in manifest.layers), default=0) or 1,
        "baseline": facts.baseline_words(manifest),
        "roof": roofline.picture(manifest),
        "verification": facts.verification_words(manifest.verification),
        "on_gpu": None if manifest.engine_verification is None else facts.verification_words(manifest.engine_verification),
        "engines": [(facts.engine_words(e), facts.engine_layers(e)) for e in manifest.engines],
        "operators": facts.operator_changes(manifest),
        "environment": tuple(_flat(manifest.environment)),
    }


def latency_chart(setting: wording.Setting) -> Chart:
    """Medians with quartile whiskers, in milliseconds."""
    scale = _scale(t for row in setting.rows if row.timing for t in (row.timing.median, row.timing.q3))
    bars = []
    for row in setting.rows:
        t = row.timing
        bars.append(Bar(row.label, row.missing or wording.NOT_MEASURED, None) if t is None else Bar(
            row.label, f"{wording.milliseconds(t.median)} ms", _percent(t.median, scale), _percent(t.q1, scale),
            _percent(t.q3, scale), _FILLERS[row.key]))
    return Chart(f"Milliseconds per call, {setting.name}", tuple(bars))


def speedup_chart(setting: wording.Setting, reference: str) -> Chart:
    """Speedups over the reference, beside the theoretical one; the mark stands at 1."""
    rows = [row for row in setting.rows if not row.is_reference and row.speedup is not None]
    theoretical = setting.theoretical
    ends = [row.interval.high if row.interval else row.speedup or 0.0 for row in rows]
    scale = _scale([1.0, theoretical or 0.0, *ends])
    bars = [Bar(row.label, row.speedup_text, _percent(row.speedup or 0.0, scale),
                _percent(row.interval.low, scale) if row.interval else None,
                _percent(row.interval.high, scale) if row.interval else None, _FILLERS[row.key]) for row in rows]
    if theoretical is not None:
        bars.append(Bar("theoretical", wording.times(theoretical), _percent(theoretical, scale),
                        style=_FILLERS["theoretical"]))
    return Chart(f"Speedup over {reference}, {setting.name}", tuple(bars), _percent(1.0, scale))


def work_chart(manifest: Manifest) -> Chart:
    """Multiply-accumulates of one image."""
    macs = manifest.macs
    rows = (("dense baseline", macs.dense, ""), ("kept weights", macs.kept, "outline"),
            ("executed", macs.executed, "accent"))
    scale = _scale(float(count) for _, count, _ in rows)
    return Chart("Multiply-accumulates for one image", tuple(
        Bar(label, f"{wording.mega(count)} M" + (f" ({count / macs.dense:.0%})" if macs.dense else ""),
            _percent(count, scale), style=style) for label, count, style in rows))


def _scale(values: Sequence[float] | Iterator[float]) -> float:
    """What the full width stands for."""
    return max((v for v in values if math.isfinite(v)), default=0.0) or 1.0


def _percent(value: float, scale: float) -> float:
    """Position on a chart, kept a little inside so that line ends are not cut off."""
    share = value / scale if math.isfinite(value) else 1.0
    return round(99.5 * min(max(share, 0.0), 1.0), 2)


def _flat(value: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    """(dotted key, value) of nested dictionaries; lists become one line."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _flat(item, f"{prefix}.{key}" if prefix else str(key))
    elif isinstance(value, (list, tuple)):
        yield prefix, ", ".join(str(item) for item in value) or "none"
    else:
        yield prefix, "unknown" if value is None else str(value)
