"""The zoo suite in the terminal: a few lines for every model, then what follows. Fits 80 columns."""

from __future__ import annotations

from collections.abc import Iterator

from rich.console import Group, RenderableType
from rich.text import Text

from gkp.benchmarks.zoo.results import AS_FAST, Conclusions, ZooBench, ZooModel, ZooRow, conclude, missing
from gkp.report import wording
from gkp.report.kit import left, missing_lines, ratio_text, right, table
from gkp.text import clean, plural


def zoo_tables(found: ZooBench) -> RenderableType:
    """Everything."""
    return Group(*model_tables(found), *missing_lines(missing(found), between="; "), *conclusions(found))


def model_tables(found: ZooBench) -> Iterator[RenderableType]:
    """Per model a line with the stock engines, and a table of its variants on the native kernels."""
    shown = [model for model in found.models if model.missing is None]
    for number, model in enumerate(shown):
        yield Text(f"\n{wording.shorten(model.name, 40)}", "bold")
        yield Text(f"  dense: {stock_words(model)}")
        out = table(left("  native kernels", width=30), right("ms", width=7), right("speedup (95 %)", width=20),
                    right("theoretical", width=11), right("/ root", width=7), show_header=number == 0)
        for row in model.rows:
            out.add_row(*_cells(row))
        yield out
    if shown:
        yield Text(f"\n*: the fastest stock engine; speedup: over the dense network on it, {wording.FASTER_NOTE}; "
                   "/ root: speedup / sqrt(theoretical)", "dim")


def stock_words(model: ZooModel) -> str:
    """`ONNX Runtime 12.3 ms*, OpenVINO 13.1 ms, ncnn -`."""
    return ", ".join(f"{wording.ENGINES[row.engine]} " + (
        "-" if row.ms is None else f"{wording.milliseconds(row.ms.median)} ms{'*' * (row.engine == model.fastest)}")
        for row in model.stock)


def model_words(model: ZooModel) -> str:
    """`resnet18: dense 1.21x, block 1.66x, tmi not measured`, of the native kernels."""
    told = [f"{row.variant} {wording.NOT_MEASURED if row.speedup is None else wording.times(row.speedup.value)}"
            for row in model.rows]
    return f"{clean(model.name, 60)}: {model.missing or ', '.join(told)}"


def _cells(row: ZooRow) -> list[Text]:
    limit = "-" if row.theoretical is None else wording.times(row.theoretical)
    root = "-" if row.per_root is None else f"{row.per_root.value:.2f}"
    return [Text(f"  {name_of(row)}"), Text("-" if row.ms is None else wording.milliseconds(row.ms.median)),
            ratio_text(row.speedup), Text(limit), Text(root)]


def name_of(row: ZooRow) -> str:
    """`block, hybrid (Resize)`: ONNX Runtime runs the Resize."""
    return row.variant + (f", hybrid ({clean(', '.join(row.foreign), 60)})" if row.foreign else "")


def conclusions(found: ZooBench) -> Iterator[Text]:
    """The rows below 1 first."""
    if any(model.rows for model in found.models):
        yield Text("")
        yield from (Text(line, "bold") for line in sentences(conclude(found)))
    if found.left:
        yield Text(f"not measured yet: {', '.join(clean(name, 60) for name in found.left)}", "yellow")


def sentences(told: Conclusions) -> Iterator[str]:
    """What was found, in words."""
    names = [f"{row.model} {row.variant} {row.per_root.value:.2f}" for row in told.below]
    yield f"below 1: {'; '.join(names) if names else 'no row'}"
    if told.dense is not None:
        yield (f"dense: {wording.times(told.dense)} the fastest stock engine (geometric mean of "
               f"{plural(told.dense_rows, 'model')}); {told.as_fast} of {told.dense_rows} at {AS_FAST}x or more")
    for name, mean in told.masked.items():
        yield (f"masked{f', {name}' if name else ''}: speedup / sqrt(theoretical) {mean:.2f} (geometric mean of "
               f"{plural(told.rows[name], 'row')})")
