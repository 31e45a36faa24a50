"""BranchedConv: the reference is a torch convolution, and every rewrite keeps the function up to its renumbering."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gkp.branched import Branch, BranchedConv, union
from gkp.errors import UsageError

QUICK = settings(max_examples=60, deadline=None)


@st.composite
def forms(draw: st.DrawFn, nd: int | None = None) -> BranchedConv:
    """Any structure in 1 to 3 dimensions: overlapping and unequal branches, unwritten outputs, asymmetric pads."""
    rng = np.random.default_rng(draw(st.integers(0, 2**31)))
    nd = nd or draw(st.integers(1, 3))
    c, f, n = draw(st.integers(1, 7)), draw(st.integers(1, 8)), draw(st.integers(0, 4))
    kernel = tuple(draw(st.integers(1, 3)) for _ in range(nd))
    outs = np.split(rng.permutation(f)[: f - draw(st.integers(0, 1))], np.sort(rng.integers(0, f, max(0, n - 1))))
    triples = []
    for out in outs[:n]:
        ins = rng.permutation(c)[: rng.integers(1, c + 1)]
        triples.append((ins, out, rng.standard_normal((len(out), len(ins), *kernel))))
    return BranchedConv.build(c, f, triples, bias=rng.standard_normal(f), kernel_shape=kernel,
                              strides=[draw(st.integers(1, 3)) for _ in range(nd)],
                              pads=[draw(st.integers(0, 2)) for _ in range(2 * nd)],
                              dilations=[draw(st.integers(1, 2)) for _ in range(nd)])


def image(channels: int, nd: int, seed: int = 0) -> Any:
    return np.random.default_rng(seed).standard_normal((2, channels, *(7, 6, 5)[:nd]))


def x_of(conv: BranchedConv) -> Any:
    return image(conv.in_channels, len(conv.kernel_shape))


def dense_weight(conv: BranchedConv) -> Any:
    """to_dense, written out element by element."""
    weight = np.zeros((conv.out_channels, conv.in_channels, *conv.kernel_shape))
    for b in conv.branches:
        for row, o in enumerate(b.out_index):
            for col, i in enumerate(b.in_index):
                weight[o, i] = b.weight[row, col]
    return weight


def close(got: Any, want: Any) -> None:
    np.testing.assert_allclose(got, want, rtol=1e-9, atol=1e-9)


# ---- the definition ---------------------------------------------------------------------------------------------
@QUICK
@given(forms())
def test_reference_equals_torch(conv: BranchedConv) -> None:
    x, nd = x_of(conv), len(conv.kernel_shape)
    padding = [p for a in reversed(range(nd)) for p in (conv.pads[a], conv.pads[nd + a])]
    padded = torch.nn.functional.pad(torch.from_numpy(x), padding)
    function = (torch.nn.functional.conv1d, torch.nn.functional.conv2d, torch.nn.functional.conv3d)[nd - 1]
    want = function(padded, torch.from_numpy(dense_weight(conv)), torch.from_numpy(np.asarray(conv.bias, np.float64)),
                    stride=conv.strides, dilation=conv.dilations)
    close(conv(x), want.numpy())
    assert conv(x).shape[2:] == conv.out_shape(x.shape[2:])


def test_float16_input_is_summed_in_float32() -> None:
    weight = np.full((1, 3000, 1), 1, np.float16)
    x = np.full((1, 3000, 1), 1, np.float16)
    y = BranchedConv.from_dense(weight)(x)
    assert y.dtype == np.float16
    assert y.item() == 3000


def test_an_output_in_no_branch_is_its_bias() -> None:
    conv = BranchedConv.build(2, 3, [([0], [1], np.ones((1, 1, 1)))], bias=np.array([5.0, 0, 7]), kernel_shape=[1])
    y = conv(image(2, 1))
    assert (y[:, 0] == 5).all()
    assert (y[:, 2] == 7).all()
    assert conv.written.tolist() == [False, True, False]
    assert conv.read.tolist() == [True, False]


# ---- construction and views -------------------------------------------------------------------------------------
@QUICK
@given(forms())
def test_dense_round_trip_keeps_the_function(conv: BranchedConv) -> None:
    close(conv.to_dense(), dense_weight(conv))
    again = BranchedConv.from_dense(conv.to_dense(), conv.bias, strides=conv.strides, pads=conv.pads,
                                    dilations=conv.dilations)
    close(again(x_of(conv)), conv(x_of(conv)))
    assert again.params <= conv.params


def test_from_dense_finds_the_blocks_in_first_seen_order() -> None:
    weight = np.zeros((5, 4, 3, 3), np.float32)
    weight[np.ix_([1, 4], [0, 2])] = 1
    weight[np.ix_([0, 2], [1, 2, 3])] = 1
    weight[0, 1, 0, 0] = 0  # a zero tap does not change the channel mask
    found = BranchedConv.from_dense(weight).branches
    assert [b.out_index.tolist() for b in found] == [[0, 2], [1, 4]]
    assert [b.in_index.tolist() for b in found] == [[1, 2, 3], [0, 2]]


@pytest.mark.parametrize("groups", [1, 2, 3, 6])
def test_from_grouped_equals_torch(groups: int) -> None:
    weight = np.random.default_rng(0).standard_normal((12, 6 // groups, 3, 3))
    x = image(6, 2)
    want = torch.nn.functional.conv2d(torch.from_numpy(x), torch.from_numpy(weight), groups=groups, padding=1)
    conv = BranchedConv.from_grouped(weight, groups, pads=[1] * 4)
    close(conv(x), want.numpy())
    assert len(conv.branches) == groups
    assert conv.is_dense == (groups == 1)
    assert conv.overlap == 1


def test_build_adds_up_repeated_reads() -> None:
    x = image(3, 1)
    conv = BranchedConv.build(3, 1, [([2, 0, 2], [0], np.array([[[1.0], [10], [100]]]))], kernel_shape=[1])
    close(conv(x)[:, 0], 101 * x[:, 2] + 10 * x[:, 0])
    assert conv.branches[0].in_index.tolist() == [0, 2]


@QUICK
@given(forms(), st.booleans())
def test_macs_are_what_brute_force_counts(conv: BranchedConv, zero_taps: bool) -> None:
    rng = np.random.default_rng(3)
    conv = BranchedConv.build(conv.in_channels, conv.out_channels,
                              [(b.in_index, b.out_index, b.weight * (rng.random(b.weight.shape[1:]) < 0.6))
                               for b in conv.branches], kernel_shape=conv.kernel_shape)
    plane, count = (3, 2, 2)[: len(conv.kernel_shape)], 0
    for b in conv.branches:
        for _ in np.ndindex(*plane):
            for tap in np.ndindex(*b.weight.shape[1:]):
                at = (slice(None), *tap)
                count += b.out_index.size * (zero_taps or bool(b.weight[at].any()))
    assert conv.macs(plane, zero_taps=zero_taps) == count
    assert conv.macs_dense(plane) == conv.to_dense().size * np.prod(plane)
    assert conv.params == sum(b.weight.size for b in conv.branches)


def test_overlap_counts_repeated_channel_reads() -> None:
    ones = np.ones((1, 2, 1))
    conv = BranchedConv.build(3, 2, [([0, 1], [0], ones), ([1, 2], [1], ones)], kernel_shape=[1])
    assert conv.overlap == pytest.approx(4 / 3)


def test_is_copy_means_only_moving_channels() -> None:
    def copy(weight: float = 1, **kwargs: Any) -> BranchedConv:
        return BranchedConv.build(2, 3, [([1], [0], np.full((1, 1, 1, 1), weight))], kernel_shape=[1, 1], **kwargs)
    assert copy(strides=[2, 2]).is_copy
    assert not copy(weight=2).is_copy
    assert not copy(bias=np.ones(3)).is_copy
    assert not copy(pads=[1] * 4).is_copy


# ---- rewrites ---------------------------------------------------------------------------------------------------
@QUICK
@given(forms(), st.randoms(use_true_random=False))
def test_permutations_renumber_and_undo_each_other(conv: BranchedConv, random: Any) -> None:
    x = x_of(conv)
    order_in, order_out = (random.sample(range(n), n) for n in (conv.in_channels, conv.out_channels))
    there = conv.permute_inputs(order_in).permute_outputs(order_out)
    close(there(x[:, order_in]), conv(x)[:, order_out])
    back = there.permute_outputs(np.argsort(order_out)).permute_inputs(np.argsort(order_in))
    close(back(x), conv(x))
    close(back.to_dense(), conv.to_dense())
    twice = conv.permute_outputs(order_out).permute_outputs(order_out[::-1])
    close(twice(x), conv(x)[:, order_out][:, order_out[::-1]])


@QUICK
@given(forms(), st.data())
def test_gather_inputs_absorbs_a_gather_with_repeats_and_zero_channels(conv: BranchedConv, data: st.DataObject) -> None:
    n = data.draw(st.integers(1, 9))
    index = np.array(data.draw(st.lists(st.integers(-1, n - 1), min_size=conv.in_channels, max_size=conv.in_channels)))
    z = image(n, len(conv.kernel_shape))
    x = np.where((index >= 0).reshape(1, -1, *(1,) * (z.ndim - 2)), z[:, index], 0)
    close(conv.gather_inputs(index, n)(z), conv(x))


@QUICK
@given(forms(), st.data())
def test_take_outputs_absorbs_a_selection_with_zero_channels(conv: BranchedConv, data: st.DataObject) -> None:
    taken = data.draw(st.lists(st.integers(0, conv.out_channels - 1), unique=True))
    index = np.array(data.draw(st.permutations([*taken, -1, -1])))
    y = conv(x_of(conv))
    want = np.where((index >= 0).reshape(1, -1, *(1,) * (y.ndim - 2)), y[:, index], 0)
    close(conv.take_outputs(index)(x_of(conv)), want)


@QUICK
@given(forms(), st.integers(0, 99))
def test_scale_outputs_is_scale_times_y_plus_shift(conv: BranchedConv, seed: int) -> None:
    rng = np.random.default_rng(seed)
    scale, shift = rng.standard_normal((2, conv.out_channels))
    y = conv(x_of(conv))
    wide = (1, -1, *(1,) * (y.ndim - 2))
    close(conv.scale_outputs(scale, shift)(x_of(conv)), y * scale.reshape(wide) + shift.reshape(wide))


@QUICK
@given(forms(), st.data())
def test_merge_and_split_keep_the_function(conv: BranchedConv, data: st.DataObject) -> None:
    order = data.draw(st.permutations(range(len(conv.branches))))
    cut = data.draw(st.integers(0, len(order)))
    merged = conv.merge([part for part in (order[:cut], order[cut:]) if part])
    close(merged(x_of(conv)), conv(x_of(conv)))
    assert len(merged.branches) == (len(order) > 0) + (0 < cut < len(order))
    n = data.draw(st.integers(1, 3))
    split = conv.split(n)
    close(split(x_of(conv)), conv(x_of(conv)))
    assert split.params == conv.params
    assert max((b.out_index.size for b in split.branches), default=0) <= -(-conv.out_channels // n)


@QUICK
@given(forms())
def test_union_is_the_sum_of_disjoint_convolutions(conv: BranchedConv) -> None:
    one = BranchedConv.build(conv.in_channels, conv.out_channels, [(b.in_index, b.out_index, b.weight)
                                                                   for b in conv.branches[::2]], bias=conv.bias,
                             kernel_shape=conv.kernel_shape, strides=conv.strides, pads=conv.pads,
                             dilations=conv.dilations)
    two = BranchedConv.build(conv.in_channels, conv.out_channels, [(b.in_index, b.out_index, b.weight)
                                                                   for b in conv.branches[1::2]],
                             bias=np.ones(conv.out_channels), kernel_shape=conv.kernel_shape, strides=conv.strides,
                             pads=conv.pads, dilations=conv.dilations)
    close(union([one, two])(x_of(conv)), one(x_of(conv)) + two(x_of(conv)))


# ---- integers -----------------------------------------------------------------------------------------------------
@st.composite
def integers(draw: st.DrawFn) -> BranchedConv:
    """As `forms`, every weight an integer of 8 bits times its output's scale."""
    conv = draw(forms())
    rng = np.random.default_rng(draw(st.integers(0, 2**31)))
    most = draw(st.sampled_from([3, 60, 127]))
    scale = rng.uniform(0.01, 2, conv.out_channels).astype(np.float32)
    wide = [scale[b.out_index].reshape(-1, *(1,) * (b.weight.ndim - 1)) for b in conv.branches]
    parts = tuple(replace(b, weight=rng.integers(-most, most + 1, b.weight.shape) * s.astype(np.float64))
                  for b, s in zip(conv.branches, wide, strict=True))
    return replace(conv, branches=parts, scale=scale)


