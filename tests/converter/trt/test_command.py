import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from engine_kit import HALF, grouped_net, images_net

from gkp.converter.trt.command import build_command
from gkp.errors import UsageError
from gkp.options.trt import TrtOptions

RTX = TrtOptions(backend="tensorrt_rtx")
CLASSIC = TrtOptions(backend="tensorrt")


def tool(options: TrtOptions, *arguments: Any) -> str:
    """Only the command of NVIDIA's tool."""
    return build_command(options, *arguments).split("; for a directory")[0]


def test_tensorrt_for_rtx_is_told_the_capabilities() -> None:
    assert tool(replace(RTX, compute_capability=((8, 6), (12, 0))), grouped_net()) == \
        "tensorrt_rtx --onnx=model.onnx --skipInference --computeCapabilities=86,120 --saveEngine=engine.sm86+sm120.trt"
    assert tool(RTX, grouped_net(), "other.onnx") == "tensorrt_rtx --onnx=other.onnx --skipInference --saveEngine=engine.trt"


def test_turing_is_a_command_of_its_own() -> None:
    first, second = tool(replace(RTX, compute_capability=((7, 5), (8, 9))), grouped_net()).split(" && ")
    assert first.endswith("--computeCapabilities=75 --saveEngine=engine.sm75.trt")
    assert second.endswith("--computeCapabilities=89 --saveEngine=engine.sm89.trt")


def test_trtexec_is_told_to_keep_the_types_and_where_the_timing_cache_is() -> None:
    assert tool(replace(CLASSIC, timing_cache=Path("my cache")), grouped_net()) == \
        "trtexec --onnx=model.onnx --skipInference --stronglyTyped '--timingCacheFile=my cache' --saveEngine=engine.trt"


def test_the_profile_and_the_workspace_are_spelled_out() -> None:
    text = build_command(replace(CLASSIC, batch_profile=(1, 8, 64), workspace=3 << 29), grouped_net("N"))
    assert "--minShapes=x:1x3x16x16 --optShapes=x:8x3x16x16 --maxShapes=x:64x3x16x16" in text
    assert "--memPoolSize=workspace:1536 " in text
    assert "workspace:0.5 " in build_command(replace(CLASSIC, workspace=1 << 19), grouped_net())


def test_channels_last_names_types_and_formats_of_every_tensor() -> None:
    text = build_command(replace(RTX, channels_last=True), images_net(dtype=HALF))
    assert "--inputIOFormats=fp16:hwc --outputIOFormats=fp16:hwc" in text
    text = build_command(replace(RTX, channels_last=True), grouped_net())
    assert "--inputIOFormats=fp32:hwc --outputIOFormats=fp32:chw" in text


def test_without_a_backend_both_tools_are_named() -> None:
    text = build_command(TrtOptions(), grouped_net())
    assert text.startswith("tensorrt_rtx --onnx=model.onnx")
    assert "; with tensorrt on the machine with the GPU: trtexec --onnx=model.onnx" in text


def test_gkp_itself_is_told_what_this_conversion_was_told() -> None:
    options = TrtOptions(backend="tensorrt_rtx", compute_capability=((8, 6), (12, 0)), batch_profile=(1, 8, 64), workspace=1 << 31,
                         channels_last=True)
    text = build_command(options, images_net("N"), "a b.onnx")
    assert text.split("; for a directory that gkp loads: ")[1] == (
        "gkp-convert 'a b.onnx' --target trt --dynamic-batch --channels-last --backend tensorrt_rtx --workspace 2147483648 "
        "--compute-capability 8.6,12.0 --batch-profile 1,8,64")
    assert build_command(TrtOptions(), grouped_net()).endswith(": gkp-convert model.onnx --target trt")


@pytest.mark.parametrize("name", ["x; rm -rf ~", "a:b,c", "$(id)", "x\n--loadEngine=y", "it's"])
def test_names_from_the_model_cannot_add_arguments(name: str) -> None:
    model = grouped_net("N")
    model.graph.input[0].name = name
    text = tool(replace(RTX, batch_profile=(1, 8, 64)), model)
    assert text.isprintable()
    arguments = shlex.split(text)
    assert [a.split("=")[0] for a in arguments] == ["tensorrt_rtx", "--onnx", "--skipInference", "--minShapes", "--optShapes",
                                                    "--maxShapes", "--saveEngine"]


def test_a_dynamic_model_without_a_profile_has_no_command() -> None:
    with pytest.raises(UsageError, match="the batch is dynamic"):
        build_command(RTX, grouped_net("N"))
