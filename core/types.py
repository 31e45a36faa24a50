"""Types that every floor shares."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
Floats = npt.NDArray[np.float32]
Progress = Callable[[str, float | None], None]
"""progress(text, share): what is being done, and how much of it is done (0 to 1; None: unknown)."""
Run = Callable[[Mapping[str, Array]], list[Array]]
"""The outputs of a network for its inputs by name."""


def silent(text: str, share: float | None) -> None:
    """A Progress that nobody sees."""
