"""TensorRT engines: the right one is picked, what cannot be opened says why, what goes in is checked."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from cli_kit import small_net
from trt_kit import X, described

from gkp.errors import BackendMissingError, FileError, GkpError, UnsafeFileError, UsageError
from gkp.manifest import EngineTensor
from gkp.require import install
from gkp.runtime import trt
from gkp.runtime.cuda import ask_driver
from gkp.runtime.trt import TrtRunner, check_feed, engine_for
from gkp.runtime.trt_package import is_installed, trt_package


@pytest.fixture
def _gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The driver claims a GPU of compute capability 8.9."""
    monkeypatch.setattr(trt, "device_capability", lambda: (8, 9))
    monkeypatch.setattr(trt, "device_name", lambda: "NVIDIA Stand-in")


@pytest.fixture
def _no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trt, "device_capability", lambda: None)
    monkeypatch.setattr(trt, "device_name", lambda: None)


@pytest.fixture(scope="module")
def engine() -> bytes:
    """A real one, for 8.9, which cannot be opened here."""
    if ask_driver() is not None:
        pytest.skip("there is a driver here: it might open")
    try:
        package = trt_package("tensorrt_rtx")
    except BackendMissingError as e:
        pytest.skip(e.message)
    builder, network, _ = package.loaders.network_from_onnx_bytes(small_net().SerializeToString())
    config = package.config_class(compute_capabilities=[(8, 9)])(builder, network)
    return bytes(builder.build_serialized_network(network, config))


# ---- which engine ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("capability", "file"), [((7, 5), "turing"), ((8, 6), "newer"), ((12, 0), "newer")])
def test_the_engine_for_the_gpu_is_picked(capability: tuple[int, int], file: str) -> None:
    engines = [described("7.5", file="turing"), described("8.6", "8.9", "12.0", file="newer")]
    assert engine_for(engines, capability).file == file


def test_of_two_engines_that_whose_package_is_here_is_picked() -> None:
    engines = [described("8.9", package="no_such_package", file="a"), described("8.9", package="msgspec", file="b")]
    assert engine_for(engines, (8, 9)).file == "b"
    assert engine_for(engines[:1], (8, 9)).file == "a", "the runner says what to install"


def test_without_a_gpu_the_error_says_what_was_built_and_for_which() -> None:
    engines = [described("7.5", file="engine.sm75.trt"), described("8.6", "12.0", file="engine.sm86+sm120.trt")]
    with pytest.raises(BackendMissingError) as caught:
        engine_for(engines, None)
    assert caught.value.exit_code == 4
    for words in ("no NVIDIA GPU", "engine.sm75.trt", "engine.sm86+sm120.trt", "tensorrt_rtx 1.7.1.116", "7.5 (Turing)",
                  "8.6 (Ampere), 12.0 (Blackwell)"):
        assert words in caught.value.message
    assert 'pip install ".[trt-rtx]"' in caught.value.hint


def test_a_gpu_that_no_engine_was_built_for_is_named_beside_those_that_were() -> None:
    with pytest.raises(BackendMissingError) as caught:
        engine_for([described("8.6", "8.9")], (9, 0), "NVIDIA H100")
    for words in ("NVIDIA H100", "9.0 (Hopper)", "8.6 (Ampere), 8.9 (Ada)", "tensorrt_rtx"):
        assert words in caught.value.message
    assert "--compute-capability 90" in caught.value.hint


def test_an_artefact_without_an_engine_says_how_to_get_one() -> None:
    for capability in (None, (8, 9)):
        with pytest.raises(BackendMissingError, match="holds no engine, only the ONNX file") as caught:
            engine_for([], capability)
        assert "--no-engine" in caught.value.hint
        assert "manifest.json" in caught.value.hint


# ---- opening --------------------------------------------------------------------------------------------------------
@pytest.mark.usefixtures("_no_gpu")
def test_an_engine_is_not_opened_without_a_gpu(tmp_path: Path) -> None:
    with pytest.raises(BackendMissingError, match=r"no NVIDIA GPU answers here; engine.trt was built with tensorrt_rtx") as caught:
        TrtRunner(tmp_path / "not even read", described())
    assert caught.value.exit_code == 4


