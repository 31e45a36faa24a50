"""Opening, converting and comparing PyTorch modules leaves the caller's process as it was, and prints nothing of theirs."""

from __future__ import annotations

import errno
import json
import logging
import random
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cli_kit import FAST, program
from torch import nn

import gkp
from gkp.converter.sources import torch_export
from gkp.errors import FileError, UnsupportedModelError, UsageError

ESCAPE = "\x1b]0;stolen\x07\x1b[31m"


class Meddling(nn.Module):
    """Changes whatever it can reach whenever it runs."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.conv(x)
        torch.set_grad_enabled(not torch.is_grad_enabled())
        torch.set_default_dtype(torch.float64)
        torch.set_num_threads(3)
        torch.set_autocast_enabled("cpu", True)
        torch.set_autocast_dtype("cpu", torch.float16)
        torch.set_autocast_cache_enabled(False)
        torch.use_deterministic_algorithms(True)
        torch.manual_seed(5)
        np.random.seed(5)
        random.seed(5)
        logging.disable(logging.INFO)
        warnings.simplefilter("error")
        print(ESCAPE)
        return y


class Scripted(nn.Module):
    """The same as far as TorchScript can."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        print("\x1b]0;stolen\x07\x1b[31m")
        warnings.warn("\x1b[32mstolen")  # noqa: B028 (TorchScript knows no stacklevel)
        torch.set_grad_enabled(False)
        torch.manual_seed(5)
        return self.conv(x)


def state() -> dict[str, Any]:
    return {"grad": torch.is_grad_enabled(), "dtype": torch.get_default_dtype(), "threads": torch.get_num_threads(),
            "device": str(torch.get_default_device()), "deterministic": torch.get_deterministic_debug_mode(),
            "autocast": (torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu"), torch.is_autocast_cache_enabled()),
            "random": (torch.get_rng_state().tolist(), np.random.get_state()[1].tolist(), random.getstate()),  # type: ignore[index]
            "logging": logging.root.manager.disable, "warnings": list(warnings.filters)}


@pytest.fixture(params=[True, False], ids=["with grad", "without grad"])
def before(request: pytest.FixtureRequest) -> Iterator[dict[str, Any]]:
    grad = torch.is_grad_enabled()
    torch.set_grad_enabled(request.param)
    yield state()
    torch.set_grad_enabled(grad)


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    torch.jit.save(torch.jit.script(Scripted().eval()), str(tmp_path / "m.pt"))
    return tmp_path / "m.pt"


def through_open(model: Any, folder: Path, **options: Any) -> None:
    opened = gkp.open(model, input_shape=(1, 3, 8, 8), **options)
    assert opened.layers


def through_convert(model: Any, folder: Path, **options: Any) -> None:
    gkp.convert(model, target="onnx", output=folder / "out", benchmark=False, input_shape=(1, 3, 8, 8), **options)
    assert (folder / "out" / "manifest.json").is_file()


@pytest.mark.parametrize("call", [through_open, through_convert])
@pytest.mark.parametrize("kind", ["module", "TorchScript"])
def test_what_a_model_changes_in_the_process_is_put_back(call: Callable[..., None], kind: str, archive: Path, before: dict[str, Any],
                                                         tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    model = Meddling() if kind == "module" else archive
    before["random"] = state()["random"]  # making a module takes some
    call(model, tmp_path, trust_code=True)
    assert state() == before
    assert capfd.readouterr() == ("", "")


def test_what_a_failing_model_changes_is_put_back(before: dict[str, Any], capfd: pytest.CaptureFixture[str]) -> None:
    class Failing(Meddling):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            super().forward(x)
            torch.set_default_device("meta")
            raise ValueError("no")

    module = Failing()
    before = state()
    with pytest.raises(gkp.GkpError, match="no"):
        gkp.open(module, input_shape=(1, 3, 8, 8))
    assert state() == before
    assert capfd.readouterr() == ("", "")


def test_threads_that_run_models_at_once_leave_the_process_as_it_was(capfd: pytest.CaptureFixture[str]) -> None:
    models = [Meddling() for _ in range(4)]
    before = state()
    threads = [threading.Thread(target=gkp.open, args=(m,), kwargs={"input_shape": (1, 3, 8, 8)}) for m in models]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert state() == before
    print("mine")
    assert capfd.readouterr() == ("mine\n", "")


def test_other_threads_print_what_they_like_meanwhile(capfd: pytest.CaptureFixture[str]) -> None:
    go = threading.Event()

    def speak() -> None:
        go.wait()
        print("another thread's", flush=True)

    other = threading.Thread(target=speak)
    other.start()
    with torch_export.model_code():
        print("the model's")
        go.set()
        other.join()
    assert capfd.readouterr() == ("another thread's\n", "")


@pytest.mark.parametrize("command", [("inspect",), ("convert", "--target", "onnx", *FAST), ("verify",)])
def test_json_of_a_model_that_prints_is_json(command: tuple[str, ...], archive: Path, tmp_path: Path) -> None:
    where = [archive, *([archive] if command[0] == "verify" else ["-o", tmp_path / "out"] if command[0] == "convert" else [])]
    outcome = program(command[0], *where, *command[1:], "--input-shape", "1,3,8,8", "--trust-code", "--json", "-")
    assert outcome.code == 0, outcome.err
    assert json.loads(outcome.out)
    assert "stolen" not in outcome.out + outcome.err


def test_a_full_disk_is_no_fault_of_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(torch.onnx, "export", full)
    with pytest.raises(FileError, match="the disk is full while exporting the model: "):
        gkp.convert(nn.Conv2d(3, 4, 3), target="onnx", dry_run=True, input_shape=(1, 3, 8, 8))


class Sum(nn.Module):
    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return x + y


@pytest.mark.parametrize("kind", ["module", "traced", "scripted", "program"])
def test_a_model_of_two_inputs_is_sent_to_onnx(kind: str, tmp_path: Path) -> None:
    """Whatever shapes were given: no error asks for another shape."""
    x, path = torch.zeros(1, 3, 8, 8), tmp_path / "sum.pt"
    shapes = {"x": (1, 3, 8, 8), "y": (1, 3, 8, 8)}
    if kind == "program":
        torch.export.save(torch.export.export(Sum(), (x, x)), path)
    elif kind != "module":
        torch.jit.save(torch.jit.trace(Sum(), (x, x)) if kind == "traced" else torch.jit.script(Sum()), path)
    given: Any = Sum() if kind == "module" else path
    with pytest.raises(UnsupportedModelError, match="takes 2 inputs") as caught:
        gkp.open(given, input_shape=shapes, trust_code=True)
    assert "ONNX" in caught.value.hint


def test_an_input_shape_of_another_name_is_refused() -> None:
    with pytest.raises(UsageError, match="no input 'x0'"):
        gkp.open(nn.Conv2d(3, 4, 1), input_shape={"x0": (1, 3, 8, 8)})
