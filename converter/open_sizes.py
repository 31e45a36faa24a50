"""Heights and widths that a file leaves open: they stay open where the network in the one form takes any, too.

The form is made at one size. A Reshape whose shape the file computes from its input's size, as of a channel shuffle, has
become a constant there."""

from __future__ import annotations

from dataclasses import replace

from gkp.converter.graph import Graph
from gkp.converter.quantiser import is_quantised
from gkp.converter.sources.base import GroupedModel
from gkp.converter.targets.base import Axes
from gkp.converter.verify import check_inputs, compare
from gkp.converter.verify_int8 import stock
from gkp.errors import UsageError

_FIXED = "the network computes with its image size: the artefact takes the one that --input-shape says"
_CLOSE = 1e-3
"""Of the largest output: what another size may differ by. Verification is stricter."""


def with_sizes_that_hold(model: GroupedModel, graph: Graph) -> tuple[GroupedModel, tuple[str, ...]]:
    """The model, and what is to be said: where it, or its form, simplified, computes nothing at another height and width,
    or the two something else, only the batch stays open."""
    if not any(axis > 0 for axes in model.dynamic.values() for axis in axes) or _holds(model, graph):
        return model, ()
    return replace(model, dynamic=batch_only(model.dynamic)), (_FIXED,)


def batch_only(dynamic: Axes) -> Axes:
    """Of the axes that may vary, the first of each input."""
    return {name: {0: axes[0]} for name, axes in dynamic.items() if 0 in axes}


def _holds(model: GroupedModel, graph: Graph) -> bool:
    *_, (name, batch, feeds) = check_inputs(model.model, model.dynamic)
    try:
        want, got = model.reference(feeds), stock(graph, model.dynamic)(feeds)
    except UsageError:
        return False
    if is_quantised(model.model):
        return [y.shape for y in got] == [y.shape for y in want]
    return compare(got, want, name, batch, relative=_CLOSE).passed
