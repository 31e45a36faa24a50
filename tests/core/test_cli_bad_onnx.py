"""ONNX files that are damaged, hostile or beyond what gkp converts."""

from __future__ import annotations

import os
import resource
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from cli_kit import FAST, gkp, refuse, save, small_net
from onnx import TensorProto, helper, numpy_helper
from onnx_kit import Net

Edit = Callable[[onnx.ModelProto], object]


def _node(model: onnx.ModelProto, op: str) -> onnx.NodeProto:
    return next(n for n in model.graph.node if n.op_type == op)


def _weight(model: onnx.ModelProto) -> onnx.TensorProto:
    return next(t for t in model.graph.initializer if len(t.dims) == 4)


def _poison(value: float) -> Edit:
    def edit(model: onnx.ModelProto) -> None:
        array = numpy_helper.to_array(_weight(model)).copy()
        array.flat[3] = value
        _weight(model).CopyFrom(numpy_helper.from_array(array, _weight(model).name))

    return edit


def _cycle(model: onnx.ModelProto) -> None:
    first, last = model.graph.node[0], model.graph.node[2]
    first.input[0] = last.output[0]


def _loop(op: str) -> Edit:
    def edit(model: onnx.ModelProto) -> None:
        y = model.graph.output[0].name
        value = [helper.make_tensor_value_info("inner", TensorProto.FLOAT, [1, 5])]
        body = helper.make_graph([helper.make_node("Identity", [y], ["inner"])], "body", [], value)
        flag = numpy_helper.from_array(np.array(True), "flag")
        model.graph.initializer.append(flag)
        if op == "If":
            node = helper.make_node("If", ["flag"], ["branch"], then_branch=body, else_branch=body)
        else:
            count = numpy_helper.from_array(np.array(2), "count")
            model.graph.initializer.append(count)
            ins = [helper.make_tensor_value_info("i", TensorProto.INT64, []),
                   helper.make_tensor_value_info("c", TensorProto.BOOL, []),
                   helper.make_tensor_value_info("v", TensorProto.FLOAT, [1, 5])]
            outs = [helper.make_tensor_value_info("c2", TensorProto.BOOL, []),
                    helper.make_tensor_value_info("v2", TensorProto.FLOAT, [1, 5])]
            inner = helper.make_graph([helper.make_node("Identity", ["c"], ["c2"]),
                                       helper.make_node("Identity", ["v"], ["v2"])], "body", ins, outs)
            node = helper.make_node("Loop", ["count", "flag", y], ["branch"], body=inner)
        model.graph.node.append(node)
        del model.graph.output[:]
        model.graph.output.append(helper.make_tensor_value_info("branch", TensorProto.FLOAT, [1, 5]))

    return edit


def _set(**fields: object) -> Edit:
    def edit(model: onnx.ModelProto) -> None:
        for name, value in fields.items():
            setattr(_weight(model), name, value)

    return edit


def _dims(*dims: int) -> Edit:
    def edit(model: onnx.ModelProto) -> None:
        _weight(model).dims[:] = dims

    return edit


def _attribute(op: str, name: str, value: object) -> Edit:
    def edit(model: onnx.ModelProto) -> None:
        node = _node(model, op)
        kept = [a for a in node.attribute if a.name != name]
        del node.attribute[:]
        node.attribute.extend([*kept, helper.make_attribute(name, value)])

    return edit


def _empty_list(model: onnx.ModelProto) -> None:
    _node(model, "Conv").attribute.add(name="strides", type=onnx.AttributeProto.INTS)


def _two_values(model: onnx.ModelProto) -> None:
    next(a for a in _node(model, "Conv").attribute if a.name == "pads").f = 1.5


def _reference(model: onnx.ModelProto) -> None:
    _node(model, "Conv").attribute.add(name="auto_pad", ref_attr_name="p", type=onnx.AttributeProto.STRING)


def _one_by_one(model: onnx.ModelProto) -> None:
    _weight(model).ClearField("raw_data")
    _weight(model).float_data.extend([1, 2, 3])