def steps(conv: BranchedConv) -> Any:
    """The integers, [F, C, *kernel]; they are integers."""
    dense = conv.to_dense() / np.asarray(conv.scale).reshape(-1, *(1,) * (len(conv.kernel_shape) + 1))
    np.testing.assert_allclose(dense, np.rint(dense), atol=1e-4)
    return np.rint(dense)


@QUICK
@given(integers(), st.data())
def test_permuting_and_taking_outputs_carries_their_scales(conv: BranchedConv, data: st.DataObject) -> None:
    order = data.draw(st.permutations(range(conv.out_channels)))
    assert np.array_equal(steps(conv.permute_outputs(order)), steps(conv)[order])
    assert np.array_equal(conv.permute_outputs(order).scale, np.asarray(conv.scale)[order])
    ins = data.draw(st.permutations(range(conv.in_channels)))
    assert np.array_equal(steps(conv.permute_inputs(ins)), steps(conv)[:, ins])
    index = np.array([*order[:data.draw(st.integers(0, conv.out_channels))], -1, -1])
    taken = conv.take_outputs(index)
    assert np.array_equal(np.asarray(taken.scale)[:-2], np.asarray(conv.scale)[index[:-2]])
    assert np.array_equal(steps(taken)[:-2], steps(conv)[index[:-2]])
    assert np.asarray(taken.scale)[-2:].tolist() == [1, 1]
    close(taken(x_of(conv))[:, :-2], conv(x_of(conv))[:, index[:-2]])


