"""The types that the elements of a value may have."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class DType:
    """name: as numpy and gkp_describe say it; c: as C says it; bytes: of one element."""

    name: str
    c: str
    bytes: int

    @property
    def numpy(self) -> np.dtype[Any]:
        return np.dtype(self.name)


FLOAT32 = DType("float32", "float", 4)
UINT8 = DType("uint8", "unsigned char", 1)
BFLOAT16 = DType("bfloat16", "Bf16", 2)
"""The upper half of a float32: inside a network only, and numpy has no such type."""
FLOAT16 = DType("float16", "Fp16", 2)
"""IEEE's: inside a network only."""
DTYPES = (FLOAT32, UINT8)
"""Of the caller's arrays; gkp.runtime.native knows the same."""
