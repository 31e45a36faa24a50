"""Runners: the runtimes' own errors become gkp's, threads are obeyed, outputs come back in order."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from cli_kit import blocked, save, small_net
from onnx_kit import Net, feeds_of, run_ort

from gkp.errors import BackendMissingError, FileError, UsageError
from gkp.runtime import runners
from gkp.runtime.runners import AS_INSTALLED, OpenVinoRunner, OrtRunner, openvino_precision

RUNNERS = [OrtRunner, OpenVinoRunner]




@pytest.mark.parametrize("runner", RUNNERS)
def test_a_model_runs_from_its_bytes(runner: type[OrtRunner]) -> None:
    net = Net(1, 3, 8, 8)
    y = net.conv3("x", 3, 4)
    model = net.model(net.relu(y), net.op("Neg", y))
    made = runner(model.SerializeToString(), 1)
    x = feeds_of(model)
    assert made.inputs == ["x"]
    assert made.outputs == [o.name for o in model.graph.output]
    for got, want in zip(made.run(x), run_ort(model, x), strict=True):
        np.testing.assert_allclose(got, want, atol=1e-5)
    made.close()


@pytest.mark.parametrize("runner", RUNNERS)
@pytest.mark.parametrize("data", [b"", b"garbage", small_net().SerializeToString()[:300]])
def test_what_is_no_model_is_a_file_error(runner: type[OrtRunner], data: bytes) -> None:
    with pytest.raises(FileError, match="cannot open the model") as caught:
        runner(data, 1)
    assert "\n" not in caught.value.message


@pytest.mark.parametrize("runner", RUNNERS)
def test_an_input_that_does_not_fit_is_a_usage_error(runner: type[OrtRunner]) -> None:
    made = runner(small_net().SerializeToString(), 1)
    for bad in ({"x": np.zeros((1, 4, 8, 8), np.float32)}, {"nowhere": np.zeros((1, 3, 8, 8), np.float32)}):
        with pytest.raises(UsageError, match="cannot run the model"):
            made.run(bad)


def test_openvino_names_the_operator_that_it_lacks() -> None:
    """Its message begins with the places in its own source, and ends with the reason."""
    net = Net(1, 3, 8, 8, opset=19)
    model = net.model(net.op("Pad", "x", net.ints(0, 0, 1, 1, 0, 0, 1, 1), mode="wrap"))
    with pytest.raises(FileError, match=r"cannot open the model: .*Pad"):
        OpenVinoRunner(model.SerializeToString(), 1)


@pytest.mark.parametrize("runner", RUNNERS)
def test_results_are_not_overwritten_by_the_next_run(runner: type[OrtRunner]) -> None:
    made = runner(small_net().SerializeToString(), 1)
    rng = np.random.default_rng(0)
    a, b = (rng.standard_normal((1, 3, 8, 8)).astype(np.float32) for _ in range(2))
    first = made.run({"x": a})[0]
    kept = first.copy()
    made.run({"x": b})
    np.testing.assert_array_equal(first, kept)


def test_an_unknown_provider_names_those_that_are_here() -> None:
    for provider in ("cuda", "abacus"):
        with pytest.raises(BackendMissingError, match=r"it has: cpu"):
            OrtRunner(small_net().SerializeToString(), 1, provider)


@pytest.mark.parametrize(("module", "call", "extra"), [("onnxruntime", "import_ort", "ort"),
                                                       ("openvino", "import_openvino", "openvino")])
def test_a_missing_runtime_says_how_to_get_it(module: str, call: str, extra: str) -> None:
    body = (f"from gkp.runtime.runners import {call}\nfrom gkp.errors import BackendMissingError\n"
            f"try:\n    {call}()\nexcept BackendMissingError as e:\n    print(e.message, '|', e.hint)\n")
    outcome = blocked([module], body)
    assert "is not installed" in outcome.out
    assert f".[{extra}]" in outcome.out


@pytest.mark.parametrize("order", ["", "[::-1]"])
def test_a_signal_after_two_openvino_models_is_handled(order: str, tmp_path: Path) -> None:
    """OpenVINO exchanges the stack of signal handlers: with two of its cores Ctrl-C was a segmentation fault."""
    path = save(small_net(), tmp_path / "m.onnx")
    program = f"""
import os, signal, sys
from pathlib import Path
from gkp.runtime.runners import OpenVinoRunner
runners = [OpenVinoRunner(Path({str(path)!r}).read_bytes(), 1) for _ in range(2)]
for runner in runners{order}:
    runner.close()
del runner, runners
rubbish = [bytearray(11568) for _ in range(1000)]
signal.signal(signal.SIGINT, lambda *_: sys.exit(130))
os.kill(os.getpid(), signal.SIGINT)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 130, done.stderr


def test_openvino_as_installed_is_told_the_threads_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[dict[str, object]] = []

    class Core:
        def read_model(self, model: bytes) -> bytes:
            return model

        def compile_model(self, model: bytes, device: str, options: dict[str, object]) -> None:
            told.append(options)
            raise ValueError("far enough")

    monkeypatch.setattr(runners, "_openvino_core", Core)
    monkeypatch.setattr(runners, "refuse_external", lambda model: None)
    for precision in ("fp32", AS_INSTALLED):
        with pytest.raises(FileError, match="far enough"):
            OpenVinoRunner(b"", 3, runners.OPENVINO[precision])
    assert told[0] == {"INFERENCE_NUM_THREADS": 3, "PERFORMANCE_HINT": "LATENCY", "NUM_STREAMS": 1, "INFERENCE_PRECISION_HINT": "f32"}
    assert told[1] == {"INFERENCE_NUM_THREADS": 3}


def test_openvino_says_in_what_it_computes_by_itself() -> None:
    pytest.importorskip("openvino")
    assert openvino_precision() in ("fp32", "bf16", "fp16")


def test_openvino_is_imported_without_what_reports_that() -> None:
    """In a process of its own: a second import changes nothing. The package stays for those who import it themselves."""
    code = ("import sys; from gkp.runtime.runners import import_openvino; import_openvino(); import openvino.tools.ovc as ovc; "
            "assert type(ovc.telemetry).__module__ == 'openvino.tools.ovc.telemetry_stub', type(ovc.telemetry); "
            "assert 'openvino_telemetry' not in sys.modules")
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