@QUICK
@given(integers(), st.data())
def test_gathered_weights_stay_integers_or_lose_the_scale_but_never_the_function(conv: BranchedConv, data: st.DataObject) -> None:
    n = data.draw(st.integers(1, 9))
    index = np.array(data.draw(st.lists(st.integers(-1, n - 1), min_size=conv.in_channels, max_size=conv.in_channels)))
    z, sums = image(n, len(conv.kernel_shape)), np.zeros((conv.out_channels, n, *conv.kernel_shape))
    for place, channel in enumerate(index):
        if channel >= 0:
            sums[:, channel] += steps(conv)[:, place]
    gathered = conv.gather_inputs(index, n)
    x = np.where((index >= 0).reshape(1, -1, *(1,) * (z.ndim - 2)), z[:, index], 0)
    close(gathered(z), conv(x))
    fits = sums.min(initial=0) >= -128 and sums.max(initial=0) <= 127
    assert (gathered.scale is not None) == fits
    if fits:
        assert np.array_equal(steps(gathered), sums)


def test_a_sum_of_128_has_no_place_in_8_bits_and_one_of_minus_128_has() -> None:
    for weight, fits in ((64.0, False), (-64.0, True)):
        conv = BranchedConv.build(2, 1, [([0, 1], [0], np.full((1, 2, 1), weight))], kernel_shape=[1], scale=np.ones(1, np.float32))
        assert (conv.gather_inputs([0, 0], 1).scale is not None) == fits


