"""movement() sees through every way of moving channels, and is not fooled by what only looks like it."""

import time
from collections.abc import Callable

import numpy as np
import pytest
from net_blocks import index_add, option_a, shuffle
from onnx import TensorProto
from onnx_kit import Net

from gkp.converter.graph import Graph
from gkp.converter.movement import Movement, movement, obstacle, walk
from gkp.errors import UnsafeFileError

C, H, W = 6, 4, 5
PERM = [1, 0, 2, 3]


def seen(net: Net, y: str, through_adds: bool = True) -> Movement | None:
    graph = Graph(net.model(y))
    return movement(graph, walk(graph, graph.outputs[0], through_adds=through_adds))


def selection(net: Net, y: str) -> list[int]:
    """The channels of x that y selects."""
    found = seen(net, y)
    assert found is not None
    (term,) = found.terms
    assert term.base.name == "x"
    assert set(term.strides) == {1}
    return term.index.tolist()


def split(net: Net, part: int) -> str:
    return str(net.op("Split", "x", net.ints(1, 2, 3), outputs=3, axis=1)[part])


def slice_(net: Net, start: int, end: int, step: int = 1, axis: int = 1, x: str = "x") -> str:
    return str(net.op("Slice", x, net.ints(start), net.ints(end), net.ints(axis), net.ints(step)))


def gather_elements(net: Net) -> str:
    index = np.broadcast_to(np.reshape([4, 0, 4], (1, 3, 1, 1)), (2, 3, H, W))
    return str(net.op("GatherElements", "x", net.const(index, np.int64), axis=1))


def gather_nd(net: Net) -> str:
    y = net.op("GatherND", net.op("Transpose", "x", perm=PERM), net.const([[5], [1]], np.int64))
    return str(net.op("Transpose", y, perm=PERM))


def zeros(net: Net, channels: int) -> str:
    return net.const(np.zeros((2, channels, H, W), np.float32))


def scatter_into_zeros(net: Net) -> str:
    index = np.broadcast_to(np.reshape([3, 0, 1, 4, 5, 6], (1, C, 1, 1)), (2, C, H, W))
    return str(net.op("ScatterElements", zeros(net, 8), net.const(index, np.int64), "x", axis=1))


def scatter_nd_into_zeros(net: Net) -> str:
    data = net.const(np.zeros((8, 2, H, W), np.float32))
    y = net.op("ScatterND", data, net.const(np.reshape([3, 0, 1, 4, 5, 6], (-1, 1)), np.int64),
               net.op("Transpose", "x", perm=PERM))
    return str(net.op("Transpose", y, perm=PERM))


IDIOMS: list[tuple[str, Callable[[Net], str], list[int]]] = [
    ("gather", lambda n: n.take("x", [5, 0, 0]), [5, 0, 0]),
    ("gather-negative", lambda n: n.take("x", [-1, 2]), [5, 2]),
    ("gather-elements", gather_elements, [4, 0, 4]),
    ("gather-nd", gather_nd, [5, 1]),
    ("split", lambda n: split(n, 1), [1, 2]),
    ("split-last", lambda n: split(n, 2), [3, 4, 5]),
    ("slice", lambda n: slice_(n, 2, 5), [2, 3, 4]),
    ("slice-step", lambda n: slice_(n, 1, 99, 2), [1, 3, 5]),
    ("slice-negative-bounds", lambda n: slice_(n, -3, -1), [3, 4]),
    ("slice-backwards", lambda n: slice_(n, -1, -99, -2), [5, 3, 1]),
    ("shuffle-2", lambda n: shuffle(n, "x", (2, C, H, W), 2), [0, 3, 1, 4, 2, 5]),
    ("shuffle-3", lambda n: shuffle(n, "x", (2, C, H, W), 3), [0, 2, 4, 1, 3, 5]),
    ("concat-zeros", lambda n: n.concat(zeros(n, 1), "x", zeros(n, 2)), [-1, *range(C), -1, -1]),
    ("concat-itself", lambda n: n.concat("x", "x"), [*range(C), *range(C)]),
    ("pad", lambda n: n.op("Pad", "x", n.ints(0, 1, 0, 0, 0, 2, 0, 0)), [-1, *range(C), -1, -1]),
    ("scatter-elements", scatter_into_zeros, [1, 2, -1, 0, 3, 4, 5, -1]),
    ("scatter-nd", scatter_nd_into_zeros, [1, 2, -1, 0, 3, 4, 5, -1]),
    ("times-zero", lambda n: n.concat("x", n.op("Mul", "x", n.const(np.float32(0)))), [*range(C), *[-1] * C]),
    ("squeeze", lambda n: n.op("Squeeze", n.op("Unsqueeze", n.take("x", [2]), n.ints(4)), n.ints(4)), [2]),
    ("gather-slice-concat", lambda n: n.concat(slice_(n, 0, 2, x=n.take("x", [3, 1, 2])), split(n, 0)), [3, 1, 0]),
    ("sum-of-disjoint", lambda n: n.op("Add", n.op("Pad", slice_(n, 0, 1), n.ints(0, 0, 0, 0, 0, 1, 0, 0)),
                                       n.op("Pad", slice_(n, 3, 4), n.ints(0, 1, 0, 0, 0, 0, 0, 0))), [0, 3]),
]


