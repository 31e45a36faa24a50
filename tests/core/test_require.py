"""Packages that are not here, and packages that are here and do not work."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from gkp._version import __version__
from gkp.errors import BackendMissingError
from gkp.require import absent, install, require

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package of that name, whose code is still to be written."""
    monkeypatch.syspath_prepend(tmp_path)
    for name in [name for name in sys.modules if name.partition(".")[0] == "broken_here"]:
        monkeypatch.delitem(sys.modules, name)
    (tmp_path / "broken_here").mkdir()
    return tmp_path / "broken_here" / "__init__.py"


def refused(module: str, *more: str, **named: str) -> tuple[str, str]:
    with pytest.raises(BackendMissingError) as caught:
        require(module, *more, **named)
    assert caught.value.exit_code == 4
    return caught.value.message, caught.value.hint


def test_what_is_here_is_imported() -> None:
    assert require("os.path", "core") is sys.modules["os.path"]


@pytest.mark.parametrize("module", ["nothing_of_that_name", "nothing_of_that_name.inside"])
def test_what_is_not_installed_is_said_with_the_extra_that_brings_it(module: str) -> None:
    hint = install("some")
    assert refused(module, "some") == ("nothing_of_that_name is not installed", hint)
    assert refused(module, "some", "planning") == ("planning needs nothing_of_that_name, which is not installed", hint)
    assert refused(module, "some", note="on every node") == ("nothing_of_that_name is not installed", f"{hint} on every node")


def test_hints_name_the_checkout_and_the_wheel_and_no_index() -> None:
    """No index has a package of gkp's; one of that name would be somebody else's."""
    hint = install("ort,report")
    assert 'pip install ".[ort,report]" in the checkout of gkp' in hint
    assert f'"gkp-{__version__}-py3-none-any.whl[ort,report]"' in hint
    assert 'install "gkp[' not in hint


def test_only_one_file_says_how_extras_are_installed() -> None:
    saying = [str(file.relative_to(ROOT)) for folder in ("core", "converter", "runtime", "edge", "pruning", "report", "benchmarks")
              for file in sorted((ROOT / folder).rglob("*.py")) if re.search(r'pip install "(gkp|\.)\[', file.read_text())]
    assert saying == ["core/require.py"]


@pytest.mark.parametrize(("module", "name"), [("yaml", "PyYAML"), ("scipy.optimize", "SciPy"), ("google.protobuf", "protobuf"),
                                              ("ncnn", "ncnn")])
def test_packages_are_called_as_they_are_installed(module: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    assert refused(module, "some")[0] == f"{name} is not installed"


@pytest.mark.parametrize(("code", "why"), [
    ("raise ImportError('libx.so: cannot\\nopen')", "libx.so: cannot open"), ("raise ImportError", "ImportError"),
    ("raise ImportError('libx.so', name='broken_here.core')", "libx.so"), ("import broken_here.core", "No module named 'broken_here.core'"),
    ("import nothing_of_that_name", "No module named 'nothing_of_that_name'")])
def test_a_package_that_is_here_and_does_not_work_says_why(code: str, why: str, package: Path) -> None:
    package.write_text(code)
    message, hint = refused("broken_here", "some", "a test")
    assert message == f"a test needs broken_here, which does not work here: {why}"
    assert hint == install("some")


def test_the_error_can_be_had_without_an_import() -> None:
    assert absent("torch", "torch").message == "PyTorch is not installed"
    assert absent("tensorrt", "trt", error=OSError("libnvinfer.so")).message == "tensorrt does not work here: libnvinfer.so"
