"""Segments as native libraries: the same answers, ONNX where a kernel is missing, nothing run that nobody vouches for."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from cli_kit import gkp
from onnx_kit import Net
from split_kit import LINK, SHARED, aligned_net, devices

from gkp.converter.sources import OpenOptions, open_any
from gkp.edge.device.in_process import InProcessExecutor
from gkp.edge.divide.planner import SplitOptions, split
from gkp.edge.forecast import profile as profiling
from gkp.edge.plan.devices import parse_link
from gkp.edge.plan.schema import Plan, read_plan
from gkp.errors import UnsafeFileError, UsageError

pytestmark = pytest.mark.slow  # they compile


def options(mode: str, n: int = 2, cpu: str = "host") -> SplitOptions:
    return SplitOptions(devices(n), parse_link("loopback"), mode=mode, target="native", cpu=cpu)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("net") / "net.onnx"
    onnx.save(aligned_net(2, blocks=1), path)
    return path


@pytest.fixture(scope="module")
def made(model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Plan, Path]:
    out = tmp_path_factory.mktemp("native") / "split"
    return split(model, out, options("branch")), out


def suffixes(plan: Plan) -> set[str]:
    return {Path(s.file).suffix for s in plan.segments}


def answer(model: Path, x: np.ndarray) -> np.ndarray:
    return np.asarray(open_any(model, OpenOptions()).reference({"x": x})[0])


def test_native_segments_compute_the_same(made: tuple[Plan, Path], model: Path) -> None:
    plan, out = made
    assert suffixes(plan) == {".so"}
    x = np.random.default_rng(3).standard_normal((1, 3, 8, 8)).astype(np.float32)
    run = InProcessExecutor.open(plan, out, trust_code=True)
    np.testing.assert_allclose(run.run(x), answer(model, x), atol=5e-5)
    run.close()


def test_local_workers_run_native_segments_when_told_to_trust_them(made: tuple[Plan, Path], model: Path,
                                                                   tmp_path: Path) -> None:
    _, out = made
    x = np.random.default_rng(3).standard_normal((1, 3, 8, 8)).astype(np.float32)
    np.save(tmp_path / "x.npy", x)
    refused = gkp("run", out, "--local", "--input", tmp_path / "x.npy", expect=5)
    assert "--trust-code" in refused.err
    gkp("run", out, "--local", "--trust-code", "--input", tmp_path / "x.npy", "--output", tmp_path / "y.npy")
    np.testing.assert_allclose(np.load(tmp_path / "y.npy"), answer(model, x), atol=5e-5)


def test_nothing_is_run_or_measured_that_nobody_vouches_for(made: tuple[Plan, Path]) -> None:
    plan, out = made
    with pytest.raises(UnsafeFileError):
        InProcessExecutor.open(plan, out)
    with pytest.raises(UnsafeFileError):
        profiling.folder_jobs(out)
    gkp("edge", "profile", out, "--seconds", 0.2, expect=5)


def test_measured_times_of_native_segments_are_theirs_alone(made: tuple[Plan, Path], model: Path, tmp_path: Path) -> None:
    plan, out = made
    found = profiling.measure(profiling.folder_jobs(out, trust_code=True), 0.2)
    times, based_on = profiling.plan_times(plan, profiling.Profiles(found))
    assert based_on == "measured"
    assert all(t > 0 for t in times)
    stock = split(model, tmp_path / "ort", SplitOptions(devices(2), parse_link("loopback"), mode="branch"))
    assert not {profiling.signature(stock.values, s) for s in stock.segments} & set(found.entries)


def test_rows_are_put_together_by_native_kernels(model: Path, tmp_path: Path) -> None:
    plan = split(model, tmp_path / "rows", options("spatial"))
    assert suffixes(plan) == {".so"}
    x = np.random.default_rng(4).standard_normal((1, 3, 8, 8)).astype(np.float32)
    run = InProcessExecutor.open(plan, tmp_path / "rows", trust_code=True)
    np.testing.assert_allclose(run.run(x), answer(model, x), atol=5e-5)
    run.close()


def test_segments_without_kernels_stay_onnx(tmp_path: Path) -> None:
    net = Net(1, 3, 8, 8)
    onnx.save(net.model(net.conv3(net.op("Celu", net.conv3("x", 3, 8)), 8, 4)), tmp_path / "celu.onnx")
    plan = split(tmp_path / "celu.onnx", tmp_path / "split", options("local", 1))
    assert suffixes(plan) == {".onnx"}
    assert plan == read_plan(tmp_path / "split")


def test_libraries_for_another_processor_are_verified_by_kernels_of_this_one(model: Path, tmp_path: Path) -> None:
    plan = split(model, tmp_path / "arm", options("local", 1, "aarch64"))
    library = tmp_path / "arm" / "device_0" / plan.segments[0].file
    assert library.read_bytes()[18:20] == (183).to_bytes(2, "little")  # e_machine of the ELF header: AArch64
    assert any(n.startswith("verified against") for n in plan.notes)


def test_a_processor_is_named_for_native_kernels_only() -> None:
    with pytest.raises(UsageError, match="native"):
        SplitOptions(devices(2), LINK, cpu="aarch64").check()


@pytest.mark.skipif(not SHARED.exists(), reason="the published checkpoints are not here")
def test_a_published_checkpoint_runs_natively_on_two_devices(tmp_path: Path) -> None:
    plan = split(SHARED / "dsp/resnet20_g4.pt", tmp_path / "dsp", options("pipeline"))
    assert suffixes(plan) == {".so"}
    assert {s.device for s in plan.segments} == {0, 1}
