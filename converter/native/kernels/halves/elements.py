"""float16 in C++ and in numpy."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from gkp.branched import BranchedConv
from gkp.converter.native.dtypes import FLOAT16
from gkp.converter.native.kernels.narrow import elements

ELEMENTS = "typedef _Float16 Numbers __attribute__((vector_size(2 * LANES)));\n" + elements(
    FLOAT16.c, "return (Halves)__builtin_convertvector(v, Numbers);", "return __builtin_convertvector((Numbers)h, V);")


def bits(values: npt.NDArray[np.float32]) -> npt.NDArray[np.uint16]:
    """Rounded to float16, half to even; infinity beyond its range; a zero has no sign."""
    with np.errstate(over="ignore"):
        rounded = np.asarray(values + np.float32(0), np.float16)
    return np.asarray(rounded.view(np.uint16))


@lru_cache(maxsize=64)
def weights(conv: BranchedConv) -> npt.NDArray[Any]:
    """[F, C, kh, kw] of float16 as uint16, zeros in the holes."""
    return bits(conv.to_dense())