@pytest.mark.usefixtures("_gpu")
@pytest.mark.parametrize("source", ["bytes", "file"])
def test_an_engine_that_tensorrt_refuses_says_why(engine: bytes, source: str, tmp_path: Path,
                                                  capfd: pytest.CaptureFixture[str]) -> None:
    """A GPU is claimed, and there is no driver: everything up to opening a real engine is real."""
    if trt_package("tensorrt_rtx").version != "1.7.1.116":
        pytest.skip("the description is that of another version")
    path = tmp_path / "engine.trt"
    path.write_bytes(engine)
    with pytest.raises(FileError, match=r"TensorRT cannot open engine\.trt: Could not deserialize"):
        TrtRunner(engine if source == "bytes" else path, described(), hashlib.sha256(engine).hexdigest())
    assert capfd.readouterr() == ("", ""), "the messages are in the error"


@pytest.mark.usefixtures("_gpu", "engine")
def test_bytes_that_are_no_engine_are_refused() -> None:
    version = trt_package("tensorrt_rtx").version
    with pytest.raises(FileError, match=r"TensorRT cannot open engine\.trt: .*magicTag"):
        TrtRunner(b"rubbish" * 100, described(version=version))


@pytest.mark.usefixtures("_gpu")
def test_an_engine_of_another_version_names_both(engine: bytes) -> None:
    with pytest.raises(BackendMissingError, match=r"tensorrt_rtx 1\..* cannot open engine.trt, which 0.9 built") as caught:
        TrtRunner(engine, described(version="0.9"))
    assert "install tensorrt_rtx 0.9" in caught.value.hint


@pytest.mark.usefixtures("_gpu", "engine")
def test_another_file_than_was_written_is_unsafe(tmp_path: Path) -> None:
    path = tmp_path / "engine.trt"
    path.write_bytes(b"exchanged")
    with pytest.raises(UnsafeFileError, match="checksum"):
        TrtRunner(path, described(), hashlib.sha256(b"written").hexdigest())
    with pytest.raises(FileError, match="cannot be read"):
        TrtRunner(tmp_path / "gone.trt", described())


@pytest.mark.usefixtures("_gpu")
def test_a_missing_package_says_what_to_install() -> None:
    if is_installed("tensorrt"):
        pytest.skip("the classic package is installed here")
    with pytest.raises(BackendMissingError, match="tensorrt is not installed") as caught:
        TrtRunner(b"", described(package="tensorrt"))
    assert caught.value.hint == install("trt")


@pytest.mark.usefixtures("_gpu")
def test_a_package_that_nobody_knows_is_not_imported() -> None:
    with pytest.raises(GkpError, match="unknown package 'antigravity'"):
        TrtRunner(b"", described(package="antigravity"))


@pytest.mark.usefixtures("_gpu")
def test_a_format_that_nobody_knows_is_refused() -> None:
    odd = msgspec.structs.replace(X, format="CHW32")
    with pytest.raises(GkpError, match="'CHW32'"):
        TrtRunner(b"", described(inputs=(odd,)))


# ---- inputs ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("x", "words"), [
    (None, "'x' is missing"), (np.zeros((33, 3, 8, 8), np.float32), "has batch 33, the engine was built for 1 to 32"),
    (np.zeros((0, 3, 8, 8), np.float32), "has batch 0, the engine was built for 1 to 32"),
    (np.zeros((1, 3, 9, 8), np.float32), "has axis 2 of size 9, the engine was built for 8"),
    (np.zeros((1, 3, 8, 8), np.float16), "is float16"), (np.zeros((3, 8, 8), np.float32), "with 4 axes"),
])
def test_what_the_engine_was_not_built_for_is_a_usage_error(x: Any, words: str) -> None:
    with pytest.raises(UsageError, match=words) as caught:
        check_feed({} if x is None else {"x": x}, X)
    assert caught.value.hint


def test_a_batch_beyond_the_profile_names_the_option() -> None:
    with pytest.raises(UsageError) as caught:
        check_feed({"x": np.zeros((64, 3, 8, 8), np.float32)}, X)
    assert "--batch-profile MIN,OPT,MAX" in caught.value.hint
    static = EngineTensor(name="x", dtype="float32", format="LINEAR", shape=[2, 3, 8, 8])
    with pytest.raises(UsageError, match=r"has batch 1, the engine was built for 2$"):
        check_feed({"x": np.zeros((1, 3, 8, 8), np.float32)}, static)
    assert check_feed({"x": np.zeros((2, 3, 8, 8), np.float32)}, static).shape[0] == 2
