"""bfloat16 in C++ and in numpy: the upper half of a float32, rounded half to even."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from gkp.branched import BranchedConv
from gkp.converter.native.dtypes import BFLOAT16
from gkp.converter.native.kernels.narrow import elements

ELEMENTS = elements(BFLOAT16.c, """Halves h;
asm("vcvtneps2bf16 %1, %0" : "=v"(h) : "v"(v));
return h;""", "return (V)(__builtin_convertvector(h, I) << 16);")


def bits(values: npt.NDArray[np.float32]) -> npt.NDArray[np.uint16]:
    """Finite numbers rounded to bfloat16, half to even; a zero has no sign."""
    whole = np.ascontiguousarray(values + np.float32(0), np.float32).view(np.uint32)
    return ((whole + 0x7fff + (whole >> 16 & 1)) >> 16).astype(np.uint16)


@lru_cache(maxsize=64)
def weights(conv: BranchedConv) -> npt.NDArray[Any]:
    """[F, C, kh, kw] of bfloat16 as uint16, zeros in the holes."""
    return bits(conv.to_dense())
