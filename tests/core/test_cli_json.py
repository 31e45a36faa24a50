"""`--json`: valid JSON and nothing else on stdout, as manifest.schema() says, null for what was not measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from cli_kit import DENSE, FAST, GROUPED, gkp, program, save, small_net
from torch_kit import SHARED

import gkp as package
from gkp import manifest

MODELS = {"example": GROUPED, "tmi-gkp": SHARED / "tmi_gkp/resnet20_cifar10/grouped", "dsp": SHARED / "dsp/resnet20_g4.pt"}


def checkpoint(name: str) -> Path:
    """One of the three, or skip."""
    if not MODELS[name].exists():
        pytest.skip(f"the published checkpoint of {name} is not beside the checkout")
    return MODELS[name]


def conforms(value: Any, schema: dict[str, Any], root: dict[str, Any], where: str = "") -> None:
    """Does a value fit a JSON schema as msgspec writes them?"""
    if "$ref" in schema:
        schema = root["$defs"][schema["$ref"].rpartition("/")[2]]
    if "anyOf" in schema:
        for option in schema["anyOf"]:
            try:
                return conforms(value, option, root, where)
            except AssertionError:
                continue
        raise AssertionError(f"{where}: {value!r} fits none of {schema['anyOf']}")
    kinds = {"object": dict, "array": list, "string": str, "integer": int, "number": (int, float), "boolean": bool,
             "null": type(None)}
    if "type" in schema:
        assert isinstance(value, kinds[schema["type"]]), f"{where}: {value!r} is no {schema['type']}"
    if isinstance(value, dict):
        assert set(schema.get("required", ())) <= set(value), where
        if "properties" in schema:
            assert set(value) <= set(schema["properties"]), where
        for key, inner in value.items():
            rule = schema.get("properties", {}).get(key, schema.get("additionalProperties", {}))
            conforms(inner, rule if isinstance(rule, dict) else {}, root, f"{where}.{key}")
    if isinstance(value, list):
        for k, inner in enumerate(value):
            prefix = schema.get("prefixItems", [])
            rule = prefix[k] if k < len(prefix) else schema.get("items", {})
            conforms(inner, rule if isinstance(rule, dict) else {}, root, f"{where}[{k}]")


def no_constants(text: str) -> Any:
    """json.loads takes NaN and Infinity, which are not JSON."""
    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    return json.loads(text, parse_constant=refuse)


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_the_json_of_a_conversion_fits_its_schema(name: str, tmp_path: Path) -> None:
    outcome = program("convert", checkpoint(name), "-o", tmp_path / "out", "--target", "ort", *FAST, "--json", "-")
    assert outcome.code == 0, outcome.err
    assert "Verified" in outcome.err
    root = manifest.schema()
    conforms(no_constants(outcome.out), root, root)
    made = msgspec.json.decode(outcome.out, type=manifest.Manifest)
    assert made == manifest.read(tmp_path / "out")
    assert made.schema_version == manifest.SCHEMA_VERSION
    assert made.verification is not None
    assert made.verification.passed
    assert made.layers
    assert made.macs.kept < made.macs.dense


def test_what_was_not_measured_is_null(tmp_path: Path) -> None:
    outcome = gkp("convert", GROUPED, "-o", tmp_path / "out", *FAST, "--json", "-", "--baseline", DENSE, expect=0)
    made = no_constants(outcome.out)
    assert made["latency_ms"] == {"dense": None, "as_is": None, "converted": None}
    assert made["speedup"]["vs_dense"] is made["speedup"]["vs_as_is"] is None
    assert made["speedup"]["theoretical"] > 1
    assert made["measurements"] == []
    for layer in made["layers"]:
        for candidate in layer["candidates"]:
            assert candidate["ms"] is None
            assert candidate["estimated_ms"] > 0
            assert candidate["ratios"] == {}


def test_a_file_gets_what_stdout_gets(tmp_path: Path) -> None:
    model = save(small_net(), tmp_path / "m.onnx")
    shown = gkp("inspect", model, "--json", "-", expect=0).out
    gkp("inspect", model, "--json", tmp_path / "r.json", expect=0)
    ours, file = no_constants(shown), no_constants((tmp_path / "r.json").read_text())
    for report in (ours, file):
        del report["seconds"], report["environment"]
    assert ours == file


@pytest.mark.parametrize("quiet", [[], ["-q"], ["-v"]])
def test_stdout_holds_nothing_but_json(quiet: list[str], tmp_path: Path) -> None:
    model = save(small_net(), tmp_path / "m.onnx")
    gkp("convert", model, "-o", tmp_path / "out", *FAST, expect=0)
    np.save(tmp_path / "x.npy", np.zeros((1, 3, 8, 8), np.float32))
    np.savez(tmp_path / "cifar10_test.npz", x=np.zeros((4, 32, 32, 3), np.uint8), y=np.zeros(4, np.int64))
    for command in (["inspect", model], ["inspect", tmp_path / "out"], ["verify", model, tmp_path / "out"],
                    ["run", tmp_path / "out", "--input", tmp_path / "x.npy"],
                    ["eval", DENSE, "--data", f"cifar10:{tmp_path}"],
                    ["bench", tmp_path / "out", "--seconds", "0.1"]):
        report = no_constants(gkp(*command, *quiet, "--json", "-", expect=0).out)
        if command[0] != "verify":
            assert report["schema_version"] == (2 if command[0] == "bench" else 1)


def test_a_failed_command_prints_no_json(tmp_path: Path) -> None:
    assert gkp("inspect", tmp_path / "nowhere", "--json", "-", expect=6).out == ""


def test_a_manifest_shows_the_paths_last_part_only(tmp_path: Path) -> None:
    """An artefact is passed on: it does not tell where on this machine its model lay."""
    gkp("convert", GROUPED, "-o", tmp_path / "out", "--baseline", DENSE, *FAST, expect=0)
    text = (tmp_path / "out" / "manifest.json").read_text()
    assert str(GROUPED.parent) not in text
    assert str(tmp_path) not in text
    assert package.load(tmp_path / "out").manifest.source.path == "grouped.pt"
