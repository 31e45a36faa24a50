"""The generated folder: what is shared, what may stand in it, what it says about itself."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from native_kit import add_kernel, grouped_plan, scale_kernel, two_port_plan, two_step_plan

from gkp.converter.native.building import source
from gkp.converter.native.kernels.cpu import CPUS
from gkp.converter.native.kernels.kernel import Kernel
from gkp.converter.native.planning.plan import Call, Place, Plan
from gkp.converter.native.program import Port

CPU = CPUS["x86-64-v3"]
HOSTILE = ['"; system("rm -rf /"); //', "*/ evil \\", "line\nbreak\r\x00", "\x7f\x1b[31m", "ünï ☃ \U0001f4a9 \u202e", "??/", "%s%n", "@STEPS@",
           "KERNEL", "</script>"]


def written(plan: Plan, folder: Path, shared: bool | None = None) -> dict[str, bytes]:
    names = source.write(plan, folder, shared)
    assert sorted(names) == sorted(p.name for p in folder.iterdir())
    return {name: (folder / name).read_bytes() for name in names}


def scales(*factors: float) -> Plan:
    """One step per factor, all with the same source."""
    calls = tuple(Call(scale_kernel(8, f), Place("input", 0), None, Place("output", 0)) for f in factors)
    return Plan(CPU, calls, 0, (Port("x", 0, (8,)),), (Port("y", 1, (8,)),))


def test_equal_kernels_are_written_once(tmp_path: Path) -> None:
    plan = scales(1, 2, 3)
    files = written(replace(plan, calls=(*plan.calls, Call(add_kernel(8), Place("input", 0), Place("input", 0), Place("output", 0)))),
                    tmp_path)
    assert [n for n in sorted(files) if n.startswith("kernel_")] == ["kernel_0.cpp", "kernel_1.cpp"]
    assert b"void kernel_0(" in files["kernel_0.cpp"]
    assert b"KERNEL" not in files["kernel_0.cpp"]
    assert len(re.findall(rb"\{kernel_0, ", files["model.cpp"])) == 3


def test_equal_weights_are_stored_once_and_all_are_aligned(tmp_path: Path) -> None:
    files = written(scales(1, 2, 1, 3), tmp_path)
    offsets = [int(n) for n in re.findall(rb"output\(0\), (\d+), 0\}", files["model.cpp"])]
    assert offsets == [0, 64, 0, 128]
    assert [np.frombuffer(files["weights.bin"], np.float32, 1, o)[0] for o in offsets] == [1, 2, 1, 3]


def test_the_same_plan_gives_the_same_files(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    assert written(two_step_plan(CPU), tmp_path / "a") == written(two_step_plan(CPU), tmp_path / "b")


@pytest.mark.parametrize("name", HOSTILE)
def test_names_of_the_model_stand_in_the_description_only(name: str, tmp_path: Path) -> None:
    def plan(name: str) -> Plan:
        made = two_step_plan(CPU)
        return replace(made, inputs=(replace(made.inputs[0], name=name),), outputs=(replace(made.outputs[0], name=name),),
                       calls=tuple(replace(c, layer=name) for c in made.calls))

    (tmp_path / "hostile").mkdir()
    (tmp_path / "plain").mkdir()
    files, plain = written(plan(name), tmp_path / "hostile"), written(plan("plain"), tmp_path / "plain")
    assert {n for n in files if files[n] != plain[n]} == {"describe.json", "weights.S"}
    assert re.sub(rb"[0-9a-f]{64}", b"", files["weights.S"]) == re.sub(rb"[0-9a-f]{64}", b"", plain["weights.S"])
    assert all(0x20 <= byte < 0x7F for byte in files["describe.json"])
    about = json.loads(files["describe.json"])
    assert about["inputs"][0]["name"] == about["outputs"][0]["name"] == about["steps"][1]["layer"] == name


def test_a_kind_cannot_leave_its_comment(tmp_path: Path) -> None:
    made = two_step_plan(CPU)
    text = written(replace(made, calls=tuple(replace(c, kind="x\nint evil; */") for c in made.calls)), tmp_path)["model.cpp"]
    assert b"evil" in text
    assert all(line.split(b"//")[0].count(b"evil") == 0 for line in text.splitlines())


def test_the_description_says_what_memory_is_needed(tmp_path: Path) -> None:
    about = json.loads(written(two_step_plan(CPU, (3, 5, 7)), tmp_path)["describe.json"])
    assert about["arena_bytes"] == 4 * 128  # 121 floats in whole cache lines
    assert about["weights_bytes"] == 4
    assert about["peak_bytes"] == about["arena_bytes"] + about["weights_bytes"]
    assert about["inputs"] == [{"name": "x", "shape": [3, 5, 7], "dtype": "float32"}]
    assert about["steps"] == [{"layer": "first", "kind": "scale", "macs": 105, "needs": ["vectors"]},
                              {"layer": "second", "kind": "add", "macs": 0, "needs": ["vectors"]}]
    assert (about["format"], about["cpu"]) == (2, "x86-64-v3")


def test_the_memory_of_groups_counts(tmp_path: Path) -> None:
    about = json.loads(written(grouped_plan(CPU, images=4), tmp_path)["describe.json"])
    assert about["group_bytes"] == 3 * 640
    assert about["peak_bytes"] == about["arena_bytes"] + about["group_bytes"] + about["weights_bytes"]


@pytest.mark.parametrize(("needs", "asked"), [
    (("vectors", "vnni"), []), (("vectors", "amx-int8"), ["AMX-TILE", "AMX-INT8"]), (("vectors", "amx-bf16"), ["AMX-TILE", "AMX-BF16"])])
def test_a_library_asks_for_tiles_only_if_a_kernel_uses_them(needs: tuple[str, ...], asked: list[str], tmp_path: Path) -> None:
    """Whatever its processor has: compilers never use them by themselves."""
    made = two_step_plan(CPUS["x86-64-v4-amx"])
    last = replace(made.calls[1], kernel=replace(made.calls[1].kernel, needs=needs))
    files = written(replace(made, calls=(made.calls[0], last)), tmp_path)
    assert re.findall(r'NEED\("(AMX-\w+)"', files["processor.cpp"].decode()) == asked
    assert json.loads(files["describe.json"])["steps"][1]["needs"] == list(needs)


def test_a_plan_without_weights_or_working_memory_is_written(tmp_path: Path) -> None:
    about = json.loads(written(two_port_plan(CPU), tmp_path)["describe.json"])
    assert [p["name"] for p in about["inputs"]] == ["a", "b"]
    assert about["arena_bytes"] == 64


@pytest.mark.parametrize(("compiler", "flags"), [("gcc", ["-std=c99", "-pedantic"]), ("g++", ["-std=c++11", "-pedantic"])])
def test_the_header_is_c_and_cpp(compiler: str, flags: list[str], tmp_path: Path) -> None:
    if shutil.which(compiler) is None:
        pytest.skip(f"no {compiler} here")
    written(two_step_plan(CPU), tmp_path)
    name = "user.c" if compiler == "gcc" else "user.cpp"
    (tmp_path / name).write_text('#include "model.h"\n#include "model.h"\n'
                                 "int main(void) { gkp_model* m; return gkp_create(1, &m) == GKP_OK; }\n")
    done = subprocess.run([compiler, *flags, "-Wall", "-Wextra", "-Werror", "-fsyntax-only", name], cwd=tmp_path, capture_output=True,
                          text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_kernels_own_words_survive(tmp_path: Path) -> None:
    made = two_step_plan(CPU)
    kernel = Kernel(made.calls[0].kernel.source + "// KERNELS and MY_KERNEL stay\n", made.calls[0].kernel.data)
    files = written(replace(made, calls=(replace(made.calls[0], kernel=kernel), made.calls[1])), tmp_path)
    assert b"// KERNELS and MY_KERNEL stay" in files["kernel_0.cpp"]