@QUICK
@given(integers(), st.data())
def test_merging_splitting_and_uniting_keep_every_integer(conv: BranchedConv, data: st.DataObject) -> None:
    cut = data.draw(st.integers(0, len(conv.branches)))
    order = data.draw(st.permutations(range(len(conv.branches))))
    for made in (conv.merge([part for part in (order[:cut], order[cut:]) if part]), conv.split(data.draw(st.integers(1, 3)))):
        assert np.array_equal(made.scale, conv.scale)
        assert np.array_equal(steps(made), steps(conv))
    halves = [replace(conv, branches=conv.branches[k::2], scale=conv.scale, bias=np.asarray(conv.bias) * (k == 0)) for k in (0, 1)]
    other = replace(halves[1], scale=np.where(halves[1].written, conv.scale, 7).astype(np.float32))
    made = union([halves[0], other])
    assert np.array_equal(np.asarray(made.scale)[conv.written], np.asarray(conv.scale)[conv.written])
    assert np.array_equal(steps(made), steps(conv))
    assert union([halves[0], replace(other, scale=None)]).scale is None


@QUICK
@given(integers())
def test_scaled_outputs_are_integers_of_no_scale(conv: BranchedConv) -> None:
    ones = np.ones(conv.out_channels)
    assert conv.scale_outputs(ones, ones).scale is None


