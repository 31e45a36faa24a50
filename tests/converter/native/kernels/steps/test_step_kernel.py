"""What holds for the kernels of all steps."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from gkp.converter.native.building import toolchain
from gkp.converter.native.kernels.cpu import CPUS
from gkp.converter.native.kernels.kernel import FUNCTION
from gkp.converter.native.kernels.layout import channels_last, planar
from gkp.converter.native.kernels.prelude import prelude
from gkp.converter.native.kernels.steps import SimpleStep, convert, space_to_depth, step_kernel
from gkp.converter.native.kernels.steps.convert import contiguous
from gkp.converter.native.program import (
    Activation,
    Affine,
    Binary,
    Copy,
    Depthwise,
    Map,
    Normalise,
    Permute,
    Pool,
    PRelu,
    Reduce,
    Reshape,
    Softmax,
    Value,
)


@pytest.mark.skipif(shutil.which("nm") is None, reason="nm (binutils) lists the symbols")
def test_kernels_call_nothing_but_memory_functions(tmp_path: Path) -> None:
    cpu = CPUS["x86-64-v3"]
    v = Value(20, 9, 9)
    a, one = planar(v, (1, 1, 1, 1), cpu.lanes), channels_last(Value(20, 1, 1), lanes=cpu.lanes)
    kernels = [
        step_kernel(Softmax(0, 1), [v, v], {0: a, 1: a}, cpu),
        step_kernel(Affine(0, 1, np.ones(20, np.float32), np.ones(20, np.float32), Activation.SILU), [v, v], {0: a, 1: a}, cpu),
        step_kernel(Normalise(0, 1, 1e-5, np.ones(20, np.float32), np.ones(20, np.float32)), [v, v], {0: a, 1: a}, cpu),
        step_kernel(Map(0, 1, "sqrt"), [v, v], {0: a, 1: a}, cpu),
        step_kernel(Affine(0, 1, np.ones(20, np.float32), np.ones(20, np.float32), Activation.GELU), [v, v], {0: a, 1: a}, cpu),
        step_kernel(Pool(0, 1, False, (3, 3), (1, 1), (1, 1, 1, 1)), [v, v], {0: a, 1: a}, cpu),
        step_kernel(Pool(0, 1, True, (9, 9), (1, 1), (0, 0, 0, 0)), [v, one.value], {0: a, 1: one}, cpu),
    ]
    (tmp_path / "gkp.h").write_text(prelude(cpu))
    for n, kernel in enumerate(kernels):
        (tmp_path / f"k{n}.cpp").write_text(kernel.source.replace(FUNCTION, f"k{n}"))
    objects = toolchain.compile_objects(tmp_path, [f"k{n}.cpp" for n in range(len(kernels))], cpu)
    library = toolchain.link(tmp_path, objects, cpu)
    listed = subprocess.run(["nm", "-D", "--undefined-only", library], capture_output=True, text=True, check=True).stdout
    assert {line.split()[-1].split("@")[0] for line in listed.splitlines()} <= {"memcpy", "memset", "memmove"}


_A, _B, _C = (contiguous(Value(*s)) for s in ((4, 5, 6), (4, 6, 5), (2, 1, 1)))
_ONES = np.ones(4, np.float32)
_WRONG: dict[str, SimpleStep] = {
    "reshape": Reshape(0, 2), "copy": Copy(0, 1, np.arange(4)), "binary": Binary(0, 1, 0, "add"),
    "affine": Affine(0, 0, _ONES[:2], _ONES), "softmax": Softmax(0, 1), "pool": Pool(0, 2, True, (5, 6), (1, 1), (0,) * 4),
    "reduce": Reduce(0, 1, "sum", 2), "normalise": Normalise(0, 0, 1e-5, _ONES[:2], _ONES), "prelu": PRelu(0, 0, _ONES[:2]),
    "map": Map(0, 1, "abs"), "permute": Permute(0, 1, (1, 0, 2)),
    "depthwise": Depthwise(0, 2, _ONES.reshape(4, 1, 1), _ONES, (1, 1), (0,) * 4, (1, 1))}


@pytest.mark.parametrize("name", _WRONG)
def test_values_that_do_not_fit_a_step_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=r"\d"):
        step_kernel(_WRONG[name], [a.value for a in (_A, _B, _C)], {0: _A, 1: _B, 2: _C}, CPUS["x86-64-v3"])


def test_layouts_of_other_values_are_refused() -> None:
    cpu = CPUS["x86-64-v3"]
    with pytest.raises(ValueError, match="another shape"):
        step_kernel(Reshape(0, 1), [_A.value, _A.value], {0: _A, 1: _B}, cpu)
    with pytest.raises(ValueError, match="cannot convert"):
        convert(_A, _B, cpu)
    with pytest.raises(ValueError, match="polyphase"):
        space_to_depth(_A, _B, (2, 2), (0, 0), cpu)
