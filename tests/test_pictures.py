"""The pictures in docs/ are what tools/draw_pictures.py draws, from the example and from a plan of `gkp split`."""

from __future__ import annotations

import re
from pathlib import Path
from xml.etree import ElementTree

import draw_pictures
import pytest

import gkp

AGAIN = "python tools/draw_pictures.py draws it again"


def test_the_one_form_is_that_of_the_examples_layer() -> None:
    conv = gkp.open(draw_pictures.EXAMPLE).layers[draw_pictures.LAYER]
    picture = draw_pictures.form_picture(conv, draw_pictures.LAYER)
    assert (draw_pictures.PICTURES / "one-form.svg").read_text(encoding="utf-8") == picture, AGAIN
    # A cell of the matrix for each kernel that is kept, and none for the others.
    matrix = [path.get("d", "") for path in ElementTree.fromstring(picture).iter("{http://www.w3.org/2000/svg}path")][:len(conv.branches)]
    cell = 320 / conv.in_channels
    widths = [[float(w) for w in re.findall(r"h([\d.]+)v", path)] for path in matrix]
    assert [round(sum(w) / cell) for w in widths] == [len(b.in_index) * len(b.out_index) for b in conv.branches]


def test_a_plan_is_drawn_as_split_draws_it(tmp_path: Path) -> None:
    panel = draw_pictures.plan_panel("pipeline", tmp_path)
    picture = (draw_pictures.PICTURES / "edge-plans.svg").read_text(encoding="utf-8")
    assert panel in picture, AGAIN
    assert panel.count('class="run') == (tmp_path / "pipeline" / "plan.json").read_text().count('"file":')


@pytest.mark.parametrize("name", ["why.svg", "one-form.svg", "edge-plans.svg"])
def test_pictures_say_in_words_what_they_show(name: str) -> None:
    root = ElementTree.fromstring((draw_pictures.PICTURES / name).read_text(encoding="utf-8"))
    assert root.get("role") == "img"
    assert [len((root.findtext(f"{{*}}{part}") or "").split()) > 3 for part in ("title", "desc")] == [True, True]
