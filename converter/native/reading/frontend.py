"""From an ONNX graph in the one form to the program that the native compiler compiles."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from gkp.converter.graph import Graph, Node, Tensor, is_branched, producer, values
from gkp.converter.native.dtypes import UINT8
from gkp.converter.native.program import Copy, Port, Program
from gkp.converter.native.reading.builder import Builder, View, dtype_of
from gkp.converter.native.reading.moves import Refused, is_move
from gkp.converter.native.reading.operators import operator_of
from gkp.errors import UnsupportedModelError, UsageError
from gkp.text import clean

HINT = "--hybrid runs those parts with ONNX Runtime between native ones; --target ort runs the whole model with it"


@dataclass(frozen=True)
class Unsupported:
    """An operator that the native kernels do not run. name: the node's name in the graph; operator: "Op" or
    "domain::Op"; follows: only because what it reads is unknown, not for its own sake."""

    name: str
    operator: str
    reason: str
    follows: bool = False


def program(graph: Graph) -> Program:
    """The program that computes the graph for one image. The graph is one that gkp.converter.recognise.simplify gives,
    with static shapes except perhaps the batch.

    One step per operator, nothing fused (see fuse). Every output is a value of its own that a step writes. Raises
    UnsupportedModelError that names all operators without a kernel, UsageError for dynamic sizes other than the batch."""
    translation = Translation(graph)
    translation.check_inputs()
    translation.run()
    return translation.program()


def _message(refused: Sequence[Unsupported]) -> str:
    shown = []
    for operator in dict.fromkeys(u.operator for u in refused if not u.follows):
        same = [u for u in refused if u.operator == operator and not u.follows]
        count = f"{len(same)} nodes, the first is " if len(same) > 1 else ""
        shown.append(f"{operator} ({count}{clean(same[0].name)}: {same[0].reason})")
    return f"the native kernels do not run {', '.join(shown)}"


class Translation:
    """One pass over the graph. An operator that is refused is noted, and what it computes is taken for granted, so that
    the rest can be looked at."""

    def __init__(self, graph: Graph) -> None:
        graph.cleanup()
        self.graph = graph
        self.refused: list[Unsupported] = []
        batch = graph.inputs[0].shape[0] if graph.inputs and graph.inputs[0].shape else None
        self.builder = Builder(batch if isinstance(batch, int) else None)
        self.inputs: list[Port] = []
        self.strange = [t for t in graph.inputs if not self._input(t)]

    def run(self) -> None:
        for node in self.graph.nodes:
            while not self._translate(node):
                pass
        refused = {u.name for u in self.refused}
        for tensor in self.graph.outputs:
            node = producer(tensor)
            if node is None or node.name not in refused:
                self._try(partial(self._output, tensor), node)

    @property
    def complete(self) -> bool:
        """Can kernels run all of it?"""
        return not self.strange and not self.refused

    def check_inputs(self) -> None:
        """UnsupportedModelError for an input that no kernel can read."""
        if self.strange:
            first = self.strange[0]
            raise UnsupportedModelError(f"input {clean(first.name)} is {first.dtype} {first.shape}",
                                        "the native target wants float32 whose first axis is the batch, "
                                        "the same for all inputs; use --target ort")

    def program(self) -> Program:
        """What was translated. UnsupportedModelError that names all operators without a kernel."""
        self.check_inputs()
        if self.refused:
            raise UnsupportedModelError(_message(self.refused), HINT)
        b = self.builder
        ports: list[Port] = []
        for tensor in self.graph.outputs:
            number = b.number(tensor)
            if any(port.value == number for port in (*self.inputs, *ports)):  # an output has a value of its own
                value = b.values[number]
                own = b.value((value.channels, value.height, value.width), value.dtype)
                b.steps.append(Copy(number, own, np.arange(value.channels)))
                number = own
            ports.append(Port(tensor.name, number, b.shape(tensor), b.values[number].dtype))
        return Program(tuple(b.values), tuple(b.steps), tuple(self.inputs), tuple(ports))

    def _input(self, tensor: Tensor) -> bool:
        """Make a port of an input; False when it is nothing that the kernels can read."""
        shape = tuple((tensor.shape or ())[1:])
        if not all(isinstance(n, int) for n in shape):
            raise UsageError(f"input {clean(tensor.name)} has a dynamic axis besides the batch",
                             "say the size with --input-shape, e.g. 1,3,224,224; or use --target ort or openvino")
        fits = self._assume(tensor)
        if fits:
            self.inputs.append(Port(tensor.name, self.builder.number(tensor), shape, dtype_of(tensor)))
        return fits

    def _output(self, tensor: Tensor) -> int:
        if tensor.dtype == UINT8.numpy:
            raise Refused("an output of uint8")
        return self.builder.number(tensor)

    def _translate(self, node: Node) -> bool:
        def one() -> None:
            if is_move(node):
                self.builder.move(node)
            elif any(t.dtype == UINT8.numpy and values(t) is None for t in node.inputs):
                raise Refused("it computes with uint8")
            else:
                operator_of(node)(self.builder, node)

        return self._try(one, node)

    def _try(self, action: Callable[[], object], node: Node | None) -> bool:
        """Do it; False when it has to be done again, because an operator before this one is refused for it."""
        try:
            action()
        except Refused as refusal:
            culprit = refusal.node or node
            if culprit is None:
                raise UnsupportedModelError("an output of the model does not depend on its input",
                                            "leave it out of the model, or use --target ort") from refusal
            self._refuse(culprit, refusal)
            return culprit is node
        return True

    def _refuse(self, node: Node, refusal: Refused) -> None:
        operator = node.op if not node.domain or is_branched(node) else f"{node.domain}::{node.op}"
        self.refused.append(Unsupported(node.name, clean(operator), refusal.reason, refusal.follows))
        for tensor in node.outputs:
            self._assume(tensor)

    def _assume(self, tensor: Tensor) -> bool:
        """Bind the tensor to a value that no step writes, if its declared shape and type allow."""
        shape = tensor.shape
        static = shape is not None and len(shape) > 0 and all(isinstance(n, int) for n in shape[1:])
        view = None
        if static and self.builder.batch == (shape[0] if isinstance(shape[0], int) else None):
            try:
                inner = tuple(int(n) for n in shape[1:])
                dtype_of(tensor)
                view = View(inner, self.builder.value(inner))
            except Refused:
                pass
        self.builder.bind(tensor, view)
        return view is not None
