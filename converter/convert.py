"""Convert a model for one target, or for the fastest of the CPU targets."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from gkp.converter.artefact import Artefact
from gkp.converter.conversion import Conversion
from gkp.converter.fastest import CPU, fastest
from gkp.converter.options import ConvertOptions

__all__ = ["ConvertOptions", "convert"]


def convert(source: Any, options: ConvertOptions | None = None,
            progress: Callable[[str, float | None], None] = lambda text, share: None) -> Artefact:
    """Convert a checkpoint (path) or a torch.nn.Module; see ConvertOptions. Raises GkpError; then nothing is written."""
    wanted = options or ConvertOptions()
    if wanted.target == CPU:
        return fastest(source, wanted, progress).finish()
    return Conversion(source, wanted, progress).run()
