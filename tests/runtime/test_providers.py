"""Execution providers: a session runs on the one that was asked for, or there is an error."""

from __future__ import annotations

import contextlib
import ctypes
import sys
from pathlib import Path
from types import ModuleType

import onnxruntime as ort
import pytest
from cli_kit import small_net
from cuda_kit import shared_library

from gkp.converter.targets import make_target
from gkp.errors import BackendMissingError, FileError, GkpError
from gkp.options.targets import OrtOptions
from gkp.runtime.environment import version
from gkp.runtime.providers import PROVIDERS, Provider, find_provider
from gkp.runtime.runners import OrtRunner

PLUGIN = "onnxruntime_ep_nv_tensorrt_rtx"
GPU = ("cuda", "tensorrt")


def claim(monkeypatch: pytest.MonkeyPatch, provider: str) -> None:
    """ONNX Runtime lists a provider that cannot start, as builds for GPUs do on machines without one."""
    if PROVIDERS[provider] in ort.get_available_providers():
        pytest.skip("this onnxruntime really has it")
    listed = [PROVIDERS[provider], *ort.get_available_providers()]
    monkeypatch.setattr(ort, "get_available_providers", lambda: listed)


def fake_plugin(library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A plugin package with that library, gone with the test."""
    plugin = ModuleType(PLUGIN)
    monkeypatch.setattr(plugin, "get_library_path", lambda: str(library), raising=False)
    monkeypatch.setitem(sys.modules, PLUGIN, plugin)


@pytest.fixture
def _without_plugin() -> None:
    if version("onnxruntime-ep-nv-tensorrt-rtx-cu12"):
        pytest.skip("the plugin is installed here")


# ---- what silently falls back ---------------------------------------------------------------------------------------
@pytest.mark.parametrize("provider", GPU)
def test_a_session_that_fell_back_to_the_cpu_is_refused(provider: str, monkeypatch: pytest.MonkeyPatch) -> None:
    claim(monkeypatch, provider)
    with pytest.raises(BackendMissingError, match=f"did not start {PROVIDERS[provider]}: the session runs on CPU") as caught:
        OrtRunner(small_net().SerializeToString(), 1, provider)
    assert caught.value.exit_code == 4
    assert "GPU" in caught.value.hint or "--provider cuda" in caught.value.hint


@pytest.mark.parametrize("provider", GPU)
def test_a_target_whose_provider_does_not_start_is_missing(provider: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before any work is done."""
    claim(monkeypatch, provider)
    with pytest.raises(BackendMissingError, match="did not start"):
        make_target(OrtOptions(provider=provider)).require("fp16")


@pytest.mark.parametrize("data", [b"", b"garbage", small_net().SerializeToString()[:300]])
def test_a_model_that_no_provider_opens_is_the_models_fault(data: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    claim(monkeypatch, "cuda")
    with pytest.raises(FileError, match="cannot open the model"):
        OrtRunner(data, 1, "cuda")


def test_a_provider_that_takes_no_operator_is_refused() -> None:
    """Azure's provider starts without more, and computes nothing itself."""
    if "AzureExecutionProvider" not in ort.get_available_providers():
        pytest.skip("this onnxruntime has no provider for Azure")
    idle = Provider("tensorrt", "AzureExecutionProvider")
    with pytest.raises(BackendMissingError, match="takes no operator of the model"):
        idle.session(ort, small_net().SerializeToString(), ort.SessionOptions())


@pytest.mark.parametrize(("ort_name", "words"), [("NvTensorRTRTXExecutionProvider", "did not start Nv"),
                                                 ("CPUExecutionProvider", "takes no operator")])
def test_a_plugin_is_started_by_its_device_and_checked(ort_name: str, words: str) -> None:
    """With the CPU in place of the GPU."""
    device = next(d for d in ort.get_ep_devices() if d.ep_name == "CPUExecutionProvider")
    with pytest.raises(BackendMissingError, match=words):
        Provider("nv-tensorrt-rtx", ort_name, (device,)).session(ort, small_net().SerializeToString(), ort.SessionOptions())


# ---- what is not here -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("provider", ["cuda", "tensorrt", "abacus"])
def test_a_provider_that_is_not_built_in_names_those_that_are(provider: str) -> None:
    if PROVIDERS.get(provider) in ort.get_available_providers():
        pytest.skip("this onnxruntime really has it")
    with pytest.raises(BackendMissingError, match=r"has no provider '.*' \(it has: cpu") as caught:
        find_provider(ort, provider)
    assert ".[gpu]" in caught.value.hint


@pytest.mark.usefixtures("_without_plugin")
def test_a_missing_plugin_says_which_package_it_is_in() -> None:
    with pytest.raises(BackendMissingError, match="'nv-tensorrt-rtx': its plugin is not installed") as caught:
        find_provider(ort, "nv-tensorrt-rtx")
    assert "onnxruntime-ep-nv-tensorrt-rtx-cu12" in caught.value.hint


@pytest.mark.usefixtures("_without_plugin")
def test_a_plugin_that_cannot_be_loaded_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    library = tmp_path / "libplugin.so"
    library.write_bytes(b"no library")
    fake_plugin(library, monkeypatch)
    with pytest.raises(BackendMissingError, match=r"cannot load the plugin of Nv.*libplugin\.so") as caught:
        find_provider(ort, "nv-tensorrt-rtx")
    assert "driver" in caught.value.hint
    assert "\n" not in caught.value.message


@pytest.mark.usefixtures("_without_plugin")
def test_the_cuda_runtime_that_a_plugin_carries_is_loaded_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shared_library(tmp_path / "libcudart.so.12.9", "int gkp_cuda_runtime_was_loaded(void) { return 12; }")
    (tmp_path / "libcudart.so.13").write_bytes(b"no library either")
    library = shared_library(tmp_path / "libplugin.so", "int nothing_that_onnx_runtime_knows(void) { return 0; }")
    fake_plugin(library, monkeypatch)
    with pytest.raises(GkpError, match="cannot load the plugin"):
        find_provider(ort, "nv-tensorrt-rtx")
    assert ctypes.CDLL(None).gkp_cuda_runtime_was_loaded() == 12


@pytest.mark.usefixtures("_without_plugin")
def test_an_onnx_runtime_without_plugins_is_too_old(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(ort, "register_execution_provider_library")
    with pytest.raises(BackendMissingError, match="takes no provider plugins") as caught:
        find_provider(ort, "nv-tensorrt-rtx")
    assert "1.24" in caught.value.hint


def test_looking_for_cuda_libraries_prints_nothing(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(ort, "preload_dlls", lambda: print("Failed to load libcublas"))
    with contextlib.suppress(BackendMissingError):
        find_provider(ort, "cuda")
    assert capsys.readouterr().out == ""


def test_the_cpu_looks_for_no_cuda_libraries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ort, "preload_dlls", lambda: pytest.fail("nobody asked for a GPU"))
    assert find_provider(ort, "cpu").ort_name == "CPUExecutionProvider"
