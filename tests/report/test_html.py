"""The HTML page: well formed, self-contained, deaf to hostile names, written whole or not at all, and drawable."""

from __future__ import annotations

import io
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import msgspec
import pytest

from gkp.errors import BackendMissingError, FileError
from gkp.manifest import Layer, Left, Macs, Manifest, Ratio, Rival, Timing, Tried
from gkp.report import html as report
from gkp.report import wording
from gkp.require import install

pytest.importorskip("jinja2", reason="needs the report extra")
Make = Callable[..., Manifest]
MakeLayer = Callable[..., Layer]
VOID = {"meta", "br", "link", "img", "input", "hr"}
ALLOWED = {"html", "head", "meta", "title", "style", "body", "main", "header", "section", "footer", "div", "h1", "h2",
           "h3", "p", "code", "small", "span", "dl", "dt", "dd", "ul", "li", "br", "figure", "figcaption", "table",
           "thead", "tbody", "tr", "th", "td", "details", "summary", "svg", "desc", "rect", "line", "text", "g",
           "circle"}


class Page(HTMLParser):
    """Checks nesting while reading; keeps tags, attributes and text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.open: list[str] = []
        self.words: list[str] = []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.words.append(data)

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", " ".join(self.words))


def big_model(make_manifest: Make, make_layer: MakeLayer) -> Manifest:
    return make_manifest(layers=[make_layer(n % 20, name=f"features.{n}.conv") for n in range(120)])


def test_page_tells_the_conversion(make_manifest: Make) -> None:
    found = make_manifest()
    page = Page(report.render_html(found))
    for words in (wording.headline(found), "0.412 ms", "1.31x (1.29 to 1.33)",
                  "1.76x", "dense twin: every branched", "3f" * 32, "layer2.0.shortcut", "8-12", "grouped-4-padded",
                  "batch 64: 0.79x (0.77 to 0.81)", "0.0510 ms (estimated)", "2.1e-06", "BatchNormalization", "-38",
                  "cpu.features avx2, avx512f", "the shortcut of layer2.0 stays", "gkp 0.1.0"):
        assert words in page.text, words


def test_a_rival_that_is_faster_leads_the_page_and_has_a_row_and_bars(make_manifest: Make) -> None:
    row = Rival(engine="openvino", precision="bf16", as_installed=True, ms=Timing(median=0.2, q1=0.19, q3=0.21, runs=9),
                ratio=Ratio(value=0.64, low=0.63, high=0.65))
    absent = Rival(engine="ort", precision="int8", missing="ONNX Runtime is not installed")
    settings = [msgspec.structs.replace(m, rivals=[row, absent]) for m in make_manifest().measurements]
    page = Page(report.render_html(make_manifest(measurements=settings)))
    assert "slower than dense on OpenVINO as installed, bf16 (0.64x at batch 1" in page.text
    assert page.text.count("OpenVINO as installed, bf16 0.200 0.190 to 0.210 9") == 2
    assert "OpenVINO as installed, bf16: 0.200 ms" in page.text
    assert "dense int8, ONNX Runtime not measured ONNX Runtime is not installed" in page.text


def test_page_is_well_formed_and_has_only_known_tags(make_manifest: Make, make_unmeasured: Make, make_layer: MakeLayer,
                                                     hostile_manifest: Manifest) -> None:
    for found in (make_manifest(), make_unmeasured(), hostile_manifest, big_model(make_manifest, make_layer)):
        assert set(Page(report.render_html(found)).tags) <= ALLOWED


def test_page_fetches_nothing_and_runs_nothing(make_manifest: Make, hostile_manifest: Manifest) -> None:
    for found in (make_manifest(), hostile_manifest):
        html = report.render_html(found)
        page = Page(html)
        assert not re.search(r"https?://|<script|@import|url\(", html, re.I)
        assert not {n for n, _ in page.attributes if n.startswith("on") or n in ("src", "href", "xlink:href", "style")}
        assert ("content", "default-src 'none'; style-src 'unsafe-inline'") in page.attributes


def test_hostile_names_are_shown_as_text(hostile_manifest: Manifest) -> None:
    html = report.render_html(hostile_manifest)
    assert "<script>alert(1)</script>[red]x[/red]" in Page(html).text
    assert "{{7*7}}" in html
    assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", html)
    assert not re.search("n{1100}", html)


def test_attributes_hold_no_unescaped_name(hostile_manifest: Manifest) -> None:
    page = Page(report.render_html(hostile_manifest))
    assert not [name for name, _ in page.attributes if not re.fullmatch(r"[a-zA-Z][a-zA-Z0-9:-]*", name)]


def test_nothing_measured_draws_no_speed_chart(make_unmeasured: Make) -> None:
    page = Page(report.render_html(make_unmeasured()))
    assert "Not measured. The speedup of this artefact on this machine is unknown" in page.text
    assert page.tags.count("figure") == 1
    assert "None" not in page.text


def test_every_layer_has_a_row(make_manifest: Make, make_layer: MakeLayer) -> None:
    page = Page(report.render_html(big_model(make_manifest, make_layer)))
    assert page.text.count("features.") == 120
    assert page.tags.count("details") == 120


def test_every_precision_has_a_row_whose_words_are_text(make_manifest: Make) -> None:
    rows = [Tried(target="ort", precision="int8<b>", correct=9193, total=10000, reason="<script>slow</script>\x1b[31m",
                  latency_ms={"1": Timing(median=0.341, q1=0.3, q3=0.4, runs=9)}),
            Tried(target="ort", precision="fp32", agreement=1.0, taken=True, reason="the fastest")]
    html = report.render_html(make_manifest(tried=rows))
    assert "91.93 % (9193 of 10000)" in html
    assert "batch 1: 0.341 ms" in html
    assert "taken: the fastest" in html
    assert "&lt;script&gt;slow&lt;/script&gt;?[31m" in html
    assert "<b>" not in html
    assert "Precisions that were tried" not in report.render_html(make_manifest())


def test_no_layers_no_work_is_still_a_page(make_manifest: Make) -> None:
    found = make_manifest(layers=[], macs=Macs(dense=0, kept=0, executed=0), params=0)
    assert "no branched convolution" in Page(report.render_html(found)).text


def test_charts_are_labelled_for_screen_readers(make_manifest: Make) -> None:
    page = Page(report.render_html(make_manifest()))
    ids = {value for name, value in page.attributes if name == "id"}
    labels = [part for name, value in page.attributes if name == "aria-labelledby" for part in value.split()]
    assert len(labels) == len(set(labels)) == 2 * 5
    assert ids == set(labels)
    assert "dense baseline: 0.412 ms; as given: 1.87 ms; converted: 0.314 ms" in page.text


def test_bars_are_in_proportion(make_manifest: Make) -> None:
    setting = wording.settings(make_manifest())[0]
    dense, as_given, converted = report.latency_chart(setting).bars
    assert dense.width
    assert as_given.width
    assert converted.width
    assert dense.width / converted.width == pytest.approx(0.412 / 0.314, rel=1e-3)
    assert as_given.low is not None
    assert as_given.high is not None
    assert as_given.low < as_given.width < as_given.high <= 100
    speed = report.speedup_chart(setting, "the dense baseline")
    assert speed.mark is not None
    assert [bar.label for bar in speed.bars] == ["as given", "converted", "theoretical"]
    assert (speed.bars[1].width or 0) / speed.mark == pytest.approx(0.412 / 0.314, rel=1e-3)


def test_file_is_written_whole_beside_nothing_else(tmp_path: Path, make_manifest: Make) -> None:
    path = tmp_path / "report.html"
    path.write_text("old")
    report.write_html(make_manifest(), path)
    assert path.read_text("utf-8") == report.render_html(make_manifest())
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_that_cannot_be_written_is_one_clear_error(tmp_path: Path, make_manifest: Make) -> None:
    with pytest.raises(FileError, match=r"cannot write .*: No such file"):
        report.write_html(make_manifest(), tmp_path / "absent" / "report.html")
    (tmp_path / "taken").mkdir()
    with pytest.raises(FileError, match=r"cannot write .*taken"):
        report.write_html(make_manifest(), tmp_path / "taken")
    assert [p.name for p in tmp_path.iterdir()] == ["taken"]


def test_without_jinja2_the_error_names_the_extra(tmp_path: Path, make_manifest: Make,
                                                  monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(BackendMissingError) as caught:
        report.write_html(make_manifest(), tmp_path / "report.html")
    assert caught.value.hint == install("report")
    assert list(tmp_path.iterdir()) == []


def test_the_tile_counts_the_layers_that_the_table_shows_with_branches(make_manifest: Make, make_layer: MakeLayer) -> None:
    """What only moves channels is a layer there, and no convolution."""
    layers = [make_layer(n) for n in range(3)] + [make_layer(n, branches=1, chosen="dense") for n in range(3, 5)]
    told = ("3 of 5 convolutions; 3 not", "3 of 5 convolutions, 1 more only moves channels; 3 not")
    for moving, words in zip(([], [make_layer(9, macs_kept=0, chosen="dense")]), told, strict=True):
        text = Page(report.render_html(make_manifest(layers=[*layers, *moving]))).text
        assert f"Branched convolutions {words} written as dense" in text


def test_steps_that_stay_are_one_line_with_their_names_inside(make_manifest: Make) -> None:
    found = make_manifest(left=[Left(name=f"dw{n}", reason="depthwise") for n in range(20)])
    page = Page(report.render_html(found))
    assert page.text.count("depthwise") == 1
    assert "20 steps stay as given (the first is dw0): depthwise" in page.text
    assert "dw19" in page.text


def test_the_head_for_notebooks_is_that_of_the_page_and_styles_nothing_else(make_manifest: Make, make_unmeasured: Make) -> None:
    for found in (make_manifest(), make_unmeasured()):
        html = report.render_notebook(found)
        head = Page(html)
        assert head.text in Page(report.render_html(found)).text
        assert wording.headline(found) in head.text
        assert not {"html", "body", "h1", "h2"} & {*head.tags}, "headings of a notebook are the user's"
        style = html[html.index("<style>") + len("<style>"):html.index("</style>")]
        assert {rule.split()[0] for rule in re.findall(r"^([^{]+)\{", style, re.MULTILINE)} == {".gkp-report"}


def test_hostile_names_are_text_in_a_notebook(hostile_manifest: Manifest) -> None:
    html = report.render_notebook(hostile_manifest)
    page = Page(html)
    assert "<script>alert(1)</script>[red]x[/red]" in page.text
    assert not re.search(r"<script|https?://|@import|url\(", html, re.IGNORECASE)
    assert not [name for name, _ in page.attributes if name != "class"]
    assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", html)


def test_a_browser_draws_the_page(tmp_path: Path, make_manifest: Make) -> None:
    image = pytest.importorskip("PIL.Image", reason="needs pillow to look at the screenshot")
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("needs chromium to draw the page")
    report.write_html(make_manifest(), tmp_path / "report.html")
    shot = tmp_path / "shot.png"
    subprocess.run([browser, "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking",
                    "--hide-scrollbars", f"--user-data-dir={tmp_path / 'profile'}", "--window-size=1000,1400",
                    "--blink-settings=preferredColorScheme=1", f"--screenshot={shot}",
                    (tmp_path / "report.html").as_uri()], check=True, timeout=120, capture_output=True)
    with image.open(io.BytesIO(shot.read_bytes())) as picture:
        colours = dict((c, n) for n, c in picture.convert("RGB").getcolors(1 << 24))
        assert picture.size == (1000, 1400)
    bar_accent, bar_given = (0x1F, 0x6F, 0x8B), (0xD9, 0xA4, 0x41)
    assert colours.get(bar_accent, 0) > 2000
    assert colours.get(bar_given, 0) > 2000
    assert len(colours) > 50
