"""One TensorRT package per process: what is missing says so, messages are collected, nothing else is imported."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
from cli_kit import blocked

from gkp.errors import BackendMissingError
from gkp.require import install
from gkp.runtime.trt_package import PACKAGES, is_installed, listening, trt_package

SWITCH = "POLYGRAPHY_USE_TENSORRT_RTX"


@pytest.fixture(scope="module", autouse=True)
def _needs_rtx() -> None:
    if not is_installed("tensorrt_rtx"):
        pytest.skip('tensorrt_rtx is not installed: pip install ".[trt-rtx]"')


def python(body: str, path: Path | None = None, **env: str) -> str:
    """Standard output of a process of its own; `path`: where its packages come first."""
    extra = {"PYTHONPATH": str(path)} if path else {}
    base = {k: v for k, v in os.environ.items() if k != SWITCH}
    done = subprocess.run([sys.executable, "-c", body], capture_output=True, text=True, timeout=120, check=False,
                          env={**base, **extra, **env})
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


ASK = """
from gkp.runtime.trt_package import trt_package
from gkp.errors import GkpError
for name in {names!r}:
    try:
        print(trt_package(name).name)
    except GkpError as e:
        print(type(e).__name__, e.exit_code, e.message, '|', e.hint)
"""


def fake_classic(folder: Path, code: str) -> Path:
    """A package called tensorrt."""
    (folder / "tensorrt").mkdir()
    (folder / "tensorrt" / "__init__.py").write_text(code)
    return folder


def test_the_package_works_through_polygraphy() -> None:
    package = trt_package("tensorrt_rtx")
    assert package.trt.__name__ == "tensorrt_rtx"
    assert package.version == package.trt.__version__
    assert package.config_class.__name__ == "CreateConfigRTX"
    assert isinstance(package.loaders.get_trt_logger(), package.trt.ILogger)
    assert package.loaders.get_trt_logger() is package.loaders.get_trt_logger(), "one for the process"
    assert trt_package("tensorrt_rtx") is package


@pytest.mark.parametrize("setting", ["", "0", "1"])
def test_polygraphy_is_switched_whatever_the_environment_says(setting: str) -> None:
    body = ASK.format(names=["tensorrt_rtx"]) + f"import os\nprint(os.environ.get('{SWITCH}'))"
    assert python(body, **({SWITCH: setting} if setting else {})).split("\n") == ["tensorrt_rtx", setting or "None"]


def test_the_classic_package_has_the_classic_configuration(tmp_path: Path) -> None:
    body = "from gkp.runtime.trt_package import trt_package\nprint(trt_package('tensorrt').config_class.__name__)"
    assert python(body, fake_classic(tmp_path, "__version__ = '10.9'")) == "CreateConfig"


@pytest.mark.parametrize("names", [list(PACKAGES), list(PACKAGES)[::-1]])
def test_a_second_package_in_one_process_is_refused(names: list[str], tmp_path: Path) -> None:
    first, second = python(ASK.format(names=names), fake_classic(tmp_path, "__version__ = '10.9'")).split("\n")
    assert first == names[0]
    assert second.startswith("UsageError 2 this process uses Polygraphy with another package than")
    assert "new process" in second


def test_a_polygraphy_that_is_in_use_for_the_other_package_is_left_as_it_is() -> None:
    assert python("import polygraphy.config\n" + ASK.format(names=["tensorrt_rtx"])).startswith("UsageError 2")


@pytest.mark.parametrize("code", ["raise ImportError('libnvinfer.so.10: cannot open')", "raise OSError('libnvinfer.so.10')",
                                  "raise RuntimeError('no libnvinfer.so.10')"])
def test_a_package_that_does_not_work_says_why(code: str, tmp_path: Path) -> None:
    told = python(ASK.format(names=["tensorrt"]), fake_classic(tmp_path, code))
    assert told.startswith("BackendMissingError 4 tensorrt does not work here: ")
    assert "libnvinfer.so.10" in told
    assert 'pip install ".[trt]"' in told


def test_a_folder_of_that_name_is_no_package(tmp_path: Path) -> None:
    (tmp_path / "tensorrt").mkdir()
    told = python(ASK.format(names=["tensorrt"]), tmp_path)
    if not is_installed("tensorrt"):
        assert told == f"BackendMissingError 4 tensorrt is not installed | {install('trt')}"


@pytest.mark.parametrize(("module", "words"), [("tensorrt_rtx", "tensorrt_rtx"), ("polygraphy", "Polygraphy is not installed")])
def test_what_is_not_installed_is_named(module: str, words: str) -> None:
    outcome = blocked([module], ASK.format(names=["tensorrt_rtx"]))
    assert words in outcome.out
    assert 'pip install ".[trt-rtx]"' in outcome.out


def test_neither_torch_nor_onnx_is_imported() -> None:
    body = ("import sys\nfrom gkp.runtime import load, trt\nfrom gkp.runtime.trt_package import listening, trt_package\n"
            "assert not {'tensorrt_rtx', 'polygraphy'} & set(sys.modules), 'only when needed'\n"
            "with listening():\n    trt_package('tensorrt_rtx').trt.Runtime(trt_package('tensorrt_rtx').loaders.get_trt_logger())\n"
            "print([m for m in ('torch', 'onnx', 'onnxruntime', 'gkp.converter') if m in sys.modules])")
    assert python(body) == "[]"


# ---- messages -------------------------------------------------------------------------------------------------------
def test_messages_are_collected_and_not_printed(capfd: pytest.CaptureFixture[str]) -> None:
    package = trt_package("tensorrt_rtx")
    with listening() as log, pytest.raises(Exception, match="Could not deserialize"):
        package.loaders.EngineFromBytes(b"rubbish" * 50)()
    assert "magicTag" in log.errors[0]
    assert not any("cudaError 35" in line for line in log.errors), "that there is no driver is no error here"
    with listening() as later:
        pass
    assert later.errors == []
    assert capfd.readouterr() == ("", "")


def test_messages_without_a_listener_do_not_reach_standard_output() -> None:
    body = ("from gkp.runtime.trt_package import trt_package\n"
            "trt_package('tensorrt_rtx').loaders.get_trt_logger()\n"
            "from polygraphy.logger import G_LOGGER\nG_LOGGER.error('something broke')\nG_LOGGER.info('hello')")
    assert python(body) == ""


def test_messages_are_sorted_and_one_line_each() -> None:
    logger = logging.getLogger("Polygraphy")
    with listening() as log:
        logger.error("first\nsecond\x1b[2J")
        logger.critical("third")
        logger.warning("careful")
        logger.info("never mind")
        logger.error("[checkMacros.cpp] (cudaError 35: CUDA driver version is insufficient)")
    assert log.errors == ["first second?[2J", "third"]
    assert log.warnings == ["careful"]


def test_a_classic_package_that_is_missing_is_a_missing_backend() -> None:
    if is_installed("tensorrt"):
        pytest.skip("it is installed here")
    with pytest.raises(BackendMissingError, match="tensorrt is not installed"):
        trt_package("tensorrt")
