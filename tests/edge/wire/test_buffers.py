"""Memory is lent again when nobody refers to it any more, and never before."""

from __future__ import annotations

import gc

import numpy as np
import pytest

from gkp.edge.wire.buffers import Buffers

SIZE = 100_000


@pytest.mark.parametrize("keep", [
    lambda b: b, lambda b: b.view(np.float32), lambda b: b.view(np.float32).reshape(-1, 5)[::2], memoryview,
    lambda b: np.frombuffer(memoryview(b), np.uint16), lambda b: [b.view(np.int64)]])
def test_what_anybody_refers_to_is_not_lent_again_and_the_rest_is(keep: object) -> None:
    buffers = Buffers()
    kept = keep(buffers.lend(SIZE))  # type: ignore[operator]
    other = buffers.lend(SIZE)
    assert not np.shares_memory(other, np.asarray(kept[0] if isinstance(kept, list) else kept))
    address = other.ctypes.data
    del other
    gc.collect()
    assert buffers.lend(SIZE).ctypes.data == address
    del kept


def test_only_so_much_is_kept() -> None:
    buffers = Buffers(most=3 * SIZE)
    lent = [buffers.lend(SIZE) for _ in range(10)]
    assert len({b.ctypes.data for b in lent}) == 10
    assert buffers.kept == 3 * SIZE
    del lent
    assert [buffers.lend(100).size, buffers.lend(SIZE).size] == [100, SIZE]
    assert buffers.kept == 3 * SIZE
