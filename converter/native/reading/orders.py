"""In which order the axes of a tensor lie in a value, read off the numbers of its elements."""

from __future__ import annotations

from collections.abc import Sequence

from gkp.converter.native.reading.moves import Elements, Refused

Three = tuple[int, int, int]


def order_of(elements: Elements) -> tuple[int, ...]:
    """The axes from the slowest to the fastest: by how far apart two neighbours along each of them are. Refused where it has
    no elements."""
    if not elements.size:
        raise Refused("an empty tensor")
    steps = _steps(elements)
    return tuple(sorted(range(elements.ndim), key=lambda a: -steps[a]))


def permutation(elements: Elements, source: Three) -> tuple[Three, Three] | None:
    """(shape, order) of a tensor that is a value with its axes in another order: axis k of the shape is axis order[k] of the
    value, in the value's own shape (source), or with neighbouring axes taken together as far as they stay together. None for
    more than three axes."""
    axes = list(zip(elements.shape, _steps(elements), strict=True))
    own = sorted(axes, key=lambda axis: -axis[1])
    if tuple(n for n, _ in own) != source:
        axes = _together(axes)
    if len(axes) > 3:
        return None
    axes = [*[(1, elements.size + 1)] * (3 - len(axes)), *axes]
    slowest = sorted(range(3), key=lambda k: -axes[k][1])
    (a, b, c), (i, j, k) = (n for n, _ in axes), (slowest.index(k) for k in range(3))
    return (a, b, c), (i, j, k)


def _together(axes: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """(size, step) of axes, neighbours as one where they are neighbours in the value too."""
    merged: list[tuple[int, int]] = []
    for n, step in axes:
        if n > 1 and merged and merged[-1][1] == step * n:
            merged[-1] = merged[-1][0] * n, step
        elif n > 1:
            merged.append((n, step))
    return merged


def _steps(elements: Elements) -> list[int]:
    """Between the numbers of two neighbours along each axis; 0 along axes of length 1."""
    corner = (0,) * elements.ndim
    along = [(*corner[:a], 1, *corner[a + 1:]) for a in range(elements.ndim)]
    return [abs(int(elements[place]) - int(elements[corner])) if n > 1 else 0
            for n, place in zip(elements.shape, along, strict=True)]
