"""Planning real and small networks as a whole, and the command."""

from __future__ import annotations

import json
import re
from functools import cache
from pathlib import Path

import msgspec
import numpy as np
import onnx
import pytest
from cli_kit import GROUPED, assert_refused, gkp
from edge_plans import of_speed
from onnx_kit import feeds_of, run_ort
from split_kit import aligned_net, executor, models, residual

from gkp.converter.graph import Graph
from gkp.converter.sources import OpenOptions, open_any
from gkp.edge.divide.costs import estimate
from gkp.edge.divide.modes import assign
from gkp.edge.divide.planner import Planner, SplitOptions
from gkp.edge.divide.prepare import prepare
from gkp.edge.divide.single_device import best_forms, in_forms
from gkp.edge.divide.write import write
from gkp.edge.forecast.predict import predict
from gkp.edge.forecast.profile import Profiles, measure
from gkp.edge.plan.devices import parse_devices, parse_link
from gkp.edge.plan.schema import COORDINATOR, MODES, Device, Link, read_plan
from gkp.errors import UsageError

C = COORDINATOR


# ---- one device by the best means -----------------------------------------------------------------------------------
def test_one_device_computes_groups_together_where_that_is_faster() -> None:
    planner = Planner(prepare(aligned_net(4, 64, 16)), options(2))
    made = planner._drafted("local", assign("local", planner.graph, 2)).draft
    subgraph = made.subgraphs[0]
    assert estimate(in_forms(subgraph, best_forms(subgraph)).lowered()).ms <= estimate(subgraph.lowered()).ms
    assert 4 in groups(subgraph.model())


def groups(model: onnx.ModelProto) -> set[int]:
    return {a.i for n in model.graph.node if n.op_type == "Conv" for a in n.attribute if a.name == "group"}


def test_layers_that_are_divided_by_groups_are_standard_convolutions_on_every_device() -> None:
    made, _ = Planner(prepare(aligned_net(4, 64, 16)), options(4, mode="branch")).plan()
    assert all(groups(model) <= {1} for model in models(made))


# ---- whole networks -------------------------------------------------------------------------------------------------
LEAN = msgspec.structs.replace(parse_link("1gbe"), overhead=2e-4, cpu=0.0, answer=None)
"""A gigabit whose messages cost no processor anything."""


def options(devices: int | str | list[Device], link: str | Link = "1gbe", **rest: object) -> SplitOptions:
    found = devices if isinstance(devices, list) else parse_devices(str(devices))
    return SplitOptions(found, parse_link(link) if isinstance(link, str) else link, **rest)


@cache
def stock() -> Graph:
    return prepare(open_any(GROUPED, OpenOptions()).model)


def test_stock_groups_are_not_split_by_branches_on_a_gigabit_and_the_plan_says_why() -> None:
    made, chosen = Planner(stock(), options(4)).plan()
    assert made.plan.mode == chosen.chosen.mode == "local"
    told = {p.mode: p for p in chosen.rejected}
    assert {"branch", "spatial", "replicas"} <= set(told)
    assert told["branch"].critical_path_ms > chosen.chosen.prediction.critical_path_ms
    assert told["branch"].bytes > 100_000
    notes = "\n".join(chosen.notes)
    assert "do not split: one device needs" in notes
    assert "replicas" in notes
    assert "spatial" in notes
    assert "break-even of scattering one grouped convolution: R/B < 9C/(2bn)" in notes
    assert "above the best layer's 9*64/" in notes
    assert all(p.based_on == "estimated" for p in (*chosen.rejected, chosen.chosen.prediction))


def test_a_pipeline_is_cut_by_the_times_of_the_layers_as_one_device_computes_them() -> None:
    # as standard convolutions of its groups, stage 1 would be estimated eight times as slow, and the cut 65.5 kB wide
    _, chosen = Planner(stock(), options(2, LEAN, objective="throughput")).plan()
    pipeline = next(p for p in (chosen.chosen.prediction, *chosen.rejected) if p.mode == "pipeline")
    assert pipeline.bytes <= 16_384
    assert pipeline.period_ms < 0.36


def test_a_pipeline_whose_arrays_do_not_fit_is_cut_elsewhere() -> None:
    devices = [Device(name="a", memory_bytes=900 << 10), Device(name="b", memory_bytes=1 << 20)]
    _, chosen = Planner(stock(), options(devices)).plan()
    assert chosen.chosen.mode == "pipeline"
    assert chosen.chosen.too_full == ()
    assert any(note.startswith("does not fit: local (a needs 1.27 MB and has 922 kB)") for note in chosen.notes)


def test_stock_groups_are_replicated_for_throughput() -> None:
    slow = [Device(name=f"pi{k}", speed=0.05) for k in range(4)]
    made, chosen = Planner(stock(), options(slow, objective="throughput")).plan()
    assert made.plan.mode == "replicas"
    local = next(p for p in chosen.rejected if p.mode == "local")
    assert local.period_ms / chosen.chosen.prediction.period_ms == pytest.approx(4, rel=0.02)


