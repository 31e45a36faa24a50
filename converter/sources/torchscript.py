"""TorchScript archives (torch.jit.save), DSP's published models among them.

The archive's code is parsed and every call checked against an operator allow-list before torch.jit.load runs, so a
scripted module that writes files is refused, not run. --trust-code skips the check, for operators of your own.
"""

from __future__ import annotations

from typing import Any

from gkp.converter.sources import _image_size, torch_export
from gkp.converter.sources.base import GroupedModel, OpenOptions, SourceFile
from gkp.converter.sources.script.check import check_torchscript
from gkp.errors import FileError
from gkp.text import first_line


def matches(file: SourceFile) -> bool:
    """A zip with TorchScript code in it."""
    return file.kind == "torchscript"


def open(file: SourceFile, options: OpenOptions) -> GroupedModel:
    """Load and export. A model with DSP's packed blocks (layers_a, sampler_a, ...) counts as pruned, and takes images of the
    size that its layers were made for. UsageError: the input shape is not given, and the layers do not tell it either."""
    torch = torch_export.import_torch()
    if not options.trust_code:
        options.progress("checking what the TorchScript code does", None)
        check_torchscript(file.path, file.budget)
    options.progress("loading the TorchScript module", None)
    try:
        with torch_export.model_code():
            module = torch.jit.load(str(file.path), map_location="cpu").eval()
    except (RuntimeError, ValueError, OSError) as e:
        raise FileError(f"{file.path} cannot be loaded as TorchScript: {first_line(e, 200)}", "save the model again") from e
    names = {name.rsplit(".", 1)[-1] for name, _ in module.named_modules()}
    dsp = {"layers_a", "layers_b", "sampler_a", "sampler_b", "residual"} <= names
    asked = options.shape(torch_export.INPUT) is not None
    return torch_export.from_module(
        module, system="dsp" if dsp else "torchscript", options=options, pruned=dsp, reference_name="TorchScript module",
        description="DSP packed model (TorchScript)" if dsp else "TorchScript",
        default_shape=_image_size.of_classifier(module) if dsp and not asked else None,
        dense_width_of=_packed_blocks(module) if dsp else None)


def _packed_blocks(module: Any) -> dict[str, str]:
    """In DSP's basic blocks conv_a had as many filters as conv_b writes: the width of the residual stream."""
    return {f"{name}.layers_a": f"{name}.layers_b" for name, block in module.named_modules() if hasattr(block, "layers_a")}
