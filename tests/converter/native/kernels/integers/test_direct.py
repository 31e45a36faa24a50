"""Every way to convolve integers gives the same bits as their definition."""

from __future__ import annotations

import numpy as np
import pytest
from integer_kit import ZEN4, Layer, check_layers, has, layer_ways, random_layer

from gkp.converter.native.kernels.way import Way

needs_vnni = pytest.mark.skipif(not has("avx512_vnni", "avx512vbmi"), reason="this processor has no AVX512-VNNI with VBMI")


def some_ways(rng: np.random.Generator, layer: Layer, most: int) -> list[tuple[Layer, Way]]:
    found = list(layer_ways(layer, ZEN4))
    assert found, layer.label
    return [(layer, found[n]) for n in rng.permutation(len(found))[:most]]


@needs_vnni
def test_random_layers() -> None:
    rng = np.random.default_rng(3)
    check_layers(rng, [case for _ in range(40) for case in some_ways(rng, random_layer(rng, curves=True), 2)], ZEN4)
