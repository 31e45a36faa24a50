"""What every terminal table here is made of. Every string is a `Text`: rich markup in a stranger's names is shown, not
obeyed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Column, Table
from rich.text import Text

from gkp.manifest import Ratio
from gkp.report.wording import NOT_MEASURED, interval
from gkp.text import clean


def table(*columns: Column, ruled: bool = False, caption: str = "", **more: Any) -> Table:
    """A table without a frame. ruled: a line under the headings; more: what rich's Table takes."""
    made = Table(*columns, box=SIMPLE_HEAD if ruled else None, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0),
                 header_style="dim", **more)
    made.caption, made.caption_justify = Text(caption, "dim") if caption else None, "left"
    return made


def left(heading: str = "", **more: Any) -> Column:
    """more: what rich's Column takes."""
    return Column(Text(heading), **more)


def right(heading: str = "", **more: Any) -> Column:
    """Numbers: never broken into lines."""
    return Column(Text(heading), justify="right", no_wrap=True, **more)


def colour(ratio: Ratio | None) -> str:
    """Green where the whole interval is above 1 (faster), red where it is below, else none."""
    return "" if ratio is None else "green" if ratio.low > 1 else "red" if ratio.high < 1 else ""


def ratio_text(ratio: Ratio | None, words: Callable[[Ratio], str] = interval) -> Text:
    """In its colour; a dash for none."""
    return Text("-", "dim") if ratio is None else Text(words(ratio), colour(ratio))


def missing_lines(found: Iterable[tuple[str, str | None]], between: str = ", ") -> Iterator[Text]:
    """What was not measured and why, each reason once. found: (what, why or None)."""
    reasons: dict[str, dict[str, None]] = {}
    for what, why in found:
        if why is not None:
            reasons.setdefault(clean(why, 200), {})[clean(what, 60)] = None
    for why, names in reasons.items():
        yield Text(f"{NOT_MEASURED}: {between.join(names)}: {why}", "yellow")
