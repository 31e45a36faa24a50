"""Running TensorRT engines and artefacts with them, with a stand-in for Polygraphy's runner, which needs a GPU."""

from __future__ import annotations

import gc
import hashlib
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from cli_kit import FAST, gkp, save, small_net
from trt_kit import FakeEngine, FakeLoaders, FakeRunner, Y, described

from gkp import manifest
from gkp.errors import BackendMissingError, FileError, UnsafeFileError, UsageError
from gkp.manifest import Engine, EngineTensor, Manifest
from gkp.runtime import trt
from gkp.runtime.load import load, open_runner
from gkp.runtime.trt import TrtRunner, pick_engine
from gkp.runtime.trt_package import TrtPackage
from gkp.runtime.trust import sign

Loaded = Callable[..., FakeLoaders]


@pytest.fixture
def _gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The driver claims a GPU of compute capability 8.9."""
    monkeypatch.setattr(trt, "device_capability", lambda: (8, 9))
    monkeypatch.setattr(trt, "device_name", lambda: "NVIDIA Stand-in")


@pytest.fixture
def _no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trt, "device_capability", lambda: None)
    monkeypatch.setattr(trt, "device_name", lambda: None)


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch, _gpu: None) -> Loaded:
    """Makes a package with such loaders the installed one."""

    def use(compute: Callable[[Mapping[str, Any]], Mapping[str, Any]], engine: Any = None) -> FakeLoaders:
        loaders = FakeLoaders(compute, engine)
        monkeypatch.setattr(trt, "trt_package", lambda name: TrtPackage(name, "1.7.1.116", None, loaders, None))
        return loaders

    return use


def test_arrays_are_given_and_returned_in_the_order_of_the_engine(loaded: Loaded) -> None:
    loaded(lambda feeds: {"b": feeds["x"] * 2, "a": feeds["z"] + 1})
    ports = [EngineTensor(name=n, dtype="float32", format="LINEAR", shape=[2, 3]) for n in ("z", "x", "a", "b")]
    runner = TrtRunner(b"", described(inputs=tuple(ports[:2]), outputs=tuple(ports[2:])))
    assert (runner.inputs, runner.outputs) == (["z", "x"], ["a", "b"])
    x, z = np.ones((2, 3), np.float32), np.zeros((3, 2), np.float32).T
    a, b = runner.run({"x": x, "z": z})
    np.testing.assert_array_equal(a, z + 1)
    np.testing.assert_array_equal(b, x * 2)
    again = runner.run({"x": x * 5, "z": z})
    np.testing.assert_array_equal(b, x * 2, "results are not overwritten by the next run")
    np.testing.assert_array_equal(again[1], x * 10)


def test_channels_last_engines_are_fed_as_nchw(loaded: Loaded) -> None:
    seen: list[Any] = []

    def compute(feeds: Mapping[str, Any]) -> Mapping[str, Any]:
        seen.append(feeds["x"].shape)
        return {"y": feeds["x"].mean((1, 2)), "map": feeds["x"][..., :2] * 3}

    loaded(compute)
    outputs = (Y, EngineTensor(name="map", dtype="float32", format="HWC", shape=[-1, 2, 8, 6]))
    last = EngineTensor(name="x", dtype="float32", format="HWC", shape=[-1, 5, 8, 6], profile=([1, 5, 8, 6],) * 2 + ([4, 5, 8, 6],))
    runner = TrtRunner(b"", described(inputs=(last,), outputs=outputs))
    x = np.random.default_rng(0).standard_normal((3, 5, 8, 6)).astype(np.float32)
    y, image = runner.run({"x": x})
    assert seen == [(3, 8, 6, 5)]
    np.testing.assert_allclose(y, x.mean((2, 3)), atol=1e-6)
    np.testing.assert_array_equal(image, x[:, :2] * 3)
    assert image.flags.c_contiguous


def test_a_closed_runner_frees_the_gpu_and_says_so(loaded: Loaded) -> None:
    loaders = loaded(lambda feeds: {"y": np.zeros((1, 5), np.float32)})
    runner = TrtRunner(b"", described())
    feeds = {"x": np.zeros((1, 3, 8, 8), np.float32)}
    runner.run(feeds)
    assert loaders.made[0].active
    runner.close()
    runner.close()
    assert not loaders.made[0].active
    with pytest.raises(UsageError, match="closed"):
        runner.run(feeds)


def test_a_forgotten_runner_frees_the_gpu_too(loaded: Loaded) -> None:
    loaders = loaded(lambda feeds: {})
    runner = TrtRunner(b"", described())
    assert loaders.made[0].active
    del runner
    gc.collect()
    assert not loaders.made[0].active


def test_calls_from_several_threads_wait_for_each_other(loaded: Loaded) -> None:
    loaded(lambda feeds: {"y": feeds["x"][:, 0, 0, :5]})
    runner = TrtRunner(b"", described())
    wrong: list[int] = []

    def work(n: int) -> None:
        for _ in range(10):
            if not (runner.run({"x": np.full((2, 3, 8, 8), n, np.float32)})[0] == n).all():
                wrong.append(n)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_an_error_of_the_gpu_is_a_usage_error(loaded: Loaded) -> None:
    def fail(feeds: Mapping[str, Any]) -> Mapping[str, Any]:
        raise RuntimeError("CUDA Error: 2.\nTo figure out what this means, read on")

    loaded(fail)
    with pytest.raises(UsageError, match="cannot run the engine on this input: CUDA Error: 2") as caught:
        TrtRunner(b"", described()).run({"x": np.zeros((1, 3, 8, 8), np.float32)})
    assert "\n" not in caught.value.message


@pytest.mark.parametrize(("error", "words"), [(OSError("libcudart.so: cannot open"), "CUDA runtime library cannot be loaded"),
                                              (RuntimeError("Invalid Context"), "the GPU cannot take engine.trt: Invalid")])
def test_a_gpu_that_cannot_take_the_engine_is_a_missing_backend(error: Exception, words: str, loaded: Loaded,
                                                                monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: FakeRunner) -> None:
        raise error

    monkeypatch.setattr(FakeRunner, "activate", fail)
    loaded(lambda feeds: {})
    with pytest.raises(BackendMissingError, match=words):
        TrtRunner(b"", described())


# ---- the runtime cache ----------------------------------------------------------------------------------------------
def test_compiled_kernels_are_kept_between_runs(loaded: Loaded, tmp_path: Path) -> None:
    path = tmp_path / "new" / "engine.cache"
    for kept in (b"+kernels", b"+kernels+kernels"):
        loaders = loaded(lambda feeds: {}, FakeEngine())
        runner = TrtRunner(b"", described(), runtime_cache=path)
        assert loaders.made[0].engine == ("context", True)
        runner.close()
        assert path.read_bytes() == kept
    assert path.parent.stat().st_mode & 0o077 == 0


def test_kernels_that_others_could_have_written_are_ignored(loaded: Loaded, tmp_path: Path) -> None:
    path, engine = tmp_path / "engine.cache", FakeEngine()
    path.write_bytes(b"theirs")
    path.chmod(0o666)
    loaded(lambda feeds: {}, engine)
    TrtRunner(b"", described(), runtime_cache=path).close()
    assert engine.known == b""


def test_a_cache_that_cannot_be_written_is_no_error(loaded: Loaded, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    loaded(lambda feeds: {}, FakeEngine())
    TrtRunner(b"", described(), runtime_cache=tmp_path / "file" / "engine.cache").close()


def test_a_package_without_a_runtime_cache_gets_the_engine(loaded: Loaded, tmp_path: Path) -> None:
    engine = object()
    loaders = loaded(lambda feeds: {}, engine)
    TrtRunner(b"", described(), runtime_cache=tmp_path / "engine.cache").close()
    assert loaders.made[0].engine is engine
    assert list(tmp_path.iterdir()) == []


# ---- artefacts ------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A conversion to ONNX, of a small network."""
    folder = tmp_path_factory.mktemp("plain")
    gkp("convert", save(small_net(), folder / "m.onnx"), "--target", "onnx", "-o", folder / "out", *FAST, expect=0)
    return folder / "out"


