"""plan.html: tells the plan, draws it to scale, is well formed and self-contained, and deaf to hostile names."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import msgspec
import pytest
from edge_plans import chain, plan, replicas
from rich.console import Console

from gkp.edge.divide.decide import candidate, decide
from gkp.edge.forecast import report
from gkp.edge.forecast.predict import predict
from gkp.edge.forecast.profile import plan_times
from gkp.edge.forecast.simulate import simulate
from gkp.edge.plan import describe
from gkp.edge.plan.schema import COORDINATOR, Device, Layout, Plan
from gkp.errors import FileError, UsageError
from gkp.report.wording import milliseconds

pytest.importorskip("jinja2", reason="needs the report extra")
VOID = {"meta", "br", "rect", "line"}
ALLOWED = {"html", "head", "meta", "title", "style", "body", "main", "header", "section", "footer", "div", "h1", "h2", "p", "code",
           "small", "span", "dl", "dt", "dd", "ul", "ol", "li", "br", "table", "thead", "tbody", "tr", "th", "td", "details",
           "summary", "svg", "desc", "rect", "line", "text"}
HOSTILE = '"><script>alert(1)</script>\u202e\x1b[31m{{ 7*7 }}'


class Page(HTMLParser):
    """Checks nesting while reading; keeps tags, attributes and text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.open: list[str] = []
        self.words: list[str] = []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.words.append(data)

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", " ".join(self.words))


def decided(mode: str = "pipeline", **changes: object) -> Plan:
    """A pipeline over two devices and what one device would cost; a third device is idle."""
    made = msgspec.structs.replace(chain((40.0, 60.0), weights=[2000, 3000]), mode=mode,
                                   devices=[Device(name="d0"), Device(name="d1", memory_bytes=1), Device(name="hall")])
    alone = msgspec.structs.replace(chain((100.0,), weights=[5000]), mode="local", devices=made.devices)
    chosen = decide([candidate(made), candidate(alone)], "latency", mode)
    return msgspec.structs.replace(made, predicted=chosen.chosen.prediction, rejected=list(chosen.rejected),
                                   notes=list(chosen.notes), **changes)


def test_the_page_tells_the_plan() -> None:
    page = Page(report.render(decided()))
    # 3 + 40 + 3 + 60 + 3 ms; one device: 3 + 100 + 3
    for said in ("pipeline on 2 devices: 109 ms, 0.97x the speed of one device (measured)", "by-hand.onnx",
                 "by-hand: 1 MB/s, round trip 2 ms, 1 ms per message", "16.7 with many on their way",
                 "warning: pipeline loses against one device: 109 ms against 106 ms", "idle: hall", "hall (idle)", "Idle: hall",
                 "warning: the plan does not fit: d1 needs", "local", "1 kB in 1", "t_v1", "measured, each alone on one core"):
        assert said in page.text, said


def test_estimates_are_called_estimates() -> None:
    made = chain(measured=False)
    page = Page(report.render(msgspec.structs.replace(made, predicted=predict(made))))
    assert "Segment times are estimates of a cost model, not measurements" in page.text
    assert "(estimated)" in page.text


def test_segments_and_messages_are_drawn_where_they_happen() -> None:
    made = chain((4.0, 6.0))
    drawn = report.picture(made, simulate(made, plan_times(made)[0]))
    # 3 + 4 + 3 + 6 + 3 = 19 ms
    assert [(b.x, b.width) for b in drawn.boxes] == [(pytest.approx(100 * a / 19, abs=0.01), pytest.approx(100 * w / 19, abs=0.01))
                                                     for a, w in ((3, 4), (10, 6))]
    assert [b.y for b in drawn.boxes] == [drawn.rows[1][2], drawn.rows[2][2]]
    assert [(a.x1, a.x2) for a in drawn.arrows] == [(pytest.approx(100 * a / 19, abs=0.01), pytest.approx(100 * b / 19, abs=0.01))
                                                    for a, b in ((0, 3), (7, 10), (16, 19))]
    assert drawn.arrows[0].y1 < drawn.arrows[0].y2  # from the coordinator down
    assert drawn.arrows[2].y1 > drawn.arrows[2].y2  # and back up
    assert [name for name, _, _ in drawn.rows] == ["coordinator", "d0", "d1"]
    assert drawn.ticks[0] == (0.0, "0")
    assert all(0 <= at <= 100 for at, _ in drawn.ticks)
    assert 4 <= len(drawn.ticks) <= 11


@pytest.mark.parametrize("scale", [0.001, 0.07, 1.0, 13.0, 999.0, 123456.0])
def test_the_time_axis_has_a_few_round_numbers_at_every_scale(scale: float) -> None:
    link = msgspec.structs.replace(chain().link, bandwidth=1e15, rtt=0, overhead=0)
    made = chain((scale,), link=link)
    ticks = report.picture(made, simulate(made, [scale])).ticks
    assert 4 <= len(ticks) <= 11, ticks
    steps = {round(float(b) - float(a), 12) for (_, a), (_, b) in pairwise(ticks)}
    assert max(steps) - min(steps) < 1e-9 * max(steps) + 1e-12


def test_every_replica_is_seen_at_work() -> None:
    made = replicas([20.0, 30.0, 20.0])
    page = report.render(msgspec.structs.replace(made, predicted=predict(made)))
    assert page.count('<rect class="run"') >= 3
    assert "one request for every device" in page