@pytest.mark.parametrize(("build", "want"), [i[1:] for i in IDIOMS], ids=[i[0] for i in IDIOMS])
def test_idiom_is_a_selection_of_channels(build: Callable[[Net], str], want: list[int]) -> None:
    net = Net(2, C, H, W)
    assert selection(net, build(net)) == want


@pytest.mark.parametrize("shape", [(2, C, 7), (1, C, 3, 4, 5)])
def test_one_and_three_spatial_axes(shape: tuple[int, ...]) -> None:
    net = Net(*shape)
    assert selection(net, shuffle(net, net.take("x", [5, 4, 3, 2, 1, 0]), shape)) == [5, 2, 4, 1, 3, 0]


def test_dynamic_batch_is_seen_through() -> None:
    net = Net("N", C, H, W)
    y = net.op("Reshape", net.take("x", [5, 4, 3, 2, 1, 0]), net.ints(-1, 2, 3, H, W))
    y = net.op("Reshape", net.op("Transpose", y, perm=[0, 2, 1, 3, 4]), net.ints(0, C, H, W))
    assert selection(net, net.op("Reshape", y, net.ints(-1, C, H, W))) == [5, 2, 4, 1, 3, 0]


@pytest.mark.parametrize("opset", [9, 11, 13])
def test_older_operator_sets_keep_their_own_meaning(opset: int) -> None:
    net = Net(2, C, H, W, opset=opset)
    if opset == 9:
        y = net.op("Slice", "x", axes=[1], starts=[2], ends=[4])
    elif opset == 11:
        y = net.op("Split", "x", outputs=2, axis=1, split=[2, 4])[1]
        y = net.op("Squeeze", net.op("Unsqueeze", y, axes=[1]), axes=[1])
        y = net.op("Slice", y, net.ints(0), net.ints(2), net.ints(1))
    else:
        y = net.op("Split", "x", net.ints(2, 2, 2), outputs=3, axis=1)[1]
    assert selection(net, y) == [2, 3]


def test_option_a_shortcut_is_strided_with_zero_channels() -> None:
    net = Net(2, C, 8, 8)
    found = seen(net, option_a(net, "x", C))
    assert found is not None
    (term,) = found.terms
    assert term.strides == (2, 2)
    assert term.index.tolist() == [*range(C), *[-1] * C]


@pytest.mark.parametrize("how", ["elements", "nd"])
def test_index_add_into_a_residual_is_a_sum_of_two_selections(how: str) -> None:
    net = Net(2, C, H, W)
    y = net.relu(net.take("x", [0, 1, 2]))
    if how == "nd":
        total = index_add(net, "x", [4, 0, 3], y, "nd")
    else:  # the index as it is after constant folding
        index = np.broadcast_to(np.reshape([4, 0, 3], (1, 3, 1, 1)), (2, 3, H, W))
        total = net.op("ScatterElements", "x", net.const(index, np.int64), y, axis=1, reduction="add")
    found = seen(net, total)
    assert found is not None
    assert found.adds == 1
    by_base = {t.base.name: t for t in found.terms}
    assert by_base["x"].is_identity
    assert by_base[y].index.tolist() == [1, -1, -1, 2, 0, -1]


def test_additions_are_bases_unless_asked_for() -> None:
    net = Net(2, C, H, W)
    total = net.op("Add", net.take("x", [1, 0, 2, 3, 4, 5]), net.relu("x"))
    graph = Graph(net.model(net.take(total, [0])))
    (term,) = movement(graph, walk(graph, graph.outputs[0])).terms
    assert term.base.name == total
    assert len(movement(graph, walk(graph, graph.outputs[0], through_adds=True)).terms) == 2