# ---- refusals ---------------------------------------------------------------------------------------------------
ONE = np.ones((1, 1, 1))


def make(*branches: tuple[list[int], list[int], Any], **changes: Any) -> BranchedConv:
    parts = tuple(Branch(np.asarray(i), np.asarray(o), w) for i, o, w in branches)
    fields = {"in_channels": 2, "out_channels": 2, "branches": parts, "bias": np.zeros(2), "kernel_shape": (1,),
              "strides": (1,), "pads": (0, 0), "dilations": (1,)}
    return BranchedConv(**{**fields, **changes})


@pytest.mark.parametrize(("branches", "changes", "text"), [
    ([([2], [0], ONE)], {}, "names channel 2, but there are 2 channels"),
    ([([-1], [0], ONE)], {}, "names channel -1"),
    ([([0], [5], ONE)], {}, "out_index of branch 0 names channel 5"),
    ([([0, 0], [0], np.ones((1, 2, 1)))], {}, "reads a channel twice"),
    ([([0], [0], ONE), ([1], [0], ONE)], {}, "branch 1 writes an output channel that is already written"),
    ([([0], [0, 0], np.ones((2, 1, 1)))], {}, "already written"),
    ([([0], [0], np.ones((1, 2, 1)))], {}, "has shape (1, 2, 1), expected (1, 1, 1)"),
    ([([0.5], [0], ONE)], {}, "must be a one-dimensional list of channel numbers"),
    ([([[0]], [0], ONE)], {}, "must be a one-dimensional list of channel numbers"),
    ([], {"bias": np.zeros(3)}, "bias has shape (3,), expected (2,)"),
    ([], {"kernel_shape": ()}, "1 to 3 spatial axes, not 0"),
    ([], {"strides": (1, 1)}, "strides has 2 values, a 1-D convolution needs 1"),
    ([], {"pads": (0,)}, "pads has 1 values, a 1-D convolution needs 2"),
    ([], {"strides": (0,)}, "at least 1"),
    ([], {"pads": (-1, 0)}, "pads at least 0"),
    ([], {"scale": np.ones(3)}, "scale has shape (3,), expected (2,)"),
    ([], {"scale": np.array([1, 0])}, "positive numbers"),
    ([], {"scale": np.array([1, -1.0])}, "positive numbers"),
    ([], {"scale": np.array([1, np.nan])}, "positive numbers"),
    ([], {"scale": np.array([1, np.inf])}, "positive numbers"),
])
def test_parts_that_do_not_fit_are_refused(branches: Any, changes: Any, text: str) -> None:
    with pytest.raises(UsageError) as error:
        make(*branches, **changes)
    assert text in error.value.message


@pytest.mark.parametrize(("call", "text"), [
    (lambda c: c.permute_inputs([0, 0]), "not a permutation"),
    (lambda c: c.permute_outputs([0]), "not a permutation"),
    (lambda c: c.gather_inputs([0], 2), "does not feed 2 inputs"),
    (lambda c: c.gather_inputs([0, 9], 2), "names channel"),
    (lambda c: c.take_outputs([1, 1]), "taken twice"),
    (lambda c: c.merge([[0, 0]]), "exactly once"),
    (lambda c: c.split(0), "cannot split into 0"),
    (lambda c: c(np.zeros((1, 3, 4))), "expected [N, 2, 1 spatial axes]"),
    (lambda c: BranchedConv.from_grouped(np.ones((3, 1, 1)), 2), "do not divide into 2 groups"),
    (lambda c: union([c, make(out_channels=3, bias=np.zeros(3))]), "only convolutions of one shape"),
])
def test_impossible_rewrites_are_refused(call: Any, text: str) -> None:
    with pytest.raises(UsageError) as error:
        call(make(([0], [0], ONE)))
    assert text in error.value.message
