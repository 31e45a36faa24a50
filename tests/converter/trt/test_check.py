from typing import Any

import numpy as np
import onnx
import pytest
from engine_kit import grouped_net, images_net, one_node

from gkp.converter.trt.check import check_model
from gkp.errors import FileError, GkpError, UnsafeFileError, UnsupportedModelError


def ints(*values: int) -> Any:
    return np.array(values, np.int64)


@pytest.mark.parametrize("model", [
    grouped_net(), grouped_net("N"), images_net(),
    one_node("Gather", inputs={"i": ints(0, 7, -8)}, axis=1),
    one_node("Slice", inputs={"s": ints(1), "e": ints(2 ** 62), "a": ints(-3)}),
    one_node("Split", inputs={"n": ints(8)}, axis=1),
    one_node("Transpose", perm=[0, 2, 3, 1])])
def test_models_that_are_in_order_pass(model: onnx.ModelProto) -> None:
    check_model(model)


@pytest.mark.parametrize(("model", "text"), [
    (one_node("Gather", inputs={"i": ints(0, 8)}, axis=1), "index 8 is out of range for axis 1 with 8 elements"),
    (one_node("Gather", inputs={"i": ints(-9)}, axis=1), "index -9 is out of range"),
    (one_node("Slice", inputs={"s": ints(9), "e": ints(12), "a": ints(1)}), "has no elements"),
    (one_node("Conv", inputs={"w": np.ones((8, 8, 1, 1), np.float32)}, group=2), "8 input channels, its weights read 2 groups of 8"),
    (one_node("Conv", inputs={"w": np.ones((9, 4, 1, 1), np.float32)}, group=2), "9 output channels in 2 groups"),
    (one_node("Conv", inputs={"w": np.ones((8, 8, 1, 1), np.float32), "b": np.ones(7, np.float32)}), "a bias of shape"),
])
def test_numbers_out_of_range_are_refused_with_the_node(model: onnx.ModelProto, text: str) -> None:
    with pytest.raises(UnsupportedModelError, match=text) as caught:
        check_model(model)
    assert model.graph.node[0].name in caught.value.message


@pytest.mark.parametrize("model", [
    one_node("Slice", inputs={"s": ints(0), "e": ints(1), "a": ints(4)}),
    one_node("Slice", inputs={"s": ints(0), "e": ints(1), "a": ints(1), "t": ints(0)}),
    one_node("Split", inputs={"n": ints(9)}, axis=1),
    one_node("Gather", inputs={"i": ints(0)}, axis=4),
    one_node("Transpose", perm=[0, 1, 2, 2])])
def test_axes_and_sizes_out_of_range_are_refused(model: onnx.ModelProto) -> None:
    with pytest.raises(GkpError):
        check_model(model)


def test_indices_in_a_constant_node_are_checked_too() -> None:
    model = one_node("Gather", inputs={"i": ints(8)}, axis=1)
    del model.graph.initializer[:]
    model.graph.node.insert(0, onnx.helper.make_node("Constant", [], ["i"], value_ints=[8]))
    with pytest.raises(UnsupportedModelError, match="index 8"):
        check_model(model)


def corrupt(model: onnx.ModelProto) -> None:
    model.graph.initializer[0].raw_data = model.graph.initializer[0].raw_data[:-4]


def unsorted(model: onnx.ModelProto) -> None:
    nodes = list(reversed(model.graph.node))
    del model.graph.node[:]
    model.graph.node.extend(nodes)


def empty(model: onnx.ModelProto) -> None:
    model.CopyFrom(onnx.ModelProto.FromString(b""))


def wrong_type(model: onnx.ModelProto) -> None:
    model.graph.input[0].type.tensor_type.elem_type = onnx.TensorProto.FLOAT16


def unknown_operator(model: onnx.ModelProto) -> None:
    model.graph.node[0].op_type = "Konv"


def not_text(model: onnx.ModelProto) -> None:
    spoiled = model.SerializeToString().replace(b"stem", b"ste\xcb")
    model.CopyFrom(onnx.ModelProto.FromString(spoiled))


@pytest.mark.parametrize("spoil", [not_text, corrupt, unsorted, empty, wrong_type, unknown_operator])
def test_what_is_not_onnx_is_a_file_error(spoil: Any) -> None:
    model = grouped_net()
    spoil(model)
    with pytest.raises(FileError) as caught:
        check_model(model)
    assert caught.value.exit_code == 6
    assert "\n" not in caught.value.message


@pytest.mark.parametrize("where", ["weight", "constant"])
def test_weights_in_other_files_are_refused_before_anything_reads_them(where: str) -> None:
    model = grouped_net()
    tensor = model.graph.initializer[0]
    if where == "constant":
        node = model.graph.node.add(op_type="Constant", output=["extra"])
        node.attribute.add(name="value", type=onnx.AttributeProto.TENSOR)
        tensor = node.attribute[0].t
    tensor.data_location = onnx.TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="../../secret")
    with pytest.raises(UnsafeFileError):
        check_model(model)