def test_what_else_reads_the_nodes_is_reported() -> None:
    net = Net(2, C, H, W)
    a, b = net.op("Split", "x", net.ints(2, 4), outputs=2, axis=1)
    graph = Graph(net.model(net.concat(a, a), net.relu(b)))
    found = movement(graph, walk(graph, graph.outputs[0]))
    assert [t.name for t in found.side_outputs] == [b]


def flip(net: Net, axis: int) -> str:
    return str(net.op("Gather", "x", net.const(np.arange((2, C, H, W)[axis])[::-1]), axis=axis))


NOT_CHANNELS: list[tuple[str, Callable[[Net], str]]] = [
    ("rows-reversed", lambda n: flip(n, 2)),
    ("columns-reversed", lambda n: flip(n, 3)),
    ("batch-reversed", lambda n: flip(n, 0)),
    ("part-of-the-batch", lambda n: slice_(n, 0, 1, axis=0)),
    ("rows-and-columns-swapped", lambda n: n.op("Transpose", "x", perm=[0, 1, 3, 2])),
    ("batch-and-channels-swapped", lambda n: n.op("Transpose", "x", perm=PERM)),
    ("shifted-down", lambda n: n.op("Pad", slice_(n, 0, 3, axis=2), n.ints(0, 0, 1, 0, 0, 0, 0, 0))),
    ("cropped", lambda n: slice_(n, 1, 4, axis=2)),
    ("every-second-from-1", lambda n: slice_(n, 1, 4, 2, axis=2)),
    ("border", lambda n: n.op("Pad", "x", n.ints(0, 0, 1, 1, 0, 0, 1, 1))),
    ("pad-with-ones", lambda n: n.op("Pad", "x", n.ints(0, 1, 0, 0, 0, 0, 0, 0), n.const(np.float32(1)))),
    ("pad-reflected", lambda n: n.op("Pad", "x", n.ints(0, 1, 0, 0, 0, 0, 0, 0), mode="reflect")),
    ("batch-into-channels", lambda n: n.op("Reshape", "x", n.ints(1, 2 * C, H, W))),
    ("rows-into-channels", lambda n: n.op("Reshape", "x", n.ints(2, C * 2, H // 2, W))),
    ("channels-mixed-with-rows", lambda n: n.op("Reshape", n.op("Transpose", "x", perm=[0, 2, 1, 3]),
                                               n.ints(2, C, H, W))),
    ("index-from-data", lambda n: n.op("Gather", "x", n.op("Cast", n.op("ReduceMax", "x", keepdims=0), to=7), axis=1)),
    ("added-to-itself", lambda n: n.op("Add", "x", "x")),
    ("sum-of-two-channels", lambda n: n.op("Add", n.take("x", [5]), n.take("x", [4]))),
    ("overlapping-sum", lambda n: n.op("Add", n.take("x", [0, 1]), n.take("x", [1, 2]))),
    ("added-constant", lambda n: n.op("Add", n.take("x", [0]), n.const(np.float32(1)))),
    ("with-constant-ones", lambda n: n.concat("x", n.const(np.ones((2, 1, H, W), np.float32)))),
    ("times-two", lambda n: n.op("Mul", "x", n.const(np.float32(2)))),
    ("pool-of-two", lambda n: n.op("MaxPool", "x", kernel_shape=[2, 2], strides=[2, 2])),
    ("scatter-max", lambda n: n.op("ScatterElements", n.const(np.zeros((2, C, H, W), np.float32)),
                                   n.const(np.zeros((2, C, H, W), np.int64)), "x", axis=1, reduction="max")),
    ("nothing-moved", lambda n: n.relu("x")),
]


@pytest.mark.parametrize("build", [n[1] for n in NOT_CHANNELS], ids=[n[0] for n in NOT_CHANNELS])
def test_other_operations_are_no_selection(build: Callable[[Net], str]) -> None:
    net = Net(2, C, H, W)
    found = seen(net, build(net))
    assert found is None or all(t.base.name != "x" for t in found.terms)


def test_a_constant_of_ones_is_not_mistaken_for_a_channel_of_one_pixel() -> None:
    net = Net(1, C, 1, 1)
    assert seen(net, net.concat("x", net.const(np.ones((1, 1, 1, 1), np.float32)))) is None


@pytest.mark.parametrize("dtype", [TensorProto.FLOAT16, TensorProto.UINT8])
def test_many_channels_of_a_narrow_type_are_told_apart(dtype: int) -> None:
    net = Net(1, 4100, 2, 2, dtype=dtype)
    index = np.random.default_rng(0).permutation(4100)
    zeros = net.const(np.zeros((1, 4100, 2, 2), net.numpy))
    rows = np.broadcast_to(np.argsort(index).reshape(1, -1, 1, 1), (1, 4100, 2, 2))
    assert selection(net, net.take("x", index)) == index.tolist()
    assert selection(net, net.op("ScatterElements", zeros, net.const(rows, np.int64), "x", axis=1)) == index.tolist()


def test_pixels_of_a_narrow_type_are_told_apart() -> None:
    net = Net(1, 2, 64, 64, dtype=TensorProto.FLOAT16)
    swapped = np.arange(64)
    swapped[[62, 63]] = 63, 62
    assert seen(net, net.op("Gather", "x", net.const(swapped), axis=3)) is None


def test_a_huge_detour_is_not_run() -> None:
    net = Net(1, 2, 4, 4)
    big = net.op("Pad", "x", net.ints(0, 0, 0, 0, 0, 10**8, 0, 0))
    assert seen(net, slice_(net, 0, 2, x=big)) is None


# ---- many nodes ---------------------------------------------------------------------------------------------------
def test_a_very_long_chain_is_followed_to_its_end() -> None:
    net, x = Net(1, 2, 4, 4), "x"
    for _ in range(1000):
        x = net.op("Transpose", x, perm=[0, 1, 3, 2])
    assert selection(net, x) == [0, 1]


def test_thousands_of_pieces_are_one_selection() -> None:
    net, rng = Net(1, 64, 2, 2), np.random.default_rng(0)
    starts, widths = rng.integers(0, 60, 2000), rng.integers(1, 5, 2000)
    y = net.concat(*(slice_(net, int(a), int(a + n)) for a, n in zip(starts, widths, strict=True)))
    assert selection(net, y) == [c for a, n in zip(starts, widths, strict=True) for c in range(a, a + n)]


def test_pieces_that_are_appended_one_by_one_are_one_selection() -> None:
    net, rng = Net(1, C, 2, 2), np.random.default_rng(0)
    index, y = rng.integers(0, C, 500).tolist(), ""
    for c in index:
        piece = slice_(net, c, c + 1)
        y = net.concat(y, piece) if y else piece
    assert selection(net, y) == index


def test_channels_of_many_tensors_are_told_apart() -> None:
    net = Net(2, C, H, W)
    parts = [net.relu("x") for _ in range(300)]
    found = seen(net, net.concat(*(slice_(net, k % C, k % C + 1, x=p) for k, p in enumerate(parts))))
    assert found is not None
    assert {t.base.name: (np.flatnonzero(t.index >= 0).tolist(), t.index.max()) for t in found.terms} == {
        p: ([k], k % C) for k, p in enumerate(parts)}


def test_sums_of_hundreds_of_tensors_are_left_alone() -> None:
    net = Net(2, C, H, W)
    total = "x"
    for _ in range(200):
        total = net.op("Add", total, net.relu("x"))
    graph = Graph(net.model(total))
    way = walk(graph, graph.outputs[0], through_adds=True)
    assert way is not None
    assert movement(graph, way) is None
    assert obstacle(way) == "200 nodes move and add up 201 tensors"


def test_memory_for_results_that_are_there_at_once_is_charged_before_it_is_taken() -> None:
    net = Net(1, 4, 1024, 1024)
    total = "x"
    for _ in range(50):  # each turned one waits for the sum on its right
        total = net.op("Add", net.op("Transpose", "x", perm=[0, 1, 3, 2]), total)
    with pytest.raises(UnsafeFileError, match="bytes to be made"):
        seen(net, total)


def test_time_is_up_in_the_middle_of_a_movement(monkeypatch: pytest.MonkeyPatch) -> None:
    net, now = Net(1, C, 2, 2), iter(range(10**6))
    graph = Graph(net.model(net.concat(*(slice_(net, 0, 1) for _ in range(100)))))
    monkeypatch.setattr(time, "thread_time", lambda: float(next(now)))
    with graph.budget.running(), pytest.raises(UnsafeFileError, match="to read"):
        movement(graph, walk(graph, graph.outputs[0]))
