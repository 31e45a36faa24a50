"""What a type checker says of calls of the Python face: right ones pass, wrong ones are named."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]
BEFORE = """
from pathlib import Path
from typing import Any
import gkp

class Module:
    training = True
    def state_dict(self, *args: Any, **kwargs: Any) -> Any: ...
    def eval(self) -> Any: ...

module, text = Module(), str(input())
"""
RIGHT = [
    'gkp.convert("m.pt")',
    'gkp.convert("m.pt", "ort", "out", threads=2, provider="cuda", benchmark=False)',
    'gkp.convert(Path("m.pt"), target="native", output=Path("out"), cpu="x86-64-v3", hybrid=True, input_shape=(1, 3, 8, 8))',
    'gkp.convert("m.pt", target="trt", precision="fp16", compute_capability="86,89", batch_profile=(1, 8, 64), engine=False)',
    'gkp.convert("m.pt", precision="int8", calibration=Path("x.npy"), mean=[0.5], std="0.2", max_drop=0.5, data="cifar10:d")',
    'gkp.convert("m.pt", layers={"conv1": "dense"}, strategy="split", opset=17, baseline="d.pt", arch="a:b", trust_code=True)',
    'gkp.convert(module, "ort", "out", input_shape=(1, 3, 8, 8))',
    'gkp.convert(module, output="out", input_shape={"x": (1, 3, 8, 8)}, force=True)',
    "gkp.convert(module, input_shape=(1, 3, 8, 8), dry_run=True)",
    'shown: gkp.Artefact = gkp.convert("m.pt", dry_run=True)',
    'layers = len(gkp.open(Path("m.pt"), input_shape=(1, 3, 8, 8), arch=None).layers["conv1"].branches)',
    "opened: gkp.Model = gkp.open(module, input_shape=(1, 3, 8, 8))",
    'loaded: gkp.LoadedModel = gkp.load("out", trust_code=True)',
    "name: str = loaded.inputs[0].name + loaded.outputs[0].dtype",
]
WRONG = [
    'gkp.convert("m.pt", target="orrt")', 'gkp.convert("m.pt", target=text)', 'gkp.convert("m.pt", precision="fp8")',
    'gkp.convert("m.pt", threads="two")', 'gkp.convert("m.pt", strategy="magic")', 'gkp.convert("m.pt", cpu="z80")',
    'gkp.convert("m.pt", colour="red")', 'gkp.convert("m.pt", benchmark="no")', 'gkp.convert("m.pt", layers=["conv1"])',
    'gkp.convert("m.pt", input_shape="1,3,8,8")', "gkp.convert(5)", 'gkp.convert(module, output="out")',
    "gkp.convert(module, input_shape=(1, 3, 8, 8))", 'gkp.convert("m.pt").directories', "gkp.open(5)", "gkp.open(module)",
    'gkp.open("m.pt", target="ort")', 'gkp.open(module, input_shape=(1, 3, 8, 8), arch="a:b")', 'gkp.load("out", True)',
    "gkp.load(None)", "loaded.inputs[0].shapes", 'wrong: gkp.Model = gkp.convert("m.pt")',
]


def _build(target: Path) -> None:
    """The package as it installs: where mypy finds it."""
    spec = importlib.util.spec_from_file_location("check_types", ROOT / "tools" / "check_types.py")
    assert spec is not None
    assert spec.loader is not None
    tool: ModuleType = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    tool.build(target)


@pytest.fixture(scope="module")
def named(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    """The calls, all checked at once, in which mypy finds an error."""
    folder = tmp_path_factory.mktemp("typing")
    _build(folder)
    lines = [*BEFORE.splitlines(), *RIGHT, *WRONG]
    (folder / "calls.py").write_text("\n".join(lines) + "\n")
    (folder / "mypy.ini").write_text("[mypy]\nstrict = true\npython_version = 3.10\nignore_missing_imports = true\n"
                                     "[mypy-numpy.*,msgspec.*,onnx.*,rich.*]\nfollow_imports = skip\n"
                                     "[mypy-gkp.*]\nignore_errors = true\n")
    done = subprocess.run([sys.executable, "-m", "mypy", "--config-file", "mypy.ini", "calls.py"], cwd=folder, timeout=120,
                          capture_output=True, text=True, check=False)
    found = [int(n) for n in re.findall(r"^calls\.py:(\d+): error: ", done.stdout, re.MULTILINE)]
    assert found, done.stdout + done.stderr
    return {lines[number - 1] for number in found}


@pytest.mark.parametrize("call", RIGHT)
def test_a_right_call_passes_the_type_checker(call: str, named: set[str]) -> None:
    assert call not in named


@pytest.mark.parametrize("call", WRONG)
def test_a_wrong_call_is_named_by_the_type_checker(call: str, named: set[str]) -> None:
    assert call in named


def test_nothing_else_is_named(named: set[str]) -> None:
    assert named <= {*RIGHT, *WRONG}
