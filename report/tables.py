"""A conversion in the terminal: rich renderables that fit 80 columns and use more when there are more.

Nothing here prints. Every string is a `Text`: rich markup in a model's names is shown, not obeyed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.measure import Measurement
from rich.table import Column, Table
from rich.text import Text

from gkp.manifest import CandidateTime, Layer, Manifest, Tried
from gkp.report import facts, wording
from gkp.report.kit import colour, left, right, table
from gkp.text import clean

WIDE = 100
"""From this many columns on, the less important columns are shown too."""
_MOST_OPERATORS = 3
_VERDICT_STYLES = {"faster": "bold green", "mixed": "bold yellow", "slower": "bold red"}


def conversion_table(manifest: Manifest, verbose: bool = False) -> RenderableType:
    """Headline, the rows of every measured setting, the precisions that were tried, then work, operators, verification,
    baseline and notes. verbose: every step that stays beside the layers, not only their number."""
    style = _VERDICT_STYLES.get(wording.verdict(manifest), "bold")
    settings = wording.settings(manifest)
    measured = [_latencies(manifest, settings), Text()] if settings else []
    tried = (tried_table(manifest.tried), Text()) if manifest.tried else ()
    return Group(Text(wording.headline(manifest), style), Text(), *measured, *tried, _facts(manifest, verbose))


def layer_table(manifest: Manifest) -> RenderableType:
    """One row per branched convolution, and why they have their forms."""
    return _LayerTable(tuple(manifest.layers))


def candidates_table(layer: Layer) -> RenderableType:
    """The forms tried for one layer: multiply-accumulates (millions) that each really executes, and its time or speedup
    over another form, measured in context, where any was."""
    measured = any(candidate.ratios for candidate in layer.candidates)
    versus = f"whole model vs {wording.shorten(layer.versus or 'default', 20)}"
    out = table(left("candidate", overflow="fold"), right("MACs run"), right("time"),
                *([_fixed(versus)] if measured else []), ruled=True)
    for candidate in layer.candidates:
        chosen = candidate.name == layer.chosen
        out.add_row(Text(wording.shorten(candidate.name, 40) + (" (chosen)" if chosen else "")),
                    Text(f"{wording.mega(candidate.macs_executed)} M"), _quiet(wording.candidate_time(candidate)),
                    *([_ratios(candidate)] if measured else []), style="bold" if chosen else "")
    title = Text.assemble((wording.shorten(layer.name, 60), "bold"), ": ", clean(layer.reason))
    return Group(title, out)


def tried_table(tried: Sequence[Tried]) -> RenderableType:
    """The precisions that were tried: accuracy and time, where any was measured, and why each was taken or not."""
    cells = {"accuracy": [facts.tried_accuracy(row) for row in tried],
             "median ms": [times and times.replace("; ", "\n") for times in map(facts.tried_times, tried)]}
    shown = {heading: column for heading, column in cells.items() if any(column)}
    out = table(left("precision", overflow="fold"), *map(left, shown), left("why"), ruled=True)
    for number, row in enumerate(tried):
        out.add_row(Text(facts.tried_name(row)), *(_quiet(column[number]) for column in shown.values()),
                    Text(facts.tried_reason(row)), style="bold" if row.taken else "")
    return out


def _latencies(manifest: Manifest, settings: Sequence[wording.Setting]) -> RenderableType:
    versus = f"speedup vs {'dense' if wording.reference_key(manifest) == 'dense' else 'as given'}"
    caption = f"speedup: ratio in interleaved rounds, 95 % interval; {wording.FASTER_NOTE}"
    out = table(left(overflow="fold"), right("median ms"), right("quartiles"), _fixed(versus), ruled=True, caption=caption)
    for setting in settings:
        out.add_row(Text(setting.name, "bold"))
        for row in setting.rows:
            out.add_row(*_timing_cells(row), style="bold" if row.key == "converted" else "")
        out.add_section()
    theoretical = manifest.speedup.theoretical
    out.add_row(Text("theoretical"), Text(), Text(), _quiet(None if theoretical is None else wording.times(theoretical)))
    return out


def _timing_cells(row: wording.SettingRow) -> list[Text]:
    label = Text(f"  {row.label}", "bold red" if row.wins else "")
    if row.timing is None:
        told = (Text(), Text(), _why(row.missing)) if row.missing else (_quiet(None), _quiet(None), _quiet(None))
        return [label, *told]
    median, q1, q3 = map(wording.milliseconds, (row.timing.median, row.timing.q1, row.timing.q3))
    return [label, Text(median), Text(f"{q1} to {q3}"), Text(row.speedup_text, colour(row.interval))]


def _facts(manifest: Manifest, verbose: bool) -> RenderableType:
    """Two columns: what, and the sentence that says it."""
    grid = Table.grid(padding=(0, 2, 0, 1))
    grid.add_column(no_wrap=True, style="dim")
    grid.add_column(overflow="fold")
    macs = manifest.macs
    grid.add_row(Text("MACs"), Text(f"{wording.mega(macs.dense)} M (one image)" if macs.dense == macs.kept == macs.executed
                                    else f"dense {wording.mega(macs.dense)} M, kept {wording.mega(macs.kept)} M, "
                                         f"executed {wording.mega(macs.executed)} M (one image)"))
    grid.add_row(Text("Parameters"), Text(f"{wording.mega(manifest.params)} M"))
    if manifest.memory is not None:
        grid.add_row(Text("Memory"), Text(facts.memory_words(manifest.memory)))
    changes = facts.operator_changes(manifest)
    if changes:
        grid.add_row(Text("Operators"), Text(_operators(changes, len(changes) if verbose else _MOST_OPERATORS)))
    check = manifest.verification
    grid.add_row(Text("Verified"), Text(facts.verification_words(check, short=not verbose),
                                        "" if check is None else "green" if check.passed else "bold red"))
    if manifest.engine_verification is not None:
        passed = manifest.engine_verification.passed
        grid.add_row(Text("On the GPU"), Text(facts.verification_words(manifest.engine_verification, short=not verbose),
                                              "green" if passed else "bold red"))
    for engine in manifest.engines:
        grid.add_row(Text("Engine"), Text(facts.engine_words(engine)))
    if manifest.accuracy_data is not None:
        grid.add_row(Text("Accuracy"), Text(facts.accuracy_data_words(manifest.accuracy_data)))
    grid.add_row(Text("Baseline"), Text(facts.baseline_words(manifest, short=not verbose)))
    for note in manifest.notes:
        grid.add_row(Text("Note"), Text(clean(note, 400)))
    steps = [[step] for step in manifest.left] if verbose else [manifest.left]
    for words, _ in (line for some in steps for line in facts.left_words(some)):
        grid.add_row(Text("Note"), Text(words))
    return grid


def _operators(changes: Sequence[tuple[str, int, int]], most: int) -> str:
    """`all 59 -> 21, Gather 38 -> 0 and 2 more`; what did not change is summed up."""
    if all(before == after for _, before, after in changes):
        return f"all {sum(c[1] for c in changes)} as before"
    changed = [f"{name} {before} -> {after}" for name, before, after in changes if before != after]
    total = f"all {sum(c[1] for c in changes)} -> {sum(c[2] for c in changes)}"
    more = f" and {len(changed) - most} more" if len(changed) > most else ""
    return ", ".join([total, *changed[:most]]) + more


def _why(missing: str) -> Text:
    return Text(wording.shorten(missing, 26), "dim")


def _ratios(candidate: CandidateTime) -> Text:
    if not candidate.ratios:
        return _quiet(None)
    return Text("\n".join(f"{wording.batch_name(key)}: {wording.interval(r)}" for key, r in candidate.ratios.items()))


def _quiet(text: str | None) -> Text:
    return Text(wording.NOT_MEASURED, "dim") if text is None else Text(text)


def _fixed(heading: str) -> Column:
    """Words that are not broken into lines."""
    return left(heading, no_wrap=True)


@dataclass(frozen=True)
class _LayerTable:
    """Chooses its columns by the width at hand when it is drawn. Reasons stand below it, each once, by their numbers."""

    layers: tuple[Layer, ...]

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        return Measurement(min(40, options.max_width), options.max_width)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        if not self.layers:
            yield Text("no branched convolution in this model", "dim")
            return
        wide = options.max_width >= WIDE
        numbers = ("branches", "inputs", "overlap", "dense", "kept", "run") if wide else ("branches", "dense", "kept")
        out = table(_fixed("layer"), right("channels"), *map(right, numbers), _fixed("form"), right("why"), ruled=True)
        reasons: dict[str, int] = {}
        for layer in self.layers:
            number = reasons.setdefault(facts.why_text(layer), len(reasons) + 1)
            out.add_row(*_layer_cells(layer, options.max_width, wide), Text(str(number), "dim"))
        yield out
        yield Text(_LEGEND if wide else _NARROW_LEGEND, "dim")
        yield Text()
        why = Table.grid(padding=(0, 1, 0, 0))
        why.add_column(justify="right", no_wrap=True, style="dim")
        why.add_column(overflow="fold")
        for reason, number in reasons.items():
            why.add_row(Text(f"{number}:"), Text(reason))
        yield why


_LEGEND = ("inputs: channels that a branch reads; overlap: channel reads / distinct channels read; dense, kept, run: "
           "multiply-accumulates for one image, millions; why: see below")
_NARROW_LEGEND = "branches: how many x inputs of each; dense, kept: MACs for one image, millions"


def _layer_cells(layer: Layer, width: int, wide: bool) -> list[Text]:
    name = Text(wording.shorten(layer.name, min(40, width // 4) if wide else 22))
    channels = Text("{} > {}".format(*layer.channels) if wide else "{}>{}".format(*layer.channels))
    macs = [Text(wording.mega(n)) for n in (layer.macs_dense, layer.macs_kept)]
    form = Text(wording.shorten(layer.chosen, 24 if wide else 12), "" if layer.chosen == "dense" else "green")
    if not wide:
        return [name, channels, Text(facts.branches_text(layer)), *macs, form]
    return [name, channels, Text(str(layer.branches)), Text(wording.span(layer.inputs_per_branch)),
            Text(f"{layer.overlap:.2f}"), *macs, Text(wording.mega(layer.macs_executed)), form]
