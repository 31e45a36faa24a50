"""How values travel between devices: numbers of a grid come back to the bit, others as they are or rounded."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gkp.edge.device.encoding import packed, unpacked, wire_dtype
from gkp.edge.plan.schema import WIRES, Grid, Value


def value(grid: Grid | None = None, dtype: str = "float32") -> Value:
    return Value(name="v1", tensor="t", shape=[1, 256], dtype=dtype, producer=0, grid=grid)


@given(st.floats(2.0**-100, 2.0**100, width=32), st.integers(0, 255))
@settings(max_examples=200, deadline=None)
def test_numbers_of_a_grid_come_back_to_the_bit(scale: float, zero: int) -> None:
    numbers = ((np.arange(256, dtype=np.float32) - np.float32(zero)) * np.float32(scale)).reshape(1, 256)
    mine = value(Grid(scale=scale, zero=zero))
    travels = packed(mine, "int8", numbers)
    assert (travels.dtype, travels.nbytes) == (np.uint8, 256)
    np.testing.assert_array_equal(unpacked(mine, travels), numbers)


@pytest.mark.parametrize("wire", WIRES)
def test_what_has_no_grid_travels_as_the_plan_says(wire: str) -> None:
    numbers = np.linspace(-3, 3, 256, dtype=np.float32).reshape(1, 256)
    travels = packed(value(), wire, numbers)
    assert travels.dtype == wire_dtype(value(), wire) == ("float16" if wire == "float16" else "float32")
    np.testing.assert_allclose(unpacked(value(), travels), numbers, atol=2e-3 if wire == "float16" else 0)
    whole = np.arange(256).reshape(1, 256)
    assert packed(value(dtype="int64"), wire, whole) is whole
