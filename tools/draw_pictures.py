"""Draws docs/pictures/one-form.svg from a layer of the example, and docs/pictures/edge-plans.svg from plans of `gkp split`.

usage: python tools/draw_pictures.py
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from html import escape
from pathlib import Path
from typing import Any

import msgspec

import gkp
from gkp.text import plural

ROOT = Path(__file__).resolve().parents[1]
PICTURES = ROOT / "docs" / "pictures"
EXAMPLE = ROOT / "examples" / "resnet20_cifar10" / "grouped.pt"
LAYER = "stage_3.1.conv_a"
LINK = "1gbe"
MODES = {"replicas": "requests take turns; each device has the whole network",
         "pipeline": "each device has consecutive blocks; one array moves",
         "spatial": "each device has some rows; those at the border move, in every layer",
         "branch": "each device has some groups; what others read moves, in every layer"}
_HUES = ("#2f6fc4", "#c4732b", "#2c8a4b", "#8a4fc4", "#b3372f", "#1f8b8b", "#a0912a", "#c44f8f")
_STYLE = """
    .card { fill: #ffffff; stroke: #d0d7de } .hole { fill: #eef0f2 }
    text { fill: #1f2328; font-size: 13px } .head { font-size: 15px; font-weight: 600 }
    .small { font-size: 12px; fill: #57606a }
    .track { fill: #eeefec } .run { fill: #1f6f8b } .run.odd { fill: #155062 } .grid { stroke: #e2e3df }
    .wire { stroke: #b9771a; stroke-width: 1.3; stroke-opacity: .75 } svg svg text { font-size: 11px; fill: #57606a }
    @media (prefers-color-scheme: dark) {
      .card { fill: #161b22; stroke: #3d444d } .hole { fill: #22272e } text { fill: #e6edf3 }
      .small, svg svg text { fill: #9da7b1 } .track { fill: #272c31 } .run { fill: #3f9dbd } .run.odd { fill: #6cc0db }
      .grid { stroke: #2e3439 } .wire { stroke: #dcae52 }
    }"""


def _page(width: int, height: int, title: str, description: str, body: Iterable[str]) -> str:
    return "\n".join([
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img" aria-labelledby="title desc"',
        "     font-family=\"ui-sans-serif, system-ui, 'Segoe UI', Helvetica, Arial, sans-serif\">",
        f'  <title id="title">{escape(title)}</title>', f'  <desc id="desc">{escape(description)}</desc>',
        f"  <style>{_STYLE}\n  </style>",
        f'  <rect class="card" x="1" y="1" width="{width - 2}" height="{height - 2}" rx="10"/>', *body, "</svg>", ""])


def _text(x: float, y: float, words: str, kind: str = "plain") -> str:
    return f'  <text class="{kind}" x="{x:g}" y="{y:g}">{escape(words)}</text>'


# ---- the one form ---------------------------------------------------------------------------------------------------
def form_picture(conv: gkp.BranchedConv, name: str) -> str:
    """A layer as its weight matrix (a row for each filter, a column for each input channel) and as its list of branches."""
    side, cell = 320, 320 / max(conv.in_channels, conv.out_channels)
    reads = {len(b.in_index) for b in conv.branches}
    told = f"{min(reads)}" if len(reads) == 1 else f"{min(reads)} to {max(reads)}"
    facts = (f"{len(conv.branches)} branches read {told} of {conv.in_channels} channels each; a channel is read "
             f"{conv.overlap:.2f} times on average")
    body = [_text(24, 34, "One weight matrix", "head"), _text(24, 53, f"{name}: {facts}", "small"),
            *_matrix(conv, 24, 96, cell), _text(24, 86, f"{conv.in_channels} input channels", "small"),
            _text(24, 96 + side + 20, f"one row for each of {conv.out_channels} filters; grey: not multiplied", "small"),
            _text(392, 86, "The one form: each branch as its two lists", "small"), *_lists(conv, 392, 96, side)]
    return _page(980, 96 + side + 40, "A grouped-pruned layer in the one form",
                 f"The layer {name} of the example. {facts}.", body)


def _matrix(conv: gkp.BranchedConv, x: float, y: float, cell: float) -> Iterator[str]:
    yield (f'  <rect class="hole" x="{x:g}" y="{y:g}" width="{cell * conv.in_channels:g}" '
           f'height="{cell * conv.out_channels:g}"/>')
    for number, branch in enumerate(conv.branches):
        steps = [f"M{x + first * cell:g} {y + int(f) * cell:g}h{(end - first) * cell:g}v{cell:g}h{-(end - first) * cell:g}z"
                 for f in sorted(branch.out_index) for first, end in _runs(branch.in_index.tolist())]
        yield f'  <path fill="{_hue(number)}" d="{"".join(steps)}"/>'


def _lists(conv: gkp.BranchedConv, x: float, y: float, height: float) -> Iterator[str]:
    """For each branch a strip of all input channels and one of all outputs, with those of its lists filled."""
    lane, strip = height / len(conv.branches), 236
    for number, branch in enumerate(conv.branches):
        top = y + number * lane
        yield _text(x, top + lane / 2 + 4, f"branch {number}")
        for at, words, channels, count in ((x + 66, "reads", branch.in_index, conv.in_channels),
                                           (x + 66 + strip + 18, "writes", branch.out_index, conv.out_channels)):
            cell, bar = strip / count, max(lane - 24, 6)
            yield _text(at, top + 11, f"{words} {len(channels)}", "small")
            yield f'  <rect class="hole" x="{at:g}" y="{top + 16:g}" width="{strip}" height="{bar:g}"/>'
            steps = [f"M{at + first * cell:g} {top + 16:g}h{(end - first) * cell:g}v{bar:g}h{-(end - first) * cell:g}z"
                     for first, end in _runs(sorted(channels.tolist()))]
            yield f'  <path fill="{_hue(number)}" d="{"".join(steps)}"/>'


def _runs(channels: list[int]) -> list[tuple[int, int]]:
    """(first, end) of the consecutive ones."""
    found: list[tuple[int, int]] = []
    for c in sorted(channels):
        if found and found[-1][1] == c:
            found[-1] = (found[-1][0], c + 1)
        else:
            found.append((c, c + 1))
    return found


def _hue(number: int) -> str:
    return _HUES[number % len(_HUES)]


# ---- the plans ------------------------------------------------------------------------------------------------------
def plan_panel(mode: str, folder: Path) -> str:
    """The picture of the example's plan for two devices, as `gkp split` draws it, with the devices' names beside it. folder:
    where the plan is written. CalledProcessError when it cannot be."""
    words = [sys.executable, "-m", "gkp.entry", "split", str(EXAMPLE), "--devices", "2", "--link", LINK, "--mode", mode,
             "-o", str(folder / mode), "-q"]
    subprocess.run(words, check=True)
    plan = msgspec.json.decode((folder / mode / "plan.json").read_bytes())
    return "\n".join(_panel(mode, plan, (folder / mode / "plan.html").read_text(encoding="utf-8")))


def _panel(mode: str, plan: dict[str, Any], page: str) -> Iterator[str]:
    found = re.search(r'<svg role="img"[^>]*?height="(\d+)">(.*?)</svg>', page, re.DOTALL)
    if found is None:
        raise ValueError("plan.html has no picture")
    drawing = re.sub(r"\s*<(title|desc)\b.*?</\1>|\n\s*(?=\n)", "", found[2], flags=re.DOTALL)
    predicted = plan["predicted"]
    moved = f"{plural(predicted['messages'], 'message')} of {predicted['bytes']:,} bytes in all"
    yield _text(24, 24, mode, "head")
    yield _text(110, 24, f"{MODES[mode]}. One request: {predicted['critical_path_ms']:.3g} ms; "
                         f"{moved if predicted['messages'] else 'nothing between devices'}", "small")
    for row, name in enumerate(["coordinator", *(device["name"] for device in plan["devices"])]):
        yield _text(24, 36 + 14 + 52 * row + 15, name, "small")
    yield f'  <svg x="110" y="36" width="840" height="{found[1]}">{drawing}</svg>'


def plans_picture(panels: list[str]) -> str:
    """The panels of all modes, one below the other."""
    height = 256
    body = [f'<g transform="translate(0 {12 + height * number})">\n{panel}\n</g>' for number, panel in enumerate(panels)]
    return _page(980, 24 + height * len(panels), "Plans of gkp split for two devices",
                 f"The example network in {len(panels)} modes, over {LINK}: devices down, predicted milliseconds across. "
                 "Bars are segments that a device computes, lines are messages.", body)


def main() -> int:
    """See the module."""
    (PICTURES / "one-form.svg").write_text(form_picture(gkp.open(EXAMPLE).layers[LAYER], LAYER), encoding="utf-8")
    with tempfile.TemporaryDirectory() as folder:
        panels = [plan_panel(mode, Path(folder)) for mode in MODES]
    (PICTURES / "edge-plans.svg").write_text(plans_picture(panels), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
