"""The package: the wheel holds what the checkout does, says its version, and works where nothing else is installed."""

from __future__ import annotations

import configparser
import shutil
import subprocess
import sys
import tarfile
import zipfile
from email.parser import Parser
from pathlib import Path

import check_package
import pytest
from layout import ROOT, packages

from gkp import __version__


def tracked() -> list[str]:
    """The files of the checkout, those not yet committed too."""
    listed = subprocess.run(["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=ROOT,
                            capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("not a git checkout")
    return [name for name in listed.stdout.split("\0") if name and (ROOT / name).is_file()]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the sdist and the wheel, by the command of `make wheel` in a copy of the checkout."""
    copy = tmp_path_factory.mktemp("checkout")
    for name in tracked():
        if not name.startswith(("tests/", "docs/", "examples/")):
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, copy / name)
    done = subprocess.run(["make", "--old-file", ".venv/installed", "wheel", f"BIN={Path(sys.executable).parent}"], cwd=copy,
                          capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return copy / "dist"


def wheel_of(built: Path) -> Path:
    (found,) = built.glob("*.whl")
    return found


def test_the_wheel_holds_the_packages_and_nothing_else(built: Path) -> None:
    """Every file below the folders that are mapped: modules, templates, tables."""
    roots = {str(folder.relative_to(ROOT)): name.replace(".", "/") for name, folder in packages().items()}
    tops = {folder: name for folder, name in roots.items() if "/" not in folder}
    want = {f"{tops[name.partition('/')[0]]}/{name.partition('/')[2]}" for name in tracked() if name.partition("/")[0] in tops}
    names = set(zipfile.ZipFile(wheel_of(built)).namelist())
    assert {name for name in names if ".dist-info/" not in name} == want
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)


def test_files_and_metadata_have_the_version_of_the_code(built: Path) -> None:
    wheel = wheel_of(built)
    assert sorted(file.name for file in built.iterdir()) == [f"gkp-{__version__}-py3-none-any.whl", f"gkp-{__version__}.tar.gz"]
    metadata = Parser().parsestr(zipfile.ZipFile(wheel).read(f"gkp-{__version__}.dist-info/METADATA").decode())
    assert (metadata["Name"], metadata["Version"]) == ("gkp", __version__)
    with tarfile.open(built / f"gkp-{__version__}.tar.gz") as sdist:
        assert f"gkp-{__version__}/core/_version.py" in sdist.getnames()


def test_every_extra_is_checked() -> None:
    """But `dev`, which the tests themselves run in."""
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    assert set(check_package.CASES) == {"base", *config["options.extras_require"]} - {"dev"}


@pytest.mark.slow
def test_the_wheel_works_alone_and_with_onnx_runtime(built: Path, tmp_path: Path) -> None:
    """First with nothing but what the base install brings, then with the extra `ort` in the same environment."""
    files = tmp_path / "files"
    files.mkdir()
    check_package.make_files(files, ("base", "ort"))
    for extra in ("base", "ort"):
        assert check_package.check(wheel_of(built), extra, files, tmp_path / "environment").failure == ""
    there = {path.name.partition("-")[0] for path in (tmp_path / "environment").glob("lib/python*/site-packages/*.dist-info")}
    assert "onnxruntime" in there
    assert not there & {"torch", "openvino", "ziglang", "pytest"}


@pytest.mark.parametrize(("command", "failure"), [("gkp run nothing --input x.npy", "exit 6"), ("gkp --version", "")])
def test_a_command_that_fails_is_told_with_what_it_printed(command: str, failure: str, tmp_path: Path,
                                                           monkeypatch: pytest.MonkeyPatch) -> None:
    """In the environment that the tests run in, into which nothing is installed."""
    monkeypatch.setitem(check_package.CASES, "base", check_package.Case((command,)))
    monkeypatch.setattr(check_package, "_install", lambda what, environment: subprocess.CompletedProcess([], 0, "", ""))
    found = check_package.check(Path("gkp.whl"), "base", tmp_path, Path(sys.executable).parents[1]).failure
    assert found.startswith(f"$ {command}\n" if failure else "")
    assert found.endswith(failure)
    assert ("error: " in found) == bool(failure)


def test_a_wheel_that_is_not_there_is_a_usage_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert check_package.main([str(tmp_path / "none.whl")]) == 2
    assert capsys.readouterr().err.startswith("usage: check_package.py")
