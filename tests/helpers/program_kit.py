"""Programs of models, compared with the models."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import onnx
from interpret import interpret
from onnx_kit import assert_close, feeds_of, run_ort

from gkp.converter.graph import Graph
from gkp.converter.native.program import Copy, Paste, Program, Step, reads
from gkp.converter.native.reading.frontend import Translation, Unsupported, program
from gkp.converter.native.reading.fuse import fuse
from gkp.converter.recognise import recognise, simplify


def one_form_graph(model: onnx.ModelProto) -> Graph:
    """What the frontend is given."""
    return simplify(recognise(Graph(model)))


def unsupported(graph: Graph) -> list[Unsupported]:
    """The operators without a kernel, in the order of the graph; those that read a strange input among them."""
    translation = Translation(graph)
    translation.run()
    return translation.refused


def kinds(steps: Program) -> Counter[str]:
    """How many steps of each kind."""
    return Counter(type(step).__name__ for step in steps.steps)


def only(found: Program, kind: type[Any]) -> Any:
    """The only step of this kind."""
    (step,) = [s for s in found.steps if isinstance(s, kind)]
    return step


def check_program(found: Program) -> None:
    """Every value is written once and before it is read, numbers are in use, each output has a value of its own."""
    filled: dict[int, np.ndarray[Any, Any]] = {p.value: np.ones(_shape(found, p.value), int) for p in found.inputs}
    for step in found.steps:
        assert all((filled[v] == 1).all() for v in reads(step)), step
        written = filled.setdefault(step.target, np.zeros(_shape(found, step.target), int))
        written[_written(found, step)] += 1
    outputs = [p.value for p in found.outputs]
    assert all((elements == 1).all() for elements in filled.values())
    assert all(v in filled for v in outputs)
    assert len({*outputs, *(p.value for p in found.inputs)}) == len(outputs) + len(found.inputs)
    for port in (*found.inputs, *found.outputs):
        assert int(np.prod(port.shape)) == found.values[port.value].size


def _shape(found: Program, value: int) -> tuple[int, int, int]:
    return found.values[value].channels, found.values[value].height, found.values[value].width


def _written(found: Program, step: Step) -> tuple[slice, ...]:
    if isinstance(step, Paste):
        small = found.values[step.source]
        return (slice(None), *(slice(o, o + n) for o, n in zip(step.offset, (small.height, small.width), strict=True)))
    return (slice(step.first, step.first + step.index.size),) if isinstance(step, Copy) else (slice(None),)


def translated(model: onnx.ModelProto, *, batch: int = 3, tol: float = 2e-5) -> Program:
    """The fused program of a model, after it and the unfused one were compared with ONNX Runtime on the model as it is."""
    feeds = feeds_of(model, batch)
    want = run_ort(model, feeds)
    plain = program(one_form_graph(model))
    fused = fuse(plain)
    check_program(plain)
    check_program(fused)
    assert set(range(len(fused.values))) == {p.value for p in fused.inputs} | {s.target for s in fused.steps}
    for found, where in ((plain, "unfused"), (fused, "fused")):
        assert [p.name for p in found.inputs] == [i.name for i in model.graph.input]
        assert [p.name for p in found.outputs] == [o.name for o in model.graph.output]
        for double in (False, True):
            got = interpret(found, [feeds[p.name] for p in found.inputs], double=double)
            assert_close(got, want, where, tol)
    return fused