def artefact(plain: Path, folder: Path, *engines: Engine, signed: bool = True) -> Path:
    """What --target trt writes: model.onnx, the engines, the manifest."""
    folder.mkdir()
    files = {"model.onnx": (plain / "model.onnx").read_bytes(), **{e.file: e.file.encode() for e in engines}}
    for name, data in files.items():
        (folder / name).write_bytes(data)
    made: Manifest = msgspec.structs.replace(manifest.read(plain), target="trt", provider=None, engines=list(engines),
                                             files={n: hashlib.sha256(d).hexdigest() for n, d in files.items()})
    (folder / manifest.FILE_NAME).write_bytes(manifest.encode(sign(made) if signed else made))
    return folder


@pytest.mark.usefixtures("_no_gpu")
def test_an_artefact_runs_nowhere_without_a_gpu(plain: Path, tmp_path: Path) -> None:
    made = artefact(plain, tmp_path / "made", described("8.9", file="engine.sm89.trt"))
    np.save(tmp_path / "x.npy", np.zeros((1, 3, 8, 8), np.float32))
    outcome = gkp("run", made, "--input", tmp_path / "x.npy", expect=4)
    assert "engine.sm89.trt was built with tensorrt_rtx 1.7.1.116 for compute capability 8.9 (Ada)" in outcome.err
    assert outcome.out == ""