def test_the_page_is_self_contained_and_deaf_to_hostile_names() -> None:
    made = decided()
    made = msgspec.structs.replace(
        made, model=HOSTILE, mode=HOSTILE, objective="latency", notes=[HOSTILE], link=msgspec.structs.replace(made.link, name=HOSTILE),
        devices=[msgspec.structs.replace(d, name=HOSTILE) for d in made.devices],
        values=[msgspec.structs.replace(v, tensor=HOSTILE) for v in made.values],
        segments=[msgspec.structs.replace(s, layers=[HOSTILE] * 9) for s in made.segments],
        layouts={HOSTILE: Layout(kind=HOSTILE, devices=[0, COORDINATOR])},
        rejected=[msgspec.structs.replace(p, mode=HOSTILE, reason=HOSTILE, based_on=HOSTILE) for p in made.rejected])
    html = report.render(made)
    page = Page(html)
    assert set(page.tags) <= ALLOWED
    assert "script" not in page.tags
    assert "49" not in re.findall(r"alert\(1\)\S*", html)
    names = [(name, value) for _, name, value in page.attributes]
    assert not any(name.startswith("on") or name in ("href", "src") for name, _ in names)
    assert all(value.startswith("height:") for name, value in names if name == "style")
    assert not re.search("[\u202e\x1b]", html)
    assert "http" not in html.replace("http-equiv", "")
    assert "Content-Security-Policy" in html


def test_large_plans_are_cut_and_say_what_is_left_out() -> None:
    count = 60
    ring = plan([*((k, ["v0"], [f"a{k}"], 1.0) for k in range(count)),
                 *((k, [f"a{n}" for n in range(count)], [f"b{k}"], 1.0) for k in range(count))],
                {"v0": 4, **{f"{x}{k}": 4 for x in "ab" for k in range(count)}},
                [(f"a{s}", s, t) for s in range(count) for t in range(count) if s != t], devices=count, output="b0", mode="branch")
    html = report.render(msgspec.structs.replace(ring, predicted=predict(ring)))
    assert len(html) < 600_000
    assert "Not drawn: 28 devices and" in Page(html).text
    drawn = report.picture(ring, simulate(ring, [1.0] * len(ring.segments))).arrows
    assert len(drawn) <= report.MOST_MESSAGES
    assert max(a.x2 for a in drawn) > 95  # from all of the time, not from its beginning


def test_a_page_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    report.write_html(decided(), tmp_path / "plan.html")
    assert (tmp_path / "plan.html").read_text("utf-8").endswith("</html>")
    with pytest.raises(FileError):
        report.write_html(decided(), tmp_path / "nowhere" / "plan.html")


# ---- words ----------------------------------------------------------------------------------------------------------
def test_the_headline_says_what_the_objective_counts() -> None:
    made = decided()
    assert describe.headline(made) == "pipeline on 2 devices: 109 ms, 0.97x the speed of one device (measured)"
    assert describe.headline(msgspec.structs.replace(made, objective="throughput")) == (
        "pipeline on 2 devices: 16.7 requests a second, 1.67x the speed of one device (measured)")
    assert describe.headline(msgspec.structs.replace(made, objective="memory")) == (
        "pipeline on 2 devices: 5 kB on the fullest, 0.71 of what one device needs (measured)")
    alone = msgspec.structs.replace(chain((100.0,)), mode="local")
    assert describe.headline(msgspec.structs.replace(alone, predicted=predict(alone))) == (
        "Do not split: one device needs 106 ms (measured)")
    assert describe.headline(chain()) == "pipeline on 2 devices: not predicted"


def test_sizes_and_times_are_rounded_for_reading() -> None:
    assert [describe.size(n) for n in (0, 999, 1000, 12_345, 1.5e6, 2e9)] == ["0 B", "999 B", "1 kB", "12.3 kB", "1.5 MB", "2 GB"]
    assert [milliseconds(v) for v in (0.01234, 1.234, 12.34, 1234.5)] == ["0.0123", "1.23", "12.3", "1,234"]
    assert [describe.per_second(v) for v in (1000.0, 0.5, 30.0)] == ["1", "2,000", "33.3"]


def test_the_reasons_name_every_mode_and_a_prediction_is_put_beside_a_measurement() -> None:
    made = decided()
    assert [text.split(":")[0] for text in describe.reasons(made)] == ["pipeline", "local"]
    assert "asked for with --mode" in describe.reasons(made)[0]
    assert re.fullmatch(r"predicted: one request 109 ms \(segments measured; the link by-hand.*\), [\d,]+ bytes moved",
                        describe.predicted_text(made))
    assert describe.predicted_text(chain()) == "not predicted"


def test_the_terminal_shows_every_mode() -> None:
    made = decided()
    console = Console(width=80, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(report.modes_table(made))
    shown = console.export_text()
    assert "pipeline on 2 devices: 109 ms" in shown
    assert re.search(r"local\s.*106 ms", shown)
    assert max(map(len, shown.splitlines())) <= 80
    with pytest.raises(UsageError, match="not predicted"):
        report.modes_table(chain())


# ---- drawn ----------------------------------------------------------------------------------------------------------
@pytest.mark.slow
@pytest.mark.parametrize("width", [1200, 400])
def test_a_browser_draws_the_page(width: int, tmp_path: Path) -> None:
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("needs a browser")
    report.write_html(decided(), tmp_path / "plan.html")
    picture = tmp_path / "page.png"
    subprocess.run([browser, "--headless", "--no-sandbox", "--disable-gpu", f"--window-size={width},900", f"--screenshot={picture}",
                    f"--user-data-dir={tmp_path / 'profile'}", (tmp_path / "plan.html").as_uri()], check=True, timeout=120,
                   stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    image = pytest.importorskip("PIL.Image", reason="needs Pillow").open(picture).convert("RGB")
    colours = {colour for _, colour in image.getcolors(1 << 24)}
    assert {(31, 111, 139), (185, 119, 26)} & colours or {(63, 157, 189)} & colours  # segments, in either colour scheme
    assert sys.platform.startswith("linux")
