"""Convert a model for one target, or for the fastest of the CPU targets, in one precision or the fastest accurate one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from gkp.converter.artefact import Artefact
from gkp.converter.conversion import finish, prepare
from gkp.converter.fastest import cpu_targets, prepare_fastest
from gkp.converter.precision import convert_tried
from gkp.converter.stages import Job
from gkp.converter.targets import Target, make_target
from gkp.options.convert import ConvertOptions
from gkp.options.targets import CpuOptions
from gkp.types import Progress, silent

__all__ = ["ConvertOptions", "convert"]


def convert(source: Any, options: ConvertOptions | None = None, progress: Progress = silent,
            targets: Sequence[Target] = (), batches: tuple[int, ...] | None = None) -> Artefact:
    """Convert a checkpoint (path) or a torch.nn.Module; see ConvertOptions. targets: in place of those that the options
    name, several of them with CpuOptions or --precision auto; batches: to measure a single target at, see Job. Raises
    GkpError; then nothing is written."""
    wanted = options or ConvertOptions()
    if wanted.precision == "auto" or wanted.data is not None:
        return convert_tried(source, wanted, progress, targets)
    if isinstance(wanted.target, CpuOptions):
        return finish(prepare_fastest(source, wanted, progress, targets or cpu_targets(wanted, progress)))
    target = targets[0] if targets else make_target(wanted.target, wanted.precision, wanted.benchmark, progress)
    return finish(prepare(Job(source, wanted, target, progress, batches)))
