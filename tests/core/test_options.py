"""Options are declared once: what the command line shows, what is checked and what Python takes are the same."""

from __future__ import annotations

import dataclasses
import typing
from pathlib import Path
from typing import Any

import pytest
from cli_kit import gkp

from gkp.errors import UsageError
from gkp.options.base import Declared, declared
from gkp.options.convert import ConvertKeywords, ConvertOptions, convert_options, every_option
from gkp.options.forms import FormOptions
from gkp.options.targets import CPU_NAMES, EVERY, TARGETS, CpuOptions, NativeOptions, OrtOptions, TargetName
from gkp.options.trt import TrtOptions

OWN = {name: struct for struct in EVERY for name in (d.name for d in declared(struct))}


def test_every_declared_option_is_on_the_command_line() -> None:
    shown = gkp("convert", "--help", expect=0).out
    for found in every_option():
        assert found.flags[-1] in shown, found.name


def test_every_target_is_a_choice_with_a_class_of_its_name() -> None:
    from gkp.converter.targets import make_target
    from gkp.runtime.load import RUNNERS

    assert {struct.name for struct in TARGETS} == set(RUNNERS)
    for struct in TARGETS:
        made = make_target(struct.name)
        assert (made.name, type(made.options)) == (struct.name, struct)


@pytest.mark.parametrize("name", sorted(OWN))
def test_an_option_of_other_targets_is_refused_unless_it_is_at_its_default(name: str) -> None:
    having = [struct.name for struct in EVERY if any(d.name == name for d in declared(struct))]
    found = next(d for d in every_option() if d.name == name)
    names = f"{', '.join(having[:-1])} or {having[-1]}" if len(having) > 1 else having[0]
    value = not found.default if isinstance(found.default, bool) else "x"
    for struct in EVERY:
        if struct.name in having:
            continue
        convert_options(struct.name, **{name: found.default})
        with pytest.raises(UsageError, match=f"{found.flags[-1]} is for --target {names}, not {struct.name}"):
            convert_options(struct.name, **{name: value})


def test_texts_and_values_give_the_same_options(tmp_path: Path) -> None:
    texts = convert_options("trt", compute_capability="89,8.6", batch_profile="1,8,64", workspace="2G", output=str(tmp_path),
                            timing_cache="cache", layers=("a=dense", "b=split-4"), engine=False)
    values = convert_options("trt", compute_capability=((8, 6), (8, 9)), batch_profile=(1, 8, 64), workspace=2 << 30,
                             output=tmp_path, timing_cache=Path("cache"), layers={"a": "dense", "b": "split-4"}, engine=False)
    assert texts == values
    assert convert_options("trt", compute_capability=None, workspace=None, batch_profile=None).target == TrtOptions()
    assert texts.target == TrtOptions(compute_capability=((8, 6), (8, 9)), batch_profile=(1, 8, 64), workspace=2 << 30,
                                      timing_cache=Path("cache"), layers={"a": "dense", "b": "split-4"}, engine=False)


@pytest.mark.parametrize(("target", "values", "words"), [
    ("trt", {"workspace": "lots"}, "is not a size"), ("trt", {"batch_profile": "1,2"}, "is not a batch profile"),
    ("trt", {"batch_profile": "8,4,2"}, "does not satisfy"), ("trt", {"compute_capability": "ada"}, "compute capability"),
    ("trt", {"backend": "tensorrt3"}, "unknown backend 'tensorrt3'"), ("native", {"cpu": "z80"}, "unknown cpu 'z80'"),
    ("ort", {"strategy": "magic"}, "unknown strategy 'magic'"), ("ort", {"opset": 5}, "opset must be 13 to 30, not 5"),
    ("ort", {"threads": 0}, "threads must be 1 to 1024, not 0"), ("ort", {"precision": "int4"}, "unknown precision 'int4'"),
    ("ort", {"layers": ("conv1",)}, "NAME=FORM"), ("ort", {"input_shapes": {"": (1,)}}, "is not an input shape"),
    ("ort", {"io_precision": "fp16"}, "--io-precision is for --precision fp16"), ("tpu", {}, "unknown target 'tpu'"),
    ("ort", {"colour": "red"}, "unexpected keyword argument 'colour'")])
