"""The fingerprint of a measurement, and what the machine offers."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from gkp.runtime import environment
from gkp.runtime.environment import cpu_model, fingerprint, physical_cores, saturates_bytes, vector_floats, version


def test_the_fingerprint_is_json_and_names_what_matters() -> None:
    made = fingerprint()
    assert json.loads(json.dumps(made)) == made
    assert made["cpu"]
    assert made["cores"] == physical_cores()
    assert made["packages"]["numpy"] == version("numpy")
    assert not any("/" in str(v) and Path(str(v)).exists() for v in made.values()), "no paths of this machine"


def test_cores_are_those_this_process_may_use(monkeypatch: pytest.MonkeyPatch) -> None:
    assert 1 <= physical_cores() <= len(os.sched_getaffinity(0))
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {next(iter(range(1)))})
    assert physical_cores() == 1


def test_an_unknown_package_has_no_version() -> None:
    assert version("no-such-package-of-anyone") is None


@pytest.mark.parametrize(("flags", "floats"), [("fpu sse2 avx2 avx512f", 16), ("fpu avx2", 8), ("fpu", 8)])
def test_vectors_are_read_from_the_processors_flags(flags: str, floats: int, monkeypatch: pytest.MonkeyPatch) -> None:
    text = f"processor : 0\nmodel name : Some CPU\nflags : {flags}\n"
    monkeypatch.setattr(environment.Path, "read_text", lambda self, **options: text)  # type: ignore[attr-defined]
    assert vector_floats() == floats
    assert cpu_model().startswith("Some CPU")


def test_processors_of_one_name_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    fields = {"vendor_id": "A", "cpu family": "25", "model": "17", "model name": "EPYC", "flags": "avx512f avx512_vnni amx_int8"}
    text = "\n".join(f"{name}\t: {value}" for name, value in fields.items())
    monkeypatch.setattr(environment.Path, "read_text", lambda self, **options: text)  # type: ignore[attr-defined]
    assert cpu_model() == "EPYC, family 25 model 17 (AVX512F, VNNI, AMX)"


@pytest.mark.parametrize(("text", "saturates"), [
    ("flags : fpu avx2", True), ("flags : fpu avx2 avx512f avx512bw", True), ("flags : fpu avx2 avx512f avx512_vnni", False),
    ("flags : fpu avx2 avx_vnni", False), ("flags : fpu amx_int8", False), ("Features : fp asimd", False), ("", False)])
def test_bytes_saturate_on_x86_without_vnni(text: str, saturates: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment.Path, "read_text", lambda self, **options: f"processor : 0\n{text}\n")  # type: ignore[attr-defined]
    assert saturates_bytes() == saturates


def test_a_machine_without_cpuinfo_still_has_a_name(monkeypatch: pytest.MonkeyPatch) -> None:
    def nothing(self: Path, *args: object, **options: object) -> str:
        raise FileNotFoundError(2, "No such file")

    monkeypatch.setattr(environment.Path, "read_text", nothing)  # type: ignore[attr-defined]
    assert isinstance(cpu_model(), str)
    assert not saturates_bytes()
    assert physical_cores() >= 1
