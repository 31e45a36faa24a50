"""The terminal tables: what they say, that they fit, and that a model's names cannot style or steer the terminal."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len
from rich.console import Console, RenderableType

from gkp.manifest import (
    Baseline,
    CandidateTime,
    Latencies,
    Layer,
    Left,
    Macs,
    Manifest,
    Measurement,
    Ratio,
    Rival,
    Timing,
    Tried,
    Verification,
)
from gkp.report import tables, wording
from gkp.text import clean

Make = Callable[..., Manifest]
MakeLayer = Callable[..., Layer]
MakeMeasurement = Callable[..., Measurement]


def draw(renderable: RenderableType, width: int = 80, colour: bool = False) -> str:
    out = io.StringIO()
    Console(file=out, width=width, force_terminal=colour, color_system="truecolor" if colour else None,
            _environ={}).print(renderable)
    return out.getvalue()


def squeezed(text: str) -> str:
    return re.sub(r"\s+", " ", text)


def with_settings(make: Make, *settings: Measurement, **changes: Any) -> Manifest:
    return make(latency_ms=settings[0].latency_ms, speedup=settings[0].speedup, measurements=list(settings), **changes)


def test_headline_states_gain_setting_and_theory(make_manifest: Make, make_measurement: MakeMeasurement) -> None:
    one = with_settings(make_manifest, make_measurement(1, 1, 0.412, 1.873, 0.3145))
    assert wording.headline(one) == "1.31x faster than the dense baseline (batch 1, 1 thread); theoretical 1.76x"


def test_headline_names_every_other_setting_or_their_range(make_manifest: Make,
                                                           make_measurement: MakeMeasurement) -> None:
    assert "(batch 1, 1 thread; 1.13x at batch 64, 2 threads)" in wording.headline(make_manifest())
    three = with_settings(make_manifest, *(make_measurement(b, 1, 1.2 + b / 10, 4, 1) for b in (1, 2, 3)))
    assert "(batch 1, 1 thread; 1.30x to 1.50x over 3 settings)" in wording.headline(three)


def test_headline_admits_that_dense_was_written(make_manifest: Make, make_layer: MakeLayer,
                                                make_measurement: MakeMeasurement) -> None:
    setting = make_measurement(1, 1, 0.41, 1.864, 0.41)
    dense = with_settings(make_manifest, setting, layers=[make_layer(chosen="dense")])
    assert wording.headline(dense) == ("no form beats dense on this runtime: dense was written (1.00x); "
                                       "as given the model runs at 0.22x")
    asked = with_settings(make_manifest, setting, layers=[make_layer(chosen="dense")], strategy="dense")
    assert wording.headline(asked).startswith("dense was written, as asked (1.00x)")


@pytest.mark.parametrize(("converted", "spread", "kind", "words"), [
    (2.0, 0.02, "slower", "slower than the dense baseline: 0.50x (batch 1, 1 thread)"),
    (1.0, 0.02, "same", "no measurable difference from the dense baseline: 1.00x"),
    (0.98, 0.03, "same", "no measurable difference from the dense baseline: 1.02x"),
])
def test_headline_claims_nothing_the_interval_does_not_show(
        make_manifest: Make, make_measurement: MakeMeasurement, converted: float, spread: float, kind: str,
        words: str) -> None:
    found = with_settings(make_manifest, make_measurement(1, 1, 1.0, 3.0, converted, spread))
    assert wording.verdict(found) == kind
    assert words in wording.headline(found)


def test_a_gain_in_one_setting_only_is_not_called_faster(make_manifest: Make,
                                                         make_measurement: MakeMeasurement) -> None:
    found = with_settings(make_manifest, make_measurement(1, 1, 1.5, 3, 1), make_measurement(64, 1, 9, 30, 10))
    assert wording.verdict(found) == "mixed"
    assert "0.90x at batch 64, 1 thread), but not in every setting" in wording.headline(found)


def test_a_model_without_dense_ancestor_is_compared_with_itself(make_manifest: Make,
                                                               make_measurement: MakeMeasurement) -> None:
    setting = make_measurement(1, 1, 9.0, 1.2, 1.0)
    latencies = Latencies(as_is=setting.latency_ms.as_is, converted=setting.latency_ms.converted)
    found = make_manifest(baseline=Baseline(kind="as_is", description=""), latency_ms=latencies, measurements=[],
                          speedup=setting.speedup)
    assert wording.headline(found).startswith("1.20x faster than the model as given (")
    lines = draw(tables.conversion_table(found)).splitlines()
    assert any("dense baseline" in line and "not measured" in line for line in lines)
    assert any("as given" in line and "1.00x (reference)" in line for line in lines)


def test_failed_verification_leads_the_headline(make_manifest: Make) -> None:
    failed = make_manifest(verification=Verification(passed=False, reference="r", engine="e", checks=[],
                                                     first_difference="layer1.0.conv2"))
    assert wording.headline(failed).startswith("verification failed; ")
    assert "FAILED" in (text := squeezed(draw(tables.conversion_table(failed))))
    assert "first difference at layer1.0.conv2" in text


def test_every_setting_shows_its_three_rows(make_manifest: Make) -> None:
    text = draw(tables.conversion_table(make_manifest()))
    for row in ("dense baseline", "as given", "converted"):
        assert len(re.findall(rf"^ +{row} ", text, re.M)) == 2
    assert re.search(r"converted +0\.314 +0\.309 to 0\.320 +1\.31x \(1\.29 to 1\.33\)", text)
    assert re.search(r"theoretical +1\.76x", text)


def test_facts_are_shown(make_manifest: Make) -> None:
    text = squeezed(draw(tables.conversion_table(make_manifest())))
    assert "dense 40.6 M, kept 23.1 M, executed 25.9 M" in text
    assert "all 106 -> 49, Gather 38 -> 0, BatchNormalization 19 -> 0" in text
    assert "passed: largest error 2.1e-06, tolerance 1.0e-05" in text
    assert "dense twin: every branched convolution at full size" in text


def steps(reason: str, *names: str) -> list[Left]:
    return [Left(name=name, reason=reason) for name in names]


def test_steps_that_stay_for_one_reason_are_one_line_and_each_its_own_with_verbose(make_manifest: Make) -> None:
    apart = "its channels come from 2 tensors"
    found = make_manifest(notes=[], left=[*steps("depthwise", *(f"dw{n}" for n in range(20))), *steps(f"Concat: {apart}", "c1", "c2"),
                                          *steps(f"Slice: {apart}", "s1"), *steps("auto_pad", "odd")])
    short, full = (draw(tables.conversion_table(found, verbose)) for verbose in (False, True))
    assert short.count("Note") == 3
    assert "20 steps stay as given (the first is dw0): depthwise" in squeezed(short)
    assert f"3 steps stay as given (2 Concat, 1 Slice, the first is c1): {apart}" in squeezed(short)
    assert "odd stays as given: auto_pad" in squeezed(short)
    assert full.count("Note") == 24
    assert f"c2 stays as given: Concat, {apart}" in squeezed(full)


def test_what_is_long_is_for_verbose(make_manifest: Make) -> None:
    counts = {f"Op{n}": n + 1 for n in range(9)}
    found = make_manifest(operators={"before": counts, "after": {}})
    short, full = (squeezed(draw(tables.conversion_table(found, verbose))) for verbose in (False, True))
    assert "all 45 -> 0, Op8 9 -> 0, Op7 8 -> 0, Op6 7 -> 0 and 6 more" in short
    assert "Op0 1 -> 0" in full
    for words in ("compared with the opened checkpoint", "no compiler can exploit them"):
        assert (words in short, words in full) == (False, True)


def test_what_is_unchanged_says_so_and_repeats_no_number(make_manifest: Make) -> None:
    macs, counts = Macs(dense=10**7, kept=10**7, executed=10**7), {"Conv": 5, "Relu": 4}
    found = make_manifest(unchanged=True, macs=macs, operators={"before": counts, "after": counts})
    text = squeezed(draw(tables.conversion_table(found)))
    assert text.startswith("written unchanged: operators and weights are those of the model as given; ")
    assert "MACs 10.0 M (one image)" in text
    assert "Operators all 9 as before" in text
    assert wording.headline(make_manifest(unchanged=True, files={})).startswith("unchanged: ")
    assert "unchanged" not in wording.headline(make_manifest())


def test_what_was_not_measured_says_so_in_few_words(make_unmeasured: Make) -> None:
    text = draw(tables.conversion_table(make_unmeasured()))
    assert text.startswith("speed not measured")
    assert text.count("not measured") == 1, "no table of what is not there"
    assert "not verified" in text
    assert "None" not in text


# ---- rivals ---------------------------------------------------------------------------------------------------------
def with_rivals(make: Make, make_measurement: MakeMeasurement, *rivals: Rival, **changes: Any) -> Manifest:
    """Of three times, in two settings: dense 0.412, as given 1.873, converted 0.314 and their tenfold."""
    rows = [msgspec.structs.replace(make_measurement(1, 1, 0.412, 1.873, 0.314), rivals=list(rivals)),
            msgspec.structs.replace(make_measurement(64, 1, 4.12, 18.73, 3.14), rivals=list(rivals))]
    return with_settings(make, *rows, **changes)


def rival(engine: str, precision: str | None, ms: float | None = None, ratio: float = 1.0, **more: Any) -> Rival:
    found = None if ms is None else Timing(median=ms, q1=ms, q3=ms, runs=9)
    versus = None if ms is None else Ratio(value=ratio, low=ratio - 0.01, high=ratio + 0.01)
    return Rival(engine=engine, precision=precision, ms=found, ratio=versus, **more)


ORT, SLOWER = rival("ort", "fp32", 0.412, 1.31), rival("openvino", "fp32", 0.5, 1.6)
FASTER = rival("openvino", "bf16", 0.157, 0.5, as_installed=True)


def test_the_headline_leads_with_the_rival_that_is_faster(make_manifest: Make, make_measurement: MakeMeasurement) -> None:
    found = with_rivals(make_manifest, make_measurement, ORT, SLOWER, FASTER)
    assert wording.headline(found) == (
        "slower than dense on OpenVINO as installed, bf16 (0.50x at batch 1, 1 thread; 0.50x at batch 64, 1 thread); "
        "1.31x faster than the fastest dense fp32 (batch 1, 1 thread; 1.31x at batch 64, 1 thread); theoretical 1.76x")
    assert wording.verdict(found) == "mixed"


def test_rivals_that_are_slower_leave_the_headline_as_it_is(make_manifest: Make,
                                                            make_measurement: MakeMeasurement) -> None:
    slow = rival("openvino", "bf16", 0.6, 2.0, as_installed=True)
    doubtful = rival("openvino", "int8", 0.314, 1.0)
    found = with_rivals(make_manifest, make_measurement, ORT, slow, doubtful)
    assert wording.headline(found).startswith("1.31x faster than dense fp32 (batch 1")
    assert wording.verdict(found) == "faster"


def test_a_setting_shows_the_fastest_engine_of_each_precision_and_what_is_not_installed(
        make_manifest: Make, make_measurement: MakeMeasurement) -> None:
    absent = rival("openvino", None, as_installed=True, missing="OpenVINO is not installed")
    found = with_rivals(make_manifest, make_measurement, SLOWER, ORT, rival("ort", "int8", 0.3, 0.9),
                        rival("openvino", "int8", 0.25, 0.8), absent)
    text = draw(tables.conversion_table(found))
    assert re.search(r"dense fp32, ONNX Runtime +0\.412 .*1\.00x \(reference\)", text)
    assert re.search(r"dense int8, OpenVINO +0\.250 .*1\.65x", text)
    assert re.search(r"OpenVINO as installed +OpenVINO is not installed", text)
    assert "fp32, OpenVINO" not in text
    assert "int8, ONNX Runtime" not in text


def test_without_a_dense_ancestor_the_rivals_run_the_model_as_given(make_manifest: Make,
                                                                  make_measurement: MakeMeasurement) -> None:
    found = with_rivals(make_manifest, make_measurement, FASTER, baseline=Baseline(kind="as_is", description=""))
    assert wording.headline(found).startswith("slower than as given on OpenVINO as installed, bf16 (0.50x at batch 1")


def test_layer_table_shows_branches_and_their_inputs(make_manifest: Make) -> None:
    text = draw(tables.layer_table(make_manifest()))
    assert re.search(r"layer1\.0\.conv1 +16>16 +8 x 9 +2\.36 +1\.33 +native", text)
    assert "3 x 4-7" in text
    table, _, reasons = text.partition("\n\n")
    assert len(table.splitlines()) == 2 + 4 + 1
    assert "1: 1.31x the whole model against dense in this layer" in reasons


def test_a_wide_terminal_gets_more_columns(make_manifest: Make) -> None:
    header = draw(tables.layer_table(make_manifest()), 140).splitlines()[0].split()
    assert header == ["layer", "channels", "branches", "inputs", "overlap", "dense", "kept", "run", "form", "why"]


def test_reasons_stand_below_the_table_in_full_and_once(make_manifest: Make, make_layer: MakeLayer) -> None:
    reason = "the longest reason: " + " ".join(f"word{n}" for n in range(30))
    found = make_manifest(layers=[make_layer(0, reason=reason), make_layer(8, reason="another"), make_layer(1, reason=reason)])
    text = draw(tables.layer_table(found))
    rows = [line.split() for line in text.splitlines() if line.startswith("layer") and line.split()[-1].isdigit()]
    assert [row[-1] for row in rows] == ["1", "2", "1"]
    assert squeezed(text).count(reason) == 1
    assert re.search(r"^2: another$", text, re.MULTILINE) or "2: another" in squeezed(text)


def test_a_model_without_branches_is_not_an_empty_table(make_manifest: Make) -> None:
    assert "no branched convolution" in draw(tables.layer_table(make_manifest(layers=[])))


def test_precisions_that_were_tried_have_the_columns_that_hold_anything() -> None:
    rows = [Tried(target="ort", precision="fp32", taken=True, reason="r"), Tried(target="ort", precision="int8", reason="s")]
    assert draw(tables.tried_table(rows)).splitlines()[0].split() == ["precision", "why"]
    rows.append(Tried(target="ort", precision="fp16", correct=9, total=10, reason="t"))
    text = draw(tables.tried_table(rows))
    assert text.splitlines()[0].split() == ["precision", "accuracy", "why"]
    assert text.count("not measured") == 2


def test_candidates_that_were_only_estimated_have_no_column_of_what_was_not_measured(make_layer: MakeLayer) -> None:
    candidates = [CandidateTime(name=name, macs_executed=10**6, estimated_ms=0.5) for name in ("dense", "split-2", "native")]
    text = draw(tables.candidates_table(make_layer(candidates=candidates)))
    assert "not measured" not in text
    assert text.count("0.500 ms (estimated)") == 3


def test_candidates_show_measured_estimated_and_unmeasured(make_layer: MakeLayer) -> None:
    ratios = {"64": Ratio(value=1, low=1, high=1)}
    candidates = [CandidateTime(name="dense", macs_executed=10**7, ms=1.5, ratios=ratios),
                  CandidateTime(name="split-2", macs_executed=5 * 10**6, estimated_ms=0.75),
                  CandidateTime(name="native", macs_executed=5 * 10**6)]
    lines = draw(tables.candidates_table(make_layer(candidates=candidates))).splitlines()
    by_name = {line.split()[0]: line for line in lines if line.split()}
    assert "1.50 ms" in by_name["dense"]
    assert "batch 64: 1.00x (1.00 to 1.00)" in by_name["dense"]
    assert "0.750 ms (estimated)" in by_name["split-2"]
    assert by_name["native"].split()[1] == "(chosen)"
    assert by_name["native"].count("not measured") == 2


@pytest.mark.parametrize("width", [80, 99, 100, 160])
def test_nothing_is_wider_than_the_terminal(width: int, make_manifest: Make, make_unmeasured: Make,
                                            make_layer: MakeLayer, hostile_manifest: Manifest) -> None:
    big = make_manifest(layers=[make_layer(n, name=f"/features/features.{n}/conv/" + "卷积" * n, channels=(2048, 1024),
                                           chosen="grouped-32-padded", branches=512, inputs_per_branch=[100, 2048],
                                           macs_dense=10**11) for n in range(120)])
    for found in (make_manifest(), make_unmeasured(), hostile_manifest, big):
        for renderable in (tables.conversion_table(found), tables.conversion_table(found, verbose=True),
                           tables.layer_table(found), *(tables.candidates_table(n) for n in found.layers[:2])):
            assert max(cell_len(line) for line in draw(renderable, width).splitlines()) <= width


def test_80_columns_keep_every_number_of_a_layer(make_manifest: Make, make_layer: MakeLayer) -> None:
    found = make_manifest(layers=[make_layer(name="x" * 300, channels=(2048, 1024), branches=512, macs_dense=10**10,
                                             inputs_per_branch=[100, 2048], chosen="grouped-32-padded")])
    row = draw(tables.layer_table(found)).splitlines()[2]
    assert "2048>1024" in row
    assert "512 x 100-2048" in row
    assert "10,000" in row


def test_hostile_names_are_text_to_the_terminal(hostile_manifest: Manifest) -> None:
    for renderable in (tables.conversion_table(hostile_manifest), tables.layer_table(hostile_manifest),
                       tables.candidates_table(hostile_manifest.layers[0])):
        coloured = draw(renderable, 160, colour=True)
        assert "[red]x[/red]" in squeezed(draw(renderable, 400))
        assert "\x1b[31mn" not in coloured
        assert not re.search("[\x07\u202e\r]", coloured)
        assert not re.search(r"\x1b(?!\[[0-9;]*m)", coloured)


@given(st.text(st.characters(exclude_categories=[])))
def test_clean_text_is_one_printable_line(text: str) -> None:
    cleaned = clean(text, 50)
    assert len(cleaned) <= 50
    assert all(c.isprintable() or c.isspace() for c in cleaned)
    assert len(cleaned.splitlines()) <= 1
    cleaned.encode("utf-8")


@given(st.text(st.characters(categories=["L", "N", "P"]), max_size=200), st.integers(2, 60))
def test_a_shortened_name_keeps_both_ends(name: str, width: int) -> None:
    short = wording.shorten(name, width)
    assert len(short) <= width
    head, cut, tail = short.partition("…")
    assert short == name or (cut and name.startswith(head) and name.endswith(tail.rpartition("…")[2]))


@pytest.mark.parametrize(("value", "text"), [(0.0, "0.00"), (0.0123, "0.0123"), (0.4, "0.400"), (1.873, "1.87"),
                                             (15.31, "15.3"), (1234.5, "1,234")])
def test_milliseconds_have_three_digits(value: float, text: str) -> None:
    assert wording.milliseconds(value) == text
