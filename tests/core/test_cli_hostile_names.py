"""Names in a model are a stranger's text: the terminal, the JSON and the page show them as text and nothing else."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import onnx
import pytest
from cli_kit import FAST, assert_refused, gkp, save, small_net

NAMES = {
    "escape": "\x1b[31mred\x1b]0;title\x07",
    "lines": "a\nerror: b\r\x08\x7f",
    "comment": "*/ --> ]]> '\"",
    "markup": "[red]loud[/red] [link=http://example.com]x[/link] [/]",
    "html": "<script>alert(1)</script><img src=x onerror=alert(1)>",
    "template": "{{ 7*7 }}{% raw %}${x}",
    "format": "%s %n {0} {name!r}",
    "path": "../../etc/passwd",
    "right to left": "abc\u202egnp.exe\u2066",
    "long": "n" * 5000,
}


def renamed(name: str) -> onnx.ModelProto:
    """Every node, tensor, input, output and the graph itself carry the name."""
    model = small_net()
    tensors = {t for n in model.graph.node for t in (*n.input, *n.output)}
    new = {t: f"{name}{k}" for k, t in enumerate(sorted(tensors))}
    for k, node in enumerate(model.graph.node):
        node.name = f"{name}-{k}"
        node.input[:] = [new[t] for t in node.input]
        node.output[:] = [new[t] for t in node.output]
    for value in (*model.graph.initializer, *model.graph.input, *model.graph.output):
        value.name = new[value.name]
    del model.graph.value_info[:]
    model.graph.name = model.producer_name = model.doc_string = name
    return model


class _Tags(HTMLParser):
    """The elements and attributes of a page."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: set[str] = set()
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}


def assert_plain(text: str) -> None:
    """No control characters but line ends, nothing that reorders text."""
    assert not re.search(r"[^\n\x20-\x7e\xa0-\u2027\u2030-\u2065\u2070-\ufffd]", text), repr(text)


@pytest.mark.parametrize("name", NAMES)
def test_hostile_names_are_shown_as_text(name: str, tmp_path: Path) -> None:
    path = save(renamed(NAMES[name]), tmp_path / "m.onnx")
    page = tmp_path / "report.html"
    outcome = gkp("convert", path, "-o", tmp_path / "out", "--target", "ort", *FAST, "-v", "--json", "-", "--report", page,
                  expect=0)
    for text in (outcome.err, outcome.out, gkp("inspect", path, "-v", expect=0).err):
        assert_plain(text)
    json.loads(outcome.out)
    plain = save(small_net(), tmp_path / "plain.onnx")
    gkp("convert", plain, "-o", tmp_path / "plain", "--target", "ort", *FAST, "--report", tmp_path / "p.html", expect=0)
    shown, usual = _Tags(page.read_text()), _Tags((tmp_path / "p.html").read_text())
    assert shown.tags == usual.tags
    assert shown.attributes == usual.attributes
    assert_plain(page.read_text())


def test_markup_in_a_name_is_printed_as_it_is(tmp_path: Path) -> None:
    path = save(renamed("[red]"), tmp_path / "m.onnx")
    assert "[red]" in gkp("inspect", path, expect=0).err


@pytest.mark.parametrize("name", ["escape", "lines", "markup", "right to left"])
def test_hostile_names_in_errors_are_shown_as_text(name: str, tmp_path: Path) -> None:
    model = renamed(NAMES[name])
    model.graph.node[1].op_type = NAMES[name]
    outcome = gkp("inspect", save(model, tmp_path / "m.onnx"))
    assert_refused(outcome, 3)
    assert_plain(outcome.err)


@pytest.mark.parametrize("stem", ["\x1b[31mred", "two\nlines", "[red]x", "[link=x]", "<script>", "a\udcff", "-o", "ü ñ 模型"])
def test_hostile_file_names(stem: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save(small_net(), tmp_path / f"{stem}.onnx")
    monkeypatch.chdir(tmp_path)
    outcome = gkp("convert", "--target", "ort", *FAST, "--json", "r.json", "--report", "r.html", "--baseline", path, path,
                  expect=0)
    assert_plain(outcome.err)
    json.loads((tmp_path / "r.json").read_text())
    assert "<script>." not in (tmp_path / "r.html").read_text()
    outcome = gkp("inspect", tmp_path / f"{stem}.ort", "--json", "-", expect=0)
    assert_plain(outcome.err + outcome.out)
    assert_refused(missing := gkp("inspect", tmp_path / f"{stem}.nothing"), 6, "no such file")
    assert_plain(missing.err)


def test_hostile_text_in_a_manifest_is_shown_as_text(tmp_path: Path) -> None:
    """`gkp inspect DIR` prints a manifest that may come from anyone."""
    path = save(small_net(), tmp_path / "m.onnx")
    gkp("convert", path, "-o", tmp_path / "out", "--target", "ort", *FAST, expect=0)
    file = tmp_path / "out" / "manifest.json"
    content = json.loads(file.read_text())
    evil = NAMES["escape"] + NAMES["lines"] + NAMES["markup"]
    content["notes"] = [evil]
    content["source"] |= {"path": evil, "system": evil, "description": evil}
    content["verification"] |= {"reference": evil, "engine": evil, "first_difference": evil}
    content["environment"] = {"cpu": evil, "packages": {evil: evil}}
    content["baseline"] |= {"kind": evil, "description": evil}
    content["operators"] = {"before": {evil: 3}, "after": {evil: 2}}
    for layer in content["layers"]:
        layer |= {"name": evil, "chosen": evil, "fast_kernel": evil, "reason": evil}
        layer["candidates"] = [{"name": evil, "macs_executed": 1}]
    file.write_text(json.dumps(content))
    assert_plain(gkp("inspect", tmp_path / "out", "-v", expect=0).err)
