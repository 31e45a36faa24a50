from typing import Any

import pytest
from engine_kit import grouped_net
from hypothesis import given
from hypothesis import strategies as st

from gkp.converter.trt.profile import check_batch_profile, shape_ranges
from gkp.errors import UnsupportedModelError, UsageError
from gkp.options.trt import parse_batch_profile


@given(st.tuples(*[st.integers(1, 1 << 24)] * 3).map(sorted))
def test_ordered_sizes_are_read_as_written(sizes: list[int]) -> None:
    assert parse_batch_profile(",".join(map(str, sizes))) == tuple(sizes)


@pytest.mark.parametrize("text", ["", "1", "1,8", "1,8,64,128", "a,b,c", "1,8,x", "-1,8,64", "1.5,8,64", "1,,64"])
def test_what_is_no_profile_is_a_usage_error_with_an_example(text: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_batch_profile(text)
    assert "1,8,64" in caught.value.hint


@pytest.mark.parametrize("text", ["9,8,64", "1,65,64", "0,1,2", "1,1,16777217"])
def test_sizes_out_of_order_or_out_of_range_are_a_usage_error(text: str) -> None:
    with pytest.raises(UsageError, match="MIN <= OPT <= MAX"):
        parse_batch_profile(text)


def test_a_dynamic_batch_needs_its_range() -> None:
    with pytest.raises(UsageError, match="the batch is dynamic, TensorRT needs its range") as caught:
        check_batch_profile(grouped_net("N"), None)
    assert "--batch-profile 1,8,64" in caught.value.hint


def test_a_fixed_batch_takes_no_range() -> None:
    with pytest.raises(UsageError, match="the batch is fixed"):
        check_batch_profile(grouped_net(4), (1, 8, 64))
    check_batch_profile(grouped_net(4), None)


def test_the_range_holds_whole_shapes_of_the_dynamic_inputs() -> None:
    assert shape_ranges(grouped_net("N"), (1, 8, 64)) == {"x": ((1, 3, 16, 16), (8, 3, 16, 16), (64, 3, 16, 16))}
    assert shape_ranges(grouped_net(2), None) == {}


@pytest.mark.parametrize("spoil", ["size", "shape"])
def test_nothing_but_the_batch_may_be_unknown(spoil: str) -> None:
    model: Any = grouped_net("N")
    tensor = model.graph.input[0].type.tensor_type
    if spoil == "size":
        tensor.shape.dim[2].dim_param = "H"
    else:
        tensor.ClearField("shape")
    with pytest.raises(UnsupportedModelError) as caught:
        check_batch_profile(model, (1, 8, 64))
    assert "--input-shape" in caught.value.hint


def test_weights_that_are_listed_as_inputs_are_not_fed() -> None:
    model = grouped_net(2)
    weight = model.graph.initializer[0]
    entry = model.graph.input.add()
    entry.name = weight.name
    assert shape_ranges(model, None) == {}