def test_aligned_groups_are_split_where_that_wins_and_nothing_moves_from_stem_to_head() -> None:
    slow = [Device(name=f"pi{k}", speed=0.01) for k in range(4)]
    graph = prepare(aligned_net(4, 64, 16))
    _, chosen = Planner(graph, options(slow, LEAN)).plan()
    assert chosen.chosen.mode in ("branch", "hybrid")
    found = {p.mode: p for p in (chosen.chosen.prediction, *chosen.rejected)}
    branch, local = found["branch"], found["local"]
    assert local.critical_path_ms / branch.critical_path_ms > 1.2
    assert not any("break-even" in note for note in chosen.notes)  # nothing is scattered
    assert branch.messages == 3  # the means of the last layer, to one device
    assert branch.bytes == 3 * 128 // 4 * 4


def test_what_is_predicted_stands_in_the_plan_and_can_be_predicted_again_from_it(tmp_path: Path) -> None:
    onnx.save(aligned_net(2, 16, 8), tmp_path / "net.onnx")
    opened = open_any(tmp_path / "net.onnx", OpenOptions())
    made, chosen = Planner(prepare(opened.model), options(2, mode="branch")).plan()
    plan = write(opened, made, chosen, tmp_path / "split")
    assert (plan, plan.hash) == (read_plan(tmp_path / "split"), read_plan(tmp_path / "split").hash)
    assert plan.predicted == chosen.chosen.prediction
    assert plan.rejected == list(chosen.rejected)
    assert plan.notes[:-1] == list(chosen.notes)
    assert msgspec.structs.replace(predict(plan), reason=plan.predicted.reason) == plan.predicted
    assert all(s.estimated_ms and s.working_bytes for s in plan.segments)


@pytest.mark.parametrize("mode", [m for m in MODES if m != "auto"])
def test_every_mode_that_is_asked_for_computes_the_same(mode: str) -> None:
    model = aligned_net(4, 16, 8)
    made, _ = Planner(prepare(model), options(of_speed(1, 0.5, 0.25), mode=mode)).plan()
    assert made.plan.mode == mode
    feeds = feeds_of(model)
    run = executor(made)
    got = run.run(next(iter(feeds.values())))
    np.testing.assert_allclose(got, run_ort(model, feeds)[0], atol=1e-4)


def test_uneven_devices_get_uneven_parts_and_the_slowest_may_stay_idle() -> None:
    model = prepare(residual(32, 32))
    made, _ = Planner(model, options(of_speed(1, 0.25), "loopback", mode="spatial")).plan()
    rows = [sorted(end - first for first, end in layout.rows) for layout in made.plan.layouts.values() if layout.kind == "rows"]
    assert [6, 26] in rows
    hopeless = [*of_speed(0.01, 0.01), Device(name="snail", speed=1e-6)]
    made, chosen = Planner(model, options(hopeless)).plan()
    assert 2 not in {s.device for s in made.plan.segments}
    assert any(note.startswith("idle: ") and "snail" in note for note in chosen.notes)


def test_the_network_goes_to_the_fastest_device_that_has_room() -> None:
    devices = [Device(name="slow", speed=0.5), Device(name="fast", speed=2.0, memory_bytes=1000), Device(name="middle")]
    made, chosen = Planner(prepare(residual()), options(devices)).plan()
    assert chosen.chosen.mode == "local"
    assert [s.device for s in made.plan.segments] == [2]


def test_replicas_are_on_the_devices_that_have_room() -> None:
    devices = [Device(name="tiny", memory_bytes=1000), *of_speed(1, 1)]
    made, chosen = Planner(prepare(residual()), options(devices, mode="replicas")).plan()
    assert [(s.index, s.device) for s in made.plan.segments] == [(0, 1), (1, 2)]
    assert {t.source for t in made.plan.transfers} | {t.target for t in made.plan.transfers} == {COORDINATOR, 1, 2}
    assert [p.device for p in made.subgraphs] == [1, 2]
    assert "idle: tiny" in chosen.notes