def _batch(model: onnx.ModelProto, size: int) -> None:
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = size


def _sequence(model: onnx.ModelProto) -> None:
    model.graph.input[0].type.sequence_type.elem_type.tensor_type.elem_type = TensorProto.FLOAT


BAD: dict[str, tuple[Edit, int, str]] = {
    "unknown operator": (lambda m: setattr(_node(m, "Relu"), "op_type", "Frobnicate"), 3, "Frobnicate"),
    "unknown domain": (lambda m: setattr(_node(m, "Relu"), "domain", "com.example"), 3, "com.example"),
    "dangling tensor": (lambda m: _node(m, "Relu").input.__setitem__(0, "nowhere"), 6, "nowhere"),
    "cycle": (_cycle, 6, "valid"),
    "no output of that name": (lambda m: setattr(m.graph.output[0], "name", "nowhere"), 6, "nowhere"),
    "two producers": (lambda m: m.graph.node[1].output.__setitem__(0, m.graph.node[0].output[0]), 6, ""),
    "no graph": (lambda m: m.ClearField("graph"), 6, ""),
    "no nodes": (lambda m: m.graph.ClearField("node"), 6, ""),
    "no input": (lambda m: m.graph.ClearField("input"), 6, ""),
    "no opset": (lambda m: m.ClearField("opset_import"), 3, "opset"),
    "opset of the future": (lambda m: setattr(m.opset_import[0], "version", 1000), 3, "opset 1000"),
    "negative opset": (lambda m: setattr(m.opset_import[0], "version", -5), 3, "opset"),
    "less data than declared": (lambda m: setattr(_weight(m), "raw_data", _weight(m).raw_data[:-4]), 6, "declares"),
    "more data than declared": (lambda m: setattr(_weight(m), "raw_data", _weight(m).raw_data + b"1234"), 6, "declares"),
    "no data": (_set(raw_data=b""), 6, ""),
    "huge dimension": (_dims(2**40, 2**20, 3, 3), 6, "impossible shape"),
    "product overflows": (_dims(2**32, 2**32, 3, 3), 6, "impossible shape"),
    "negative dimension": (_dims(-8, 3, 3, 3), 6, "impossible shape"),
    "zero dimension": (_dims(0, 3, 3, 3), 6, ""),
    "unknown type": (_set(data_type=200), 6, "type"),
    "string weights": (_set(data_type=TensorProto.STRING), 6, ""),
    "If": (_loop("If"), 3, "control flow"),
    "Loop": (_loop("Loop"), 3, "control flow"),
    "NaN weight": (_poison(np.nan), 3, "nan"),
    "infinite weight": (_poison(np.inf), 3, "inf"),
    "groups that do not divide": (_attribute("Conv", "group", 3), 3, "3 groups"),
    "no groups": (_attribute("Conv", "group", 0), 3, "0 groups"),
    "negative stride": (_attribute("Conv", "strides", [-1, -1]), 6, ""),
    "zero stride": (_attribute("Conv", "strides", [0, 0]), 6, ""),
    "huge pads": (_attribute("Conv", "pads", [2**40] * 4), 5, "activation"),
    "huge dilation": (_attribute("Conv", "dilations", [2**40] * 2), 6, "no output"),
    "attribute of another type": (_attribute("Conv", "pads", 1.5), 6, "pads"),
    "empty list": (_empty_list, 6, "strides is an empty list"),
    "attribute that holds two": (_two_values, 6, "its type says"),
    "reference to a function's attribute": (_reference, 6, "is in none"),
    "segments": (lambda m: setattr(_weight(m).segment, "end", 5), 6, "segments"),
    "data twice": (lambda m: _weight(m).float_data.append(1), 6, "twice"),
    "numbers one by one, too few": (_one_by_one, 6, "declares 216 numbers but holds 3"),
    "axes without end": (_dims(*[1] * 100), 6, "impossible shape"),
    "name that is not text": (lambda m: m, 6, "UTF-8"),
    "huge batch": (lambda m: _batch(m, 2**62), 5, "inputs"),
    "input of no type": (lambda m: setattr(m.graph.input[0].type.tensor_type, "elem_type", 0), 6, "input x"),
    "input that is a sequence": (_sequence, 6, "input x"),
    "control characters": (lambda m: _node(m, "Relu").input.__setitem__(0, "\x1b[2Jnowhere"), 6, "?[2Jnowhere"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_graph_is_refused_in_one_line(name: str, tmp_path: Path) -> None:
    edit, code, words = BAD[name]
    model = small_net()
    edit(model)
    path = save(model, tmp_path / "m.onnx")
    if name == "name that is not text":
        path.write_bytes(path.read_bytes().replace(b"conv_t1", b"conv_\xff1"))
    refuse(tmp_path, path, code, words)


def external(folder: Path, location: str, **info: int) -> Path:
    """A model whose first weight lies in another file."""
    model = small_net()
    weight = _weight(model)
    data = weight.raw_data
    weight.ClearField("raw_data")
    weight.data_location = TensorProto.EXTERNAL
    for key, value in {"location": location, "offset": 0, "length": len(data), **info}.items():
        weight.external_data.add(key=key, value=str(value))
    (folder / "model").mkdir(exist_ok=True)
    (folder / "weights.bin").write_bytes(data)
    return save(model, folder / "model" / "m.onnx")


def test_external_data_in_the_models_folder_is_read(tmp_path: Path) -> None:
    model = external(tmp_path, "weights.bin")
    (tmp_path / "weights.bin").rename(tmp_path / "model" / "weights.bin")
    gkp("convert", model, "--target", "onnx", "-o", tmp_path / "out", *FAST, expect=0)


@pytest.mark.parametrize("location", ["../weights.bin", "a/../../weights.bin", "/etc/hostname", "", "."])
def test_external_data_outside_the_folder_is_refused(location: str, tmp_path: Path) -> None:
    refuse(tmp_path, external(tmp_path, location), 5)


def test_external_data_whose_name_no_file_can_have_is_missing(tmp_path: Path) -> None:
    refuse(tmp_path, external(tmp_path, "a\0b"), 6, "external data")


@pytest.mark.parametrize("what", ["file", "folder"])
def test_external_data_behind_a_symlink_is_refused(what: str, tmp_path: Path) -> None:
    model = external(tmp_path, "weights.bin" if what == "file" else "sub/weights.bin")
    if what == "file":
        (tmp_path / "model" / "weights.bin").symlink_to(tmp_path / "weights.bin")
    else:
        (tmp_path / "model" / "sub").symlink_to(tmp_path)
    refuse(tmp_path, model, 5, "outside")


@pytest.mark.parametrize("kind", ["hard link", "pipe", "folder"])
def test_external_data_that_is_no_file_of_its_own_is_refused(kind: str, tmp_path: Path) -> None:
    model = external(tmp_path, "data.bin")
    place = tmp_path / "model" / "data.bin"
    if kind == "hard link":
        place.hardlink_to(tmp_path / "weights.bin")
    elif kind == "pipe":
        os.mkfifo(place)
    else:
        place.mkdir()
    outcome = gkp("inspect", model)
    assert outcome.code in (5, 6), outcome.err
    refuse(tmp_path, model, outcome.code)


def test_shapes_that_a_file_claims_are_not_believed(tmp_path: Path) -> None:
    net = Net(1, 3, 8, 8)
    y = net.op("GlobalMaxPool", net.op("Tile", net.conv3("x", 3, 4), net.ints(1, 1, 4000, 4000)))
    model = net.model(y)
    for info in model.graph.value_info:
        for dim in info.type.tensor_type.shape.dim:
            dim.dim_value = 1
    refuse(tmp_path, save(model, tmp_path / "m.onnx"), 5, "activation")


@pytest.mark.parametrize("info", [{"offset": 8}, {"offset": -4}, {"length": 2**40}, {"length": 4}])
def test_external_data_that_does_not_fit_its_file_is_refused(info: dict[str, int], tmp_path: Path) -> None:
    model = external(tmp_path, "weights.bin", **info)
    (tmp_path / "weights.bin").rename(tmp_path / "model" / "weights.bin")
    refuse(tmp_path, model, 6, "does not fit")


def test_external_data_that_is_missing_is_refused(tmp_path: Path) -> None:
    refuse(tmp_path, external(tmp_path, "elsewhere.bin"), 6, "elsewhere.bin")


def test_a_huge_declared_shape_takes_no_memory(tmp_path: Path) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    net = Net(1, 3, 8, 8)
    shape = net.ints(2**20, 2**20, 16)
    big = net.op("ConstantOfShape", shape)
    x = net.op("Add", net.op("Flatten", net.conv3("x", 3, 4)), net.op("ReduceSum", big, keepdims=0))
    graph = helper.make_graph(net.nodes, "g", net.inputs, [helper.make_tensor_value_info(x, 1, [1, 256])], net.constants)
    path = save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8), tmp_path / "m.onnx")
    refuse(tmp_path, path, 3, "ConstantOfShape would hold over")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1 << 20  # KiB


