"""Real engines, built with TensorRT for RTX; no GPU is needed."""

from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from engine_kit import HALF, grouped_net, images_net, one_node
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx_kit import Net

from gkp.converter.half import to_half
from gkp.converter.trt.backend import find_backend
from gkp.converter.trt.build import BuiltEngine, build_engines
from gkp.errors import BackendMissingError, FileError, GkpError, UnsupportedModelError, UsageError
from gkp.options.trt import TrtOptions

pytest.importorskip("tensorrt_rtx", reason="tensorrt_rtx is not installed")
RTX = TrtOptions(backend="tensorrt_rtx", compute_capability=((8, 6), (8, 9)))
DYNAMIC = replace(RTX, batch_profile=(1, 8, 64))


def build(model: onnx.ModelProto, options: TrtOptions = RTX, precision: str = "fp32", **more: Any) -> list[BuiltEngine]:
    try:
        backend = find_backend("tensorrt_rtx")
    except UsageError as e:  # another test has bound Polygraphy to the classic package in this process
        pytest.skip(e.message)
    return build_engines(model, options, backend, precision, **more)


def layers(built: BuiltEngine, kind: str) -> dict[str, int | None]:
    return {layer.name: layer.groups for layer in built.info.layers if layer.kind == kind}


def test_an_engine_is_described_as_it_was_built() -> None:
    (built,) = build(grouped_net())
    assert built.file_name == built.info.file == "engine.sm86+sm89.trt"
    assert len(built.data) > 10_000
    info = built.info
    assert (info.package, info.capabilities, info.strongly_typed, info.workspace_bytes) == ("tensorrt_rtx", ["8.6", "8.9"], True, None)
    assert [(t.shape, t.dtype, t.format, t.profile) for t in info.inputs] == [([1, 3, 16, 16], "float32", "LINEAR", None)]
    assert [(t.shape, t.dtype, t.format) for t in info.outputs] == [([1, 10], "float32", "LINEAR")]
    assert layers(built, "CONVOLUTION") == {"stem": 1, "grouped": 4, "depthwise": 32}
    assert not {layer.kind for layer in info.layers} & {"GATHER", "SLICE", "CONCATENATION", "CONSTANT"}


@settings(deadline=None, max_examples=12)
@given(groups=st.sampled_from([1, 2, 3, 8, 16]), inputs=st.integers(1, 12), outputs=st.integers(1, 12), kernel=st.sampled_from([1, 3, 5]),
       stride=st.sampled_from([1, 2]), half=st.booleans())