def test_values_that_make_no_sense_are_refused_where_they_are_given(target: str, values: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        convert_options(target, **values)


ODD = (object(), 3.5, -1, True, "two", b"x", "", ["x"], ("x", 5), {"a": 1}, {1: "a"}, {"x"})


@pytest.mark.parametrize("found", list(every_option()), ids=lambda found: found.name)
def test_no_value_of_an_option_is_anything_but_taken_or_a_usage_error(found: Declared) -> None:
    target = next((struct.name for struct in EVERY if found.name in {d.name for d in declared(struct)}), "ort")
    told: list[str] = []
    for value in ODD:
        try:
            convert_options(target, **{found.name: value})
        except UsageError as error:
            told.append(error.message + error.hint)
    assert told, "an object without meaning is one of them"
    assert "\n" not in "".join(told)


@pytest.mark.parametrize(("values", "words"), [
    ({"threads": "two"}, "threads must be 1 to 1024, not two"), ({"threads": True}, "threads must be 1 to 1024, not True"),
    ({"force": "no"}, "force must be True or False, not 'no'"), ({"output": 5}, "output must be a path, not int"),
    ({"provider": 7}, "provider must be a text, not 7"), ({"layers": 5}, "layers must be names with the forms of them, not 5"),
    ({"mean": object()}, "--mean needs numbers"), ({"arch": 5}, "arch must be a text"),
    ({"input_shapes": {"": 5}}, "5 is not an input shape")])
def test_a_value_of_another_kind_is_told_in_one_line(values: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words) as caught:
        convert_options("ort", **values)
    assert caught.value.hint


def test_an_unknown_target_is_answered_with_all_of_them() -> None:
    with pytest.raises(UsageError, match="unknown target 'orrt'") as caught:
        convert_options("orrt")
    assert caught.value.hint == "choose one of: onnx, ort, openvino, native, trt, cpu"


def test_the_typed_keywords_are_the_declared_options() -> None:
    """What type checkers know and what there is: names, and the choices."""
    typed = typing.get_type_hints(ConvertKeywords)
    assert {*typed} - {"arch", "trust_code"} == {d.name for d in every_option()} - {"output", "dry_run"}
    for found in every_option():
        if found.option.choices:
            literals = {value for kind in (typed[found.name], *typing.get_args(typed[found.name])) for value in typing.get_args(kind)
                        if isinstance(value, str)}
            assert literals == {*found.option.choices}, found.name
    assert typing.get_args(TargetName) == tuple(struct.name for struct in EVERY)


def test_the_texts_of_tensorrt_are_not_read_for_another_target() -> None:
    with pytest.raises(UsageError, match="--workspace is for --target trt, not ort"):
        convert_options("ort", workspace="lots")


def test_only_targets_that_choose_forms_have_a_strategy() -> None:
    for struct in EVERY:
        assert issubclass(struct, FormOptions) == (struct not in (NativeOptions, CpuOptions))
    assert ConvertOptions(target=NativeOptions()).forms == FormOptions()
    assert ConvertOptions(target=OrtOptions(strategy="dense")).forms.strategy == "dense"


def test_a_batch_profile_frees_the_batch() -> None:
    assert not convert_options("trt").free_batch
    assert convert_options("trt", batch_profile="1,8,64").free_batch
    assert convert_options("ort", dynamic_batch=True).free_batch


def test_options_are_values() -> None:
    assert convert_options("native", cpu=CPU_NAMES[1]) == convert_options("native", cpu=CPU_NAMES[1])
    with pytest.raises(dataclasses.FrozenInstanceError):
        convert_options("native").force = True  # type: ignore[misc]