# ---- shapes ----------------------------------------------------------------------------------------------------------
SHAPES: dict[str, tuple[tuple[object, object], list[str], str]] = {
    "dynamic height and width": ((1, "h"), [], "--input-shape"),
    "other size than declared": ((1, 8), ["1,3,9,9"], "axis 2"),
    "other channels": ((1, 8), ["1,4,8,8"], "axis 1"),
    "rank too low": ((1, 8), ["1,3,8"], "3 axes"),
    "rank too high": ((1, 8), ["1,3,8,8,8"], "5 axes"),
    "one axis": ((1, 8), ["8"], "shape"),
    "batch 0": ((1, 8), ["0,3,8,8"], "at least 1"),
    "negative": ((1, 8), ["1,3,-8,8"], "at least 1"),
    "words": ((1, 8), ["a,b,c"], "not a shape"),
    "floats": ((1, 8), ["1.5,3,8,8"], "not a shape"),
    "empty": ((1, 8), [""], "not a shape"),
    "trailing comma": ((1, 8), ["1,3,8,8,"], "not a shape"),
    "other separator": ((1, 8), ["1x3x8x8"], "not a shape"),
    "unknown input": ((1, 8), ["y:1,3,8,8"], "no input"),
    "too large": ((1, "h"), ["1,3,100000000,100000000"], "--input-shape"),
    "astronomical": ((1, "h"), [f"1,3,{10**400},8"], "--input-shape"),
    "arabic digits do not hide nonsense": ((1, 8), ["1,3,٩,8"], "axis 2"),
}