def test_an_artefact_with_an_onnx_file_only_does_not_run(plain: Path, tmp_path: Path) -> None:
    made = artefact(plain, tmp_path / "made")
    with pytest.raises(BackendMissingError, match="holds no engine") as caught:
        load(made)
    assert caught.value.exit_code == 4


@pytest.mark.usefixtures("_no_gpu")
def test_the_onnx_file_of_an_artefact_runs_anywhere(plain: Path, tmp_path: Path) -> None:
    made = artefact(plain, tmp_path / "made", described(), signed=False)
    runner = open_runner(made, manifest.read(made), model="model.onnx")
    assert runner.run({"x": np.zeros((1, 3, 8, 8), np.float32)})[0].shape == (1, 5)
    runner.close()


@pytest.mark.usefixtures("_gpu")
def test_somebody_elses_engine_is_not_opened(plain: Path, tmp_path: Path) -> None:
    made = artefact(plain, tmp_path / "made", described(), signed=False)
    for model in (None, "engine.trt"):
        with pytest.raises(UnsafeFileError, match="is a program"):
            open_runner(made, manifest.read(made), model=model)


@pytest.mark.usefixtures("_gpu")
def test_an_engine_without_a_checksum_is_not_opened(plain: Path, tmp_path: Path) -> None:
    made = manifest.read(artefact(plain, tmp_path / "made", described()))
    forged = msgspec.structs.replace(made, engines=[described(file="../engine.trt")])
    with pytest.raises(FileError, match="does not name"):
        open_runner(tmp_path / "made", forged, trust_code=True)


def test_the_engine_for_the_gpu_runs(plain: Path, tmp_path: Path, loaded: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    """And its compiled kernels go into the user's cache directory."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    made = artefact(plain, tmp_path / "made", described("8.6", file="other.trt"), described("8.9", file="this.trt"),
                    described("8.9", file="dense.trt", baseline=True))
    engine = FakeEngine()
    loaders = loaded(lambda feeds: {"y": feeds["x"].sum((1, 2, 3))[:, None] * np.ones(5, np.float32)}, engine)
    with load(made) as model:
        np.testing.assert_array_equal(model.run(np.ones((1, 3, 8, 8), np.float32)), np.full((1, 5), 192, np.float32))
    digest = hashlib.sha256(b"this.trt").hexdigest()
    assert (tmp_path / "cache" / "gkp" / "trt" / f"{digest}.cache").read_bytes() == b"+kernels"
    assert len(loaders.made) == 1


@pytest.mark.usefixtures("_gpu")
def test_the_engine_of_the_dense_baseline_is_not_taken_for_the_model(plain: Path, tmp_path: Path) -> None:
    dense = described(file="dense.trt", baseline=True)
    made = manifest.read(artefact(plain, tmp_path / "made", dense, described(file="engine.trt")))
    assert pick_engine(made).file == "engine.trt"
    assert pick_engine(made, baseline=True).file == "dense.trt"
