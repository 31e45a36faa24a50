"""What the fuzzer starts from: real checkpoints where they are, and one small file of every format that gkp reads."""

from __future__ import annotations

import io
import json
import pickle
import struct
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import safetensors.numpy
import torch
from onnx import TensorProto, helper, numpy_helper

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT / ".." / "shared" / "checkpoints"
REAL = {"example-grouped.pt": ROOT / "examples/resnet20_cifar10/grouped.pt",
        "example-dense.pt": ROOT / "examples/resnet20_cifar10/dense.pt",
        "tmi-gkp.pt": SHARED / "tmi_gkp/resnet20_cifar10/grouped",
        "tmi-gkp-snapshot.pt": SHARED / "tmi_gkp/resnet20_cifar10/snapshots/epoch_35.pt",
        "dsp.pt": SHARED / "dsp/resnet20_g4.pt",
        "gconv-prune.json": SHARED / "gconv_prune/resnet34_A.json"}


def write(folder: Path) -> list[str]:
    """Write the corpus into `folder`; the names of its files, the real ones first."""
    files = {name: path.read_bytes() for name, path in REAL.items() if path.is_file()}
    files |= {"small.onnx": _onnx(), "state.pt": _torch(_state()), "legacy.pt": _legacy(),
              "plain.pkl": pickle.dumps({"state_dict": _plain(), "epoch": 3}, protocol=2),
              "block.block": pickle.dumps([([0, 2], [1, 3, 5]), ([1], [0, 2])], protocol=4),
              "small.safetensors": safetensors.numpy.save(_plain(), {"format": "pt"}),
              "masks.npy": _masks(), "numbers.npy": _npy(np.arange(24, dtype=np.float32).reshape(2, 3, 4)),
              "script.pt": _script(), "program.pt2": _program(), "manifest.json": _manifest()}
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return list(files)


def _generator() -> np.random.Generator:
    return np.random.default_rng(0)


def _plain() -> dict[str, Any]:
    rng = _generator()
    return {"conv1.weight": rng.standard_normal((4, 3, 3, 3)).astype(np.float32), "fc.bias": rng.standard_normal(4)}


def _state() -> dict[str, Any]:
    return {"state_dict": {name: torch.from_numpy(array) for name, array in _plain().items()}, "epoch": 3,
            "args": {"lr": 0.1, "name": "small"}}


def _torch(value: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def _legacy() -> bytes:
    """PyTorch names storages by their addresses, and writes them in the order of these names: here they are numbered."""
    kept = []
    while True:
        state = _state()
        kept.append(state)  # so that the next ones lie elsewhere
        keys = [str(tensor.untyped_storage()._cdata).encode() for tensor in state["state_dict"].values()]
        if keys == sorted(keys):
            break
    buffer = io.BytesIO()
    torch.save(state, buffer, _use_new_zipfile_serialization=False)
    data = buffer.getvalue()
    for number, key in enumerate(keys):
        new = str(number).encode()
        data = data.replace(struct.pack("<I", len(key)) + key, struct.pack("<I", len(new)) + new)
    return data


def _npy(array: np.ndarray[Any, Any]) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=True)
    return buffer.getvalue()


def _masks() -> bytes:
    outer = np.empty(2, object)
    outer[0], outer[1] = np.ones((2, 3), bool), np.zeros(4, bool)
    return _npy(outer)


def _script() -> bytes:
    torch.manual_seed(0)
    buffer = io.BytesIO()
    module = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.ReLU()).eval()
    torch.jit.save(torch.jit.script(module), buffer)
    return buffer.getvalue()


def _program() -> bytes:
    torch.manual_seed(0)
    buffer = io.BytesIO()
    torch.export.save(torch.export.export(torch.nn.Conv2d(3, 4, 3).eval(), (torch.zeros(1, 3, 8, 8),)), buffer)
    return buffer.getvalue()


def _manifest() -> bytes:
    return json.dumps({"schema_version": 1, "files": {"model.onnx": "0" * 64}, "threads": 1, "layers": []}).encode()


def _onnx() -> bytes:
    """The idioms of recognition in one network: gathers around a grouped convolution, a split, a concat, a shuffle."""
    rng = _generator()
    constants: dict[str, onnx.TensorProto] = {}

    def const(value: Any, dtype: Any = np.float32) -> str:
        name = f"c{len(constants)}"
        constants[name] = numpy_helper.from_array(np.asarray(value, dtype), name)
        return name

    def weight(*shape: int) -> str:
        return const(rng.standard_normal(shape))

    node, nodes = helper.make_node, []
    nodes += [node("Conv", ["x", weight(8, 3, 3, 3)], ["a"], pads=[1] * 4),
              node("BatchNormalization", ["a", *(const(np.ones(8)) for _ in range(4))], ["b"]), node("Relu", ["b"], ["c"]),
              node("Gather", ["c", const(rng.permutation(8), np.int64)], ["d"], axis=1),
              node("Conv", ["d", weight(8, 2, 3, 3)], ["e"], group=4, pads=[1] * 4),
              node("Gather", ["e", const(rng.permutation(8), np.int64)], ["f"], axis=1), node("Add", ["f", "c"], ["g"]),
              node("Split", ["g", const([4, 4], np.int64)], ["h0", "h1"], axis=1),
              node("Conv", ["h0", weight(4, 4, 1, 1)], ["i0"]), node("Conv", ["h1", weight(4, 4, 1, 1)], ["i1"]),
              node("Concat", ["i0", "i1"], ["j"], axis=1),
              node("Reshape", ["j", const([1, 2, 4, 6, 6], np.int64)], ["k"]),
              node("Transpose", ["k"], ["l"], perm=[0, 2, 1, 3, 4]),
              node("Reshape", ["l", const([1, 8, 6, 6], np.int64)], ["m"]), node("GlobalAveragePool", ["m"], ["n"]),
              node("Flatten", ["n"], ["o"]), node("Gemm", ["o", weight(5, 8), weight(5)], ["y"], transB=1)]
    graph = helper.make_graph(nodes, "small", [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 3, 6, 6])],
                              [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 5])], list(constants.values()))
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model, full_check=True)
    return bytes(model.SerializeToString())
