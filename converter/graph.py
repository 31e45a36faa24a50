"""The one module that touches onnx-graphsurgeon: a mutable view of an ONNX graph for the passes.

It mends what the library leaves to its users: the ir_version and metadata of the source model survive a round trip,
subgraphs are refused, and tensors keep unique names of our own. Shapes are those of onnx.shape_inference, kept up to
date by the passes.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, TypeAlias

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from onnx_graphsurgeon.importers.onnx_importer import OnnxImporter

from gkp.converter.budget import Budget
from gkp.converter.skeleton import ERRORS, SMALL, inferred, skeleton
from gkp.errors import FileError, UnsupportedModelError
from gkp.images.normalisation import Normalisation
from gkp.text import first_line
from gkp.types import Array

Tensor: TypeAlias = gs.Tensor
Node: TypeAlias = gs.Node
DOMAIN = "gkp"


class Graph:
    """An ONNX graph under rewriting. Tensors have one producer at most; constants carry their values. budget: of the file
    that the model comes from (default: one for a file of the model's size); charged: names of the constants that it was
    told of. holes: convolutions have been recognised whose zeros leave out channels or blocks. normalisation: of a network
    that is divided, what its parts do with the pixels that they get in place of its input (gkp.edge.divide)."""

    def __init__(self, model: onnx.ModelProto, budget: Budget | None = None) -> None:
        if not model.graph.node and not model.graph.output:
            raise FileError("the ONNX model has no graph", "check that the file is a complete .onnx file")
        self.budget = budget or Budget(model.ByteSize())
        shapes = inferred(_undeclared(model))
        try:
            self.gs = gs.import_onnx(model)
        except ERRORS as e:
            raise FileError(f"the ONNX graph is malformed: {first_line(e, 200)}", "check it with onnx.checker") from e
        made = {name for n in model.graph.node if n.domain != DOMAIN for name in n.output}
        outputs = {o.name for o in model.graph.output}
        for name, tensor in self.gs.tensors().items():
            if name in made and name not in outputs and isinstance(tensor, gs.Variable):
                tensor.shape = None
        self._tell(shapes)
        self.opsets = {entry.domain: entry.version for entry in model.opset_import}
        self.ir_version = model.ir_version
        self.metadata = {entry.key: entry.value for entry in model.metadata_props}
        for node in self.gs.nodes:
            if any(isinstance(value, gs.Graph) for value in node.attrs.values()):
                raise UnsupportedModelError(f"operator {node.op} holds a subgraph (control flow)",
                                            "export the model without If, Loop and Scan")
        for tensor in self.gs.tensors().values():  # lazily loaded values: read once, so that later edits are cheap
            if isinstance(tensor, gs.Constant):
                tensor.values = _frozen(tensor.values)
        self.charged: set[str] = set()
        self.holes = False
        self.normalisation: Normalisation | None = None
        self._count = 0
        self._taken = set(self.gs.tensors())
        self._removed: set[int] = set()
        for node in self.gs.nodes:
            node.name = node.name or self._name(node.op)

    def _tell(self, shapes: onnx.ModelProto) -> None:
        """Types and shapes that were inferred."""
        tensors = self.gs.tensors()
        for info in (*shapes.graph.value_info, *shapes.graph.output):
            tensor, found = tensors.get(info.name), OnnxImporter.import_tensor(info)
            if isinstance(tensor, gs.Variable) and found.dtype is not None:
                tensor.dtype, tensor.type = found.dtype, found.type
                tensor.shape = tensor.shape if found.shape is None else found.shape

    def infer(self) -> None:
        """Infer types and shapes again: constants have become known."""
        self._tell(inferred(self._skeleton()))

    def _skeleton(self) -> onnx.ModelProto:
        """The graph as a model in which large constants are inputs."""
        self.cleanup()
        large = [t for t in self.gs.tensors().values() if isinstance(t, gs.Constant) and t.values.nbytes > SMALL]
        kept, inputs = [t.values for t in large], self.gs.inputs
        try:
            for tensor, value in zip(large, kept, strict=True):
                tensor.to_variable(value.dtype, list(value.shape)).type = "tensor_type"
            self.gs.inputs = [*inputs, *large]
            return self._exported()
        finally:
            self.gs.inputs = inputs
            for tensor, value in zip(large, kept, strict=True):
                tensor.to_constant(value)

    # ---- reading ------------------------------------------------------------------------------------------------
    @property
    def nodes(self) -> list[Node]:
        """The nodes, as they stand now, in topological order after `cleanup`."""
        self._sweep()
        return list(self.gs.nodes)

    @property
    def inputs(self) -> list[Tensor]:
        return list(self.gs.inputs)

    @property
    def outputs(self) -> list[Tensor]:
        return list(self.gs.outputs)

    @property
    def opset(self) -> int:
        """Version of the standard operators."""
        return int(self.opsets.get("", 18))

    def is_output(self, tensor: Tensor) -> bool:
        return any(t is tensor for t in self.gs.outputs)

    def sole_consumer(self, tensor: Tensor) -> Node | None:
        """The only reader of the tensor, or None when there are several, or when it is a graph output."""
        return tensor.outputs[0] if len(tensor.outputs) == 1 and not self.is_output(tensor) else None

    def branched(self) -> Iterator[Node]:
        """The BranchedConv nodes."""
        return (n for n in self.nodes if is_branched(n))

    # ---- editing ------------------------------------------------------------------------------------------------
    def variable(self, hint: str, dtype: Any = np.float32, shape: Sequence[Any] | None = None) -> gs.Variable:
        """A new tensor with a unique name."""
        return gs.Variable(self._name(hint), dtype=dtype, shape=None if shape is None else list(shape))

    def constant(self, hint: str, values: Array) -> gs.Constant:
        """A new constant with a unique name."""
        return gs.Constant(self._name(hint), _frozen(values))

    def add(self, op: str, inputs: Sequence[Tensor], outputs: Sequence[Tensor], *, name: str = "",
            attrs: dict[str, Any] | None = None, domain: str | None = None) -> Node:
        """Append a node that produces `outputs` (detached from their former producer, if any)."""
        for tensor in outputs:
            tensor.inputs.clear()
        node = gs.Node(op, "", attrs or {}, list(inputs), list(outputs), domain=domain)
        self.gs.nodes.append(node)
        self.rename(node, name or self._name(op))
        return node

    def take(self, x: Tensor, index: Sequence[int], axis: int, hint: str = "taken", *, name: str = "") -> gs.Variable:
        """A new tensor of these elements of x along an axis: by a Slice where they are neighbours, else by a Gather."""
        y = self.variable(hint, x.dtype, None if x.shape is None else [*x.shape[:axis], len(index), *x.shape[axis + 1:]])
        first, end = int(index[0]), int(index[0]) + len(index)
        if np.array_equal(index, np.arange(first, end)):
            bounds = [self.constant("slice", np.array([v], np.int64)) for v in (first, end, axis)]
            self.add("Slice", [x, *bounds], [y], name=name)
        else:
            places = self.constant("index", np.asarray(index, np.int64))
            self.add("Gather", [x, places], [y], name=name, attrs={"axis": axis})
        return y

    def rename(self, node: Node, name: str) -> None:
        """Give a node a name; a number is appended when another node has it."""
        self.budget.steps(len(self.gs.nodes))
        taken = {n.name for n in self.nodes if n is not node}
        unique, number = name, 2
        while unique in taken:
            unique, number = f"{name}-{number}", number + 1
        node.name = unique

    def remove(self, node: Node) -> None:
        """Take a node out; its outputs lose their producer."""
        node.inputs.clear()
        node.outputs.clear()
        self._removed.add(id(node))

    def _sweep(self) -> None:
        """Removed nodes leave the list together, or each would take a turn through it."""
        if self._removed:
            self.gs.nodes = [n for n in self.gs.nodes if id(n) not in self._removed]
            self._removed = set()

    def discard(self, node: Node) -> None:
        """Take a node out if nobody reads what it makes, and then what only it needed."""
        ahead = [node]
        while ahead:
            node = ahead.pop()
            if id(node) in self._removed or any(t.outputs or self.is_output(t) for t in node.outputs):
                continue
            above = [made for t in node.inputs if (made := producer(t)) is not None]
            self.remove(node)
            ahead += above

    def redirect(self, old: Tensor, new: Tensor) -> None:
        """Every reader of `old` reads `new` instead. A graph output keeps its name (its producer changes)."""
        for consumer in list(old.outputs):
            for place, tensor in enumerate(consumer.inputs):
                if tensor is old:
                    consumer.inputs[place] = new
        if self.is_output(old):
            self._take_over(old, new)

    def _take_over(self, old: Tensor, new: Tensor) -> None:
        producers = list(new.inputs)
        if not producers or self.is_output(new) or any(t is new for t in self.gs.inputs):
            old.inputs.clear()
            self.add("Identity", [new], [old])
            return
        producer = producers[0]
        place = next(i for i, t in enumerate(producer.outputs) if t is new)
        old.inputs.clear()
        for consumer in list(new.outputs):
            for i, tensor in enumerate(consumer.inputs):
                if tensor is new:
                    consumer.inputs[i] = old
        producer.outputs[place] = old
        old.shape = new.shape if old.shape is None else old.shape

    def cleanup(self) -> None:
        """Drop what no output needs and sort topologically."""
        self._sweep()
        self.budget.steps(len(self.gs.nodes))
        try:
            self.gs.cleanup(remove_unused_node_outputs=False, remove_unused_graph_inputs=False).toposort()
        except Exception as e:  # the library raises its own untyped errors for cycles and duplicate names
            raise FileError(f"the ONNX graph is malformed: {first_line(e, 200)}", "check it with onnx.checker") from e

    def _name(self, hint: str) -> str:
        while True:
            self._count += 1
            name = f"gkp_{hint}_{self._count}"
            if name not in self._taken:
                self._taken.add(name)
                return name

    # ---- writing ------------------------------------------------------------------------------------------------
    def to_model(self) -> onnx.ModelProto:
        """The graph as a valid ONNX model: the source's opsets and ir_version, plus gkp's own domain where used."""
        self.cleanup()
        return self._exported()

    def _exported(self) -> onnx.ModelProto:
        opsets = dict(self.opsets)
        if any(n.domain == DOMAIN for n in self.gs.nodes):
            opsets[DOMAIN] = 1
        else:
            opsets.pop(DOMAIN, None)
        imports = [onnx.helper.make_opsetid(domain, version) for domain, version in opsets.items()]
        model = gs.export_onnx(self.gs, do_type_check=False, opset_imports=imports)
        model.ir_version = max(self.ir_version, 8)
        model.producer_name = "gkp"
        model.producer_version = ""
        del model.metadata_props[:]
        onnx.helper.set_model_props(model, self.metadata)
        return model

    def copy(self) -> Graph:
        """An independent copy; the values of constants are shared (no pass changes an array in place)."""
        self.cleanup()
        twin = copy.copy(self)
        twin.gs = self.gs.copy()
        twin.opsets, twin.metadata, twin._taken = dict(self.opsets), dict(self.metadata), set(self._taken)
        twin.charged, twin._removed = set(), set()
        return twin


def _undeclared(model: onnx.ModelProto) -> onnx.ModelProto:
    """The skeleton without the shapes that the file claims for tensors, which are inferred instead. Those of gkp's own
    operator stay, which onnx.shape_inference does not know."""
    structure = skeleton(model)
    own = {name for n in model.graph.node if n.domain == DOMAIN for name in n.output}
    kept = [v for v in structure.graph.value_info if v.name in own]
    structure.graph.ClearField("value_info")
    structure.graph.value_info.extend(kept)
    for output in structure.graph.output:
        if output.name not in own:
            output.type.tensor_type.ClearField("shape")
    return structure


def _frozen(array: Any) -> Array:
    """The array, contiguous and read-only: graphs share the values of constants."""
    frozen: Array = np.asarray(array, order="C").view()
    frozen.flags.writeable = False
    return frozen


def is_branched(node: Node) -> bool:
    """Is the node a gkp::BranchedConv?"""
    return bool(node.op == "BranchedConv" and node.domain == DOMAIN)


def values(tensor: Tensor) -> Array | None:
    """The value of a constant tensor, None for a variable."""
    return np.asarray(tensor.values) if isinstance(tensor, gs.Constant) else None


def weights(tensor: Tensor) -> Array | None:
    """As `values`, also of a constant that is dequantised with zero points of 0 (see the pass lift_quantisers)."""
    node = producer(tensor)
    if node is None or node.op != "DequantizeLinear" or node.domain:
        return values(tensor)
    integers, scale, *zero = (values(t) for t in node.inputs)
    if integers is None or scale is None or any(z is None or z.any() for z in zero):
        return None
    shape, axis = [1] * integers.ndim, int(node.attrs.get("axis", 1))
    if scale.size > 1:
        if not 0 <= axis < integers.ndim or integers.shape[axis] != scale.size:
            return None
        shape[axis] = scale.size
    return integers.astype(np.float32) * np.asarray(scale, np.float32).reshape(shape)


def producer(tensor: Tensor) -> Node | None:
    """The node that computes the tensor, None for inputs and constants."""
    return tensor.inputs[0] if tensor.inputs else None


def channels(tensor: Tensor) -> int | None:
    """Static number of channels (axis 1), or None."""
    shape = tensor.shape
    return int(shape[1]) if shape is not None and len(shape) >= 2 and isinstance(shape[1], int) else None


def spatial(tensor: Tensor) -> tuple[int, ...] | None:
    """Static spatial shape (axes 2 and on), or None when any of it is dynamic or unknown."""
    shape = tensor.shape
    if shape is None or len(shape) < 3 or not all(isinstance(n, int) for n in shape[2:]):
        return None
    return tuple(int(n) for n in shape[2:])


def with_channels(shape: Sequence[Any] | None, n: int) -> list[Any] | None:
    """The shape with n channels."""
    return None if shape is None else [shape[0], n, *shape[2:]]


def all_constant(tensors: Iterable[Tensor]) -> bool:
    return all(isinstance(t, gs.Constant) for t in tensors)