def test_grouped_convolutions_of_any_size_keep_their_groups(groups: int, inputs: int, outputs: int, kernel: int, stride: int,
                                                            half: bool) -> None:
    net = Net(1, groups * inputs, 8, 8, dtype=HALF if half else onnx.TensorProto.FLOAT)
    weight = net.weight(groups * outputs, inputs, kernel, kernel)
    model = net.model(net.relu(net.conv("x", weight, name="it", group=groups, strides=[stride] * 2, pads=[kernel // 2] * 4)))
    (built,) = build(model, precision="fp16" if half else "fp32")
    assert layers(built, "CONVOLUTION") == {"it": groups}
    assert [(layer.kind, layer.dtype) for layer in built.info.layers] == [
        (kind, "float16" if half else "float32") for kind in ("CONVOLUTION", "ACTIVATION")]


def test_fp16_weights_with_fp32_inputs_make_a_half_precision_network() -> None:
    (built,) = build(to_half(grouped_net()), precision="fp16")
    kinds = Counter((layer.kind, layer.dtype) for layer in built.info.layers)
    assert kinds["CONVOLUTION", "float16"] == 3
    assert kinds["MATRIX_MULTIPLY", "float16"] == 1
    assert built.info.inputs[0].dtype == built.info.outputs[0].dtype == "float32"


def test_half_precision_inputs_are_described_as_such() -> None:
    (built,) = build(grouped_net(dtype=HALF), precision="fp16")
    assert built.info.inputs[0].dtype == built.info.outputs[0].dtype == "float16"


def test_fp16_asked_of_a_float32_network_fails() -> None:
    with pytest.raises(UsageError, match="4 of 4 convolutions and matrix products") as caught:
        build(grouped_net(), precision="fp16")
    assert "stem, grouped, depthwise and 1 more" in caught.value.message


def partly_half() -> onnx.ModelProto:
    """Half precision but for the node `depthwise`, which a pair of casts keeps in float32."""
    model = to_half(grouped_net())
    (node,) = (n for n in model.graph.node if n.name == "depthwise")
    index = list(model.graph.node).index(node)
    weight = next(t for t in model.graph.initializer if t.name == node.input[1])
    weight.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(weight).astype(np.float32), weight.name))
    cast = onnx.helper.make_node
    model.graph.node.insert(index + 1, cast("Cast", ["wide_out"], [node.output[0]], to=onnx.TensorProto.FLOAT16))
    model.graph.node.insert(index, cast("Cast", [node.input[0]], ["wide_in"], to=onnx.TensorProto.FLOAT))
    kept = model.graph.node[index + 1]
    kept.input[0], kept.output[0] = "wide_in", "wide_out"
    return model


def test_named_nodes_may_stay_in_float32_and_no_others() -> None:
    (built,) = build(partly_half(), precision="fp16", keep_fp32=["depthwise"])
    assert {layer.name: layer.dtype for layer in built.info.layers if layer.kind == "CONVOLUTION"} == {
        "stem": "float16", "grouped": "float16", "depthwise": "float32"}
    with pytest.raises(UsageError, match=r"1 of 4 .*: depthwise"):
        build(partly_half(), precision="fp16", keep_fp32=["stem"])


def test_two_static_builds_are_the_same_bytes() -> None:
    first, second = build(grouped_net()), build(grouped_net())
    assert first == second


@pytest.mark.parametrize("half", [False, True])
def test_dynamic_builds_carry_their_profile_and_are_described_alike(half: bool) -> None:
    model = to_half(grouped_net("N")) if half else grouped_net("N")
    first, second = (build(model, DYNAMIC, "fp16" if half else "fp32")[0] for _ in range(2))
    assert first.info == second.info
    assert first.info.inputs[0].shape == [-1, 3, 16, 16]
    assert first.info.inputs[0].profile == ([1, 3, 16, 16], [8, 3, 16, 16], [64, 3, 16, 16])
    assert not {layer.kind for layer in first.info.layers} & {"GATHER", "CONCATENATION", "SHAPE"}  # of shapes only


def test_other_profiles_make_other_engines() -> None:
    narrow, wide = (build(grouped_net("N"), replace(RTX, batch_profile=p))[0] for p in ((1, 1, 1), (1, 32, 256)))
    assert narrow.data != wide.data
    assert wide.info.inputs[0].profile == ([1, 3, 16, 16], [32, 3, 16, 16], [256, 3, 16, 16])


def test_turing_becomes_an_engine_of_its_own() -> None:
    built = build(to_half(grouped_net()), replace(RTX, compute_capability=((8, 9), (7, 5), (12, 0))), "fp16")
    assert [e.file_name for e in built] == ["engine.sm75.trt", "engine.sm89+sm120.trt"]
    assert [e.info.capabilities for e in built] == [["7.5"], ["8.9", "12.0"]]


def test_nothing_asked_is_every_gpu_from_ampere_on() -> None:
    (built,) = build(grouped_net(), TrtOptions())
    assert built.info.capabilities[:3] == ["8.0", "8.6", "8.9"]


@pytest.mark.parametrize(("dtype", "channels"), [(onnx.TensorProto.FLOAT, 3), (onnx.TensorProto.FLOAT, 8), (HALF, 3), (HALF, 16)])
def test_channels_last_inputs_and_outputs_build_for_any_channels(dtype: int, channels: int) -> None:
    (built,) = build(images_net(dtype=dtype, channels=channels), replace(RTX, channels_last=True))
    assert built.info.inputs[0].format == built.info.outputs[0].format == "HWC"
    assert built.info.inputs[0].shape == [1, channels, 8, 8]
    assert built.data != build(images_net(dtype=dtype, channels=channels))[0].data


def test_outputs_that_are_no_images_stay_linear() -> None:
    (built,) = build(grouped_net(), replace(RTX, channels_last=True))
    assert (built.info.inputs[0].format, built.info.outputs[0].format) == ("HWC", "LINEAR")


def test_a_workspace_is_kept_in_the_description_and_one_too_small_says_so() -> None:
    (built,) = build(grouped_net(), replace(RTX, workspace=1 << 31))
    assert built.info.workspace_bytes == 1 << 31
    with pytest.raises(UsageError, match="scratch memory") as caught:
        build(grouped_net(), replace(RTX, workspace=1))
    assert "--workspace" in caught.value.hint or "leave out" in caught.value.hint


def test_progress_rises_to_one() -> None:
    seen: list[tuple[str, float | None]] = []
    build(grouped_net(), progress=lambda text, share: seen.append((text, share)))
    shares = [share for _, share in seen if share is not None]
    assert shares[0] == 0
    assert shares[-1] == 1
    assert shares == sorted(shares)
    assert {text for text, _ in seen} == {"building the engine for 8.6, 8.9"}


class Stop(Exception):
    pass


def test_a_progress_function_that_raises_stops_the_build() -> None:
    def progress(text: str, share: float | None) -> None:
        raise Stop

    with pytest.raises(Stop):
        build(grouped_net(), progress=progress)
    build(grouped_net())


@pytest.mark.parametrize(("model", "options", "kind", "message"), [
    (grouped_net("N"), RTX, UsageError, "the batch is dynamic, TensorRT needs its range"),
    (grouped_net(), DYNAMIC, UsageError, "the batch is fixed"),
    (grouped_net(), replace(RTX, compute_capability=((9, 0),)), UsageError, "capability 9.0"),
    (grouped_net(), replace(RTX, compute_capability=((7, 5),)), UsageError, "capability 7.5: FP32 GEMM is not supported"),
    (grouped_net(), replace(RTX, timing_cache=Path("c")), UsageError, "no timing cache"),
    (grouped_net(1 << 22), RTX, UsageError, "bytes of scratch memory"),
    (one_node("Det", (1, 3, 4, 4), outputs=("a", "b")), RTX, UnsupportedModelError, "TensorRT does not take Det 'the_det'"),
    (one_node("Foo", domain="my.custom"), RTX, UnsupportedModelError, "TensorRT does not take Foo 'the_foo'"),
    (one_node("Gather", inputs={"i": np.array([9])}, axis=1), RTX, UnsupportedModelError, "Gather the_gather: index 9"),
    (one_node("Conv", inputs={"w": np.ones((8, 8, 1, 1), np.float32)}, group=2), RTX, UnsupportedModelError, "Conv the_conv"),
    (one_node("Conv", inputs={"w": np.ones((8, 8, 1, 1), np.float32)}, dtype=HALF), RTX, FileError, "not valid"),
    (onnx.ModelProto(), RTX, FileError, "holds no operators")])
def test_bad_input_gives_its_error(model: onnx.ModelProto, options: TrtOptions, kind: type[GkpError], message: str) -> None:
    with pytest.raises(GkpError) as caught:
        build(model, options)
    assert type(caught.value) is kind
    assert message in caught.value.message
    assert caught.value.hint


@pytest.mark.parametrize(("option", "message"), [({"batch_profile": (9, 8, 64)}, "MIN <= OPT <= MAX"),
                                                 ({"workspace": 0}, "'0' is not a size")])
def test_options_that_no_engine_can_have_are_refused_before_there_is_a_model(option: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        replace(RTX, **option)


def test_a_build_that_failed_leaves_the_next_one_alone(capfd: pytest.CaptureFixture[str]) -> None:
    want = build(grouped_net())
    for _ in range(3):
        with pytest.raises(UnsupportedModelError):
            build(one_node("Det", (1, 3, 4, 4), outputs=("a", "b")))
        with pytest.raises(UsageError):
            build(grouped_net(), replace(RTX, workspace=1))
    assert build(grouped_net()) == want
    assert capfd.readouterr().out == ""


def test_a_build_for_turing_that_fails_or_is_stopped_does_not_change_the_next_engine() -> None:
    """It did in TensorRT for RTX 1.7: the next engine came out another, or the process crashed."""
    def stop(text: str, share: float | None) -> None:
        if share:
            raise Stop

    want, turing = build(grouped_net()), replace(RTX, compute_capability=((7, 5),))
    with pytest.raises(UsageError, match="FP32 GEMM"):
        build(grouped_net(), turing)
    assert build(grouped_net()) == want
    with pytest.raises(UsageError, match="scratch memory"):
        build(to_half(grouped_net()), replace(turing, workspace=1))
    assert build(grouped_net()) == want
    with pytest.raises(Stop):
        build(to_half(grouped_net(size=64)), turing, progress=stop)
    assert build(grouped_net()) == want


def test_builds_in_several_threads_do_not_take_each_others_errors_for_their_own() -> None:
    want = build(grouped_net())

    def job(number: int) -> Any:
        model = one_node("Det", (1, 3, 4, 4), outputs=("a", "b")) if number % 3 == 0 else grouped_net()
        try:
            return build(model, replace(RTX, compute_capability=((7, 5),)) if number % 3 == 1 else RTX)
        except GkpError as e:
            return e.message

    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(job, range(18)))
    assert all(r == "TensorRT does not take Det 'the_det'" for r in results[0::3])
    assert all("FP32 GEMM" in r for r in results[1::3])
    assert all(r == want for r in results[2::3])


def test_the_classic_package_needs_a_gpu_to_build_on() -> None:
    from gkp.runtime.cuda import device_capability

    if device_capability() is not None:
        pytest.skip("a GPU answers here")
    with pytest.raises(BackendMissingError, match="no GPU answers here") as caught:
        find_backend("tensorrt")
    assert caught.value.exit_code == 4