@pytest.mark.parametrize("name", SHAPES)
def test_a_shape_that_does_not_fit_is_a_usage_error(name: str, tmp_path: Path) -> None:
    (batch, size), shapes, words = SHAPES[name]
    model = save(small_net(batch=batch, size=size) if size != "h" else dynamic_net(), tmp_path / "m.onnx")
    options = [part for shape in shapes for part in ("--input-shape", shape)]
    refuse(tmp_path, model, 2, words, options=options)


def dynamic_net() -> onnx.ModelProto:
    """Height and width are free."""
    model = small_net()
    for axis, name in ((2, "h"), (3, "w")):
        model.graph.input[0].type.tensor_type.shape.dim[axis].dim_param = name
    del model.graph.value_info[:]
    return model


def test_a_dynamic_height_and_width_stay_dynamic(tmp_path: Path) -> None:
    import gkp as package

    path = save(dynamic_net(), tmp_path / "m.onnx")
    gkp("convert", path, "--target", "ort", "-o", tmp_path / "out", "--input-shape", "1,3,16,16", *FAST, expect=0)
    with package.load(tmp_path / "out") as model:
        assert model.manifest.inputs[0].shape[2:] == ["h", "w"]
        for size in (8, 16, 33):
            assert model.run(np.zeros((1, 3, size, size), np.float32)).shape == (1, 5)
