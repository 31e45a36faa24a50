"""Types that every floor shares."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

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


class Closing(ABC):
    """A context manager that is closed at its end."""

    @abstractmethod
    def close(self) -> None: ...

    def __enter__(self: _Closing) -> _Closing:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


_Closing = TypeVar("_Closing", bound=Closing)
