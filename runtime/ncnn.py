"""ncnn on the CPU: runs the .param and .bin files that pnnx writes. Imported when first needed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gkp.errors import FileError, UsageError
from gkp.require import require
from gkp.types import Array

WINOGRAD = ("winograd23", "winograd43", "winograd63")
"""ncnn's Winograd kernels, by output tile (F(2x2, 3x3), F(4x4, 3x3), F(6x6, 3x3)); all are on by default."""


class NcnnRunner:
    """ncnn with `threads` threads. Images run one after another, each in an extractor of its own: ncnn's own
    batch dimension gives the same results and is 4 to 5 % slower (measured with ncnn 2026-10, ResNet-20, batch 64).

    folder: holds model.ncnn.param and model.ncnn.bin; the files are not needed once the runner is open. inputs: name ->
    shape without the batch, in the order of pnnx's in0, in1, ...; outputs: names in the order of out0, out1, ... off:
    Winograd kernels to leave out; precision: of values and arithmetic, as far as the processor has it (fp32, bf16, fp16)."""

    def __init__(self, folder: Path, threads: int, inputs: Mapping[str, Sequence[int]], outputs: Sequence[str],
                 off: Sequence[str] = (), precision: str = "fp32") -> None:
        ncnn = import_ncnn()
        self._ncnn, self._net = ncnn, ncnn.Net()
        options = self._net.opt
        options.num_threads, options.lightmode, options.use_vulkan_compute = threads, True, False
        for name in dir(options):  # whatever rounds to less than float32
            if name.startswith(("use_fp16_", "use_bf16_", "use_int8_")):
                setattr(options, name, name.startswith(f"use_{precision}_"))
        for name in off:
            setattr(options, f"use_{name}_convolution", False)
        if self._net.load_param(str(folder / "model.ncnn.param")) or self._net.load_model(str(folder / "model.ncnn.bin")):
            raise FileError("ncnn cannot open the model", "it may hold operators that this ncnn does not know")
        self.inputs, self.outputs = list(inputs), list(outputs)
        self._shapes = [tuple(shape) for shape in inputs.values()]

    def run(self, feeds: Mapping[str, Array]) -> list[Array]:
        images = [self._checked(feeds, name, shape) for name, shape in zip(self.inputs, self._shapes, strict=True)]
        per_image = [self._one([x[n] for x in images]) for n in range(len(images[0]))]
        return [np.stack(values) for values in zip(*per_image, strict=True)]

    def _checked(self, feeds: Mapping[str, Array], name: str, shape: tuple[int, ...]) -> Array:
        """ncnn itself would read past the end of an array of another shape."""
        x = feeds.get(name)
        if x is None or x.shape[1:] != shape or not len(x):
            raise UsageError(f"ncnn cannot run the model: input {name!r} needs shape [batch, {', '.join(map(str, shape))}]",
                             "compare the input's shape with the model's")
        return np.ascontiguousarray(x, np.float32)

    def _one(self, images: Sequence[Array]) -> list[Array]:
        extractor = self._net.create_extractor()
        for number, image in enumerate(images):
            extractor.input(f"in{number}", self._ncnn.Mat(image))
        values = []
        for number in range(len(self.outputs)):
            code, value = extractor.extract(f"out{number}")
            if code:
                raise UsageError(f"ncnn cannot run the model (code {code})", "the model may not fit ncnn")
            values.append(np.array(value))
        return values

    def close(self) -> None:
        self._net.clear()


def import_ncnn() -> Any:
    """The ncnn module, or BackendMissingError."""
    return require("ncnn", "bench")
