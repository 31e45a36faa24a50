"""The roofline picture: points stand where their numbers say, below or above the limits, whatever the numbers are."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from gkp.manifest import LayerSpeed, Manifest, Roofline
from gkp.report import html as report
from gkp.report.roofline import HEIGHT, Picture, picture

Make = Callable[..., Manifest]


def speed(name: str, gflops: float, intensity: float, peak: float = 200.0) -> LayerSpeed:
    return LayerSpeed(name=name, kind="conv 3x3", macs=10**6, macs_executed=10**6, ms=0.01, gflops=gflops, share=gflops / peak,
                      intensity=intensity)


def drawn(make: Make, *layers: LayerSpeed, peak: float = 200.0, bandwidth: float = 40.0) -> Picture:
    made = picture(make(roofline=Roofline(peak_gflops=peak, bandwidth_gbs=bandwidth, layers=list(layers))))
    assert made is not None
    return made


def test_points_keep_their_place_relative_to_the_limits(make_manifest: Make) -> None:
    found = drawn(make_manifest, speed("slow", 100, 20), speed("fast", 200, 20), speed("winograd", 300, 40),
                  speed("starved", 40, 1))
    slow, fast, winograd, starved = found.points
    assert (slow.x, fast.y) == (fast.x, found.top), "on the peak"
    assert slow.y > found.top > winograd.y, "pixels count from the top"
    assert winograd.x > fast.x > found.ridge > starved.x
    x, y = found.memory
    share = (starved.x - x) / (found.ridge - x)
    assert starved.y == pytest.approx(y + share * (found.top - y), abs=0.1), "on the memory line: 1 FLOP/byte at 40 GB/s"


def test_branches_and_saved_work_tell_the_layers_apart(make_manifest: Make, make_layer: Callable[..., Any]) -> None:
    layers = [make_layer(0), make_layer(1, branches=1), make_layer(2)]
    found = picture(make_manifest(layers=layers, roofline=Roofline(peak_gflops=200, bandwidth_gbs=40, layers=[
        speed(layers[0].name, 100, 20), speed(layers[1].name, 100, 20), speed("a step of its own", 100, 20),
        replace(speed(layers[2].name, 100, 20), macs_executed=5 * 10**5)])))
    assert found is not None
    assert [p.style for p in found.points] == ["grouped", "dense", "dense", "winograd"]
    assert [style for style, _ in found.legend] == ["grouped", "dense", "winograd"]


def test_the_page_shows_every_point_with_its_numbers(make_manifest: Make) -> None:
    made = make_manifest(roofline=Roofline(peak_gflops=266, bandwidth_gbs=39.3, layers=[
        speed("layer1.0.conv1", 133.0, 19.5, 266), speed("<b>&", 200, 20, 266)]))
    page = report.render_html(made)
    assert page.count("<circle class=\"point") == 2 + 2, "two points and their keys"
    assert "layer1.0.conv1 (conv 3x3): 133 GFLOP/s, 50 % of the peak; 19.5 FLOP per byte; 10.0 µs" in page
    assert "&lt;b&gt;&amp; (conv" in page
    assert "multiply-adds 266 GFLOP/s (flat), memory 39 GB/s (slope)" in page


def test_every_unit_has_a_limit_and_layers_name_theirs(make_manifest: Make) -> None:
    layers = [replace(speed("tiled", 3000, 90, 6000), units="amx-int8"), replace(speed("narrow", 400, 40, 800), units="int8")]
    peaks = {"int8": 800.0, "amx-int8": 6000.0, "<b>": 100.0, "fp32": math.nan}
    made = make_manifest(roofline=Roofline(peak_gflops=6000, bandwidth_gbs=40, layers=layers, peaks=peaks))
    found = picture(made)
    assert found is not None
    (ridge, top), = found.lower
    assert ridge < found.ridge
    assert found.top < top < found.points[1].y
    page = report.render_html(made)
    assert page.count('class="limit lower"') == 1
    assert "sums of bytes 800, AMX in int8 6000 GFLOP/s (flat), memory 40 GB/s (slope)" in page
    assert "3000 GFLOP/s, 50 % of the peak of AMX in int8; " in page
    assert "400 GFLOP/s, 50 % of the peak of sums of bytes; " in page


def test_without_a_roofline_the_page_says_nothing_of_it(make_manifest: Make) -> None:
    assert picture(make_manifest()) is None
    assert "Roofline" not in report.render_html(make_manifest())


@pytest.mark.parametrize(("peak", "bandwidth", "gflops"), [(0, 40, 10), (200, 0, 10), (200, 40, 0), (200, 40, -1),
                                                           (math.inf, 40, 10), (1e308, 1e-308, 10), (200, math.nan, 10)])
def test_numbers_that_cannot_be_meant_draw_nothing(make_manifest: Make, peak: float, bandwidth: float, gflops: float) -> None:
    assert picture(make_manifest(roofline=Roofline(peak_gflops=peak, bandwidth_gbs=bandwidth,
                                                   layers=[speed("a", gflops, 1)]))) is None


POSITIVE = st.floats(1e-6, 1e9)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(layers=st.lists(st.tuples(POSITIVE, POSITIVE), min_size=1, max_size=8), peak=POSITIVE, bandwidth=POSITIVE)
def test_everything_stays_inside_the_picture(make_manifest: Make, layers: list[tuple[float, float]], peak: float,
                                             bandwidth: float) -> None:
    found = drawn(make_manifest, *(speed(str(k), g, i, peak) for k, (g, i) in enumerate(layers)), peak=peak,
                  bandwidth=bandwidth)
    assert len(found.points) == len(layers)
    places = [(p.x, p.y) for p in found.points] + [(found.ridge, found.top), found.memory]
    assert all(0 <= x <= 100 and 0 <= y <= HEIGHT for x, y in places)
    assert all(0 <= t.at <= 100 and re.fullmatch(r"[\de.+-]+", t.text) for t in found.across)
    assert len(found.across) <= 15
    assert len(found.up) <= 15