def test_half_precision_on_the_wire_halves_what_devices_send_each_other_only() -> None:
    graph = prepare(residual())
    plain, _ = Planner(graph, options(2, mode="spatial")).plan()
    half, _ = Planner(graph, options(2, mode="spatial", wire="float16")).plan()
    assert half.plan.wire == "float16"
    for a, b in zip(plain.plan.transfers, half.plan.transfers, strict=True):
        assert b.bytes == (a.bytes if COORDINATOR in (a.source, a.target) else a.bytes // 2)


def test_verification_says_what_half_precision_on_the_wire_changes(tmp_path: Path) -> None:
    gkp("split", saved(tmp_path), "--devices", "2", "--mode", "spatial", "--wire", "float16", "-o", tmp_path / "out", expect=0)
    note = read_plan(tmp_path / "out").notes[-1]
    found = re.search(r"max error (\S+), allowed .*; not counting float16 between devices, .* by up to (\S+)$", note)
    assert found is not None, note
    assert float(found[1]) < 1e-4 < float(found[2]) < 0.1


def test_one_device_is_never_split() -> None:
    made, chosen = Planner(prepare(residual()), options(1)).plan()
    assert made.plan.mode == "local"
    assert chosen.rejected == ()


def test_measured_segments_of_all_modes_make_measured_predictions() -> None:
    planner = Planner(prepare(residual()), options(2))
    jobs = planner.jobs()
    profile = measure(jobs, 0.2)
    assert set(jobs[0].segment.layers) >= set(jobs[1].segment.layers)  # the whole network first
    made, chosen = Planner(planner.graph, options(2, profiles=Profiles(profile))).plan()
    assert {p.based_on for p in (chosen.chosen.prediction, *chosen.rejected)} == {"measured"}
    assert all(s.measured_ms for s in made.plan.segments)


def test_options_that_make_no_sense_are_refused() -> None:
    for wrong in (options(2, mode="fast"), options(2, objective="beauty"), options(2, wire="bfloat16"), options([]),
                  options(2, profiles=Profiles(None, {"nobody": None}))):  # type: ignore[dict-item]
        with pytest.raises(UsageError):
            wrong.check()


# ---- the command ----------------------------------------------------------------------------------------------------
def saved(tmp_path: Path) -> Path:
    path = tmp_path / "net.onnx"
    onnx.save(residual(), path)
    return path


def test_split_writes_plan_picture_and_a_folder_per_device(tmp_path: Path) -> None:
    out = tmp_path / "my out"
    done = gkp("split", saved(tmp_path), "--devices", "3", "--link", "wifi", "--mode", "spatial", "-o", out, "--json", "-", expect=0)
    made = read_plan(out)
    assert json.loads(done.out)["mode"] == made.mode == "spatial"
    assert made.predicted is not None
    assert {p.mode for p in made.rejected} >= {"local", "replicas", "branch"}
    assert f"try: gkp run '{out}' --local --input FILE.npy" in done.err
    assert "warning: spatial loses against one device" in done.err
    assert "local: better by latency, but not chosen" not in done.err  # that is for -v
    hidden = [note for note in made.notes if not note.startswith(("warning: ", "do not split", "does not fit", "idle: ", "verified"))]
    assert hidden
    assert f"({len(hidden)} more note{'s' * (len(hidden) > 1)} with -v)" in done.err
    assert " ".join(hidden[0].split()[:5]) not in " ".join(done.err.split())
    assert (out / "plan.html").read_text().startswith("<!DOCTYPE html>")
    assert sorted(p.name for p in out.glob("device_*")) == ["device_0", "device_1", "device_2"]


def test_a_profile_of_a_folder_makes_the_next_split_measured(tmp_path: Path) -> None:
    model, out = saved(tmp_path), tmp_path / "out"
    gkp("split", model, "--devices", "2", "--mode", "local", "-o", out, expect=0)
    done = gkp("edge", "profile", out, "--seconds", "0.1", expect=0)
    assert "1 segments, one thread on core" in " ".join(done.err.split())  # wherever a long path wraps
    gkp("split", model, "--devices", "2", "--mode", "local", "-o", out, "--force", "--profile", out / "profile.json", expect=0)
    made = read_plan(out)
    assert made.predicted.based_on == "measured"
    assert any(n.startswith("not all segments of ") and "branch" in n and "are in the profile" in n for n in made.notes)


@pytest.mark.parametrize(("arguments", "code", "words"), [
    (["--devices", "0"], 2, "not a number of devices"), (["--devices", "nothing.yaml"], 6, "no such file"),
    (["--devices", "2", "--link", "5g"], 2, "--link"), (["--devices", "2", "--profile", "nothing.json"], 6, "no such file")])
def test_what_cannot_be_split_is_refused_and_leaves_nothing(arguments: list[str], code: int, words: str, tmp_path: Path) -> None:
    assert_refused(gkp("split", saved(tmp_path), *arguments, "-o", tmp_path / "out"), code, words)
    assert not (tmp_path / "out").exists()


def test_a_damaged_segment_is_not_measured(tmp_path: Path) -> None:
    out = tmp_path / "out"
    gkp("split", saved(tmp_path), "--devices", "2", "--mode", "local", "-o", out, expect=0)
    file = next(out.glob("device_0/*.onnx"))
    file.write_bytes(file.read_bytes()[:-1])
    assert_refused(gkp("edge", "profile", out), 6, "is not the file that the plan names")
    assert not (out / "profile.json").exists()
