"""Accuracy of int8 by calibrator, on labelled images: the table of docs/adr on calibrators.

    python tools/compare_calibrators.py CHECKPOINT... --data cifar10:DIR [--draws 3] [--images 300]

Of every checkpoint: float32, the form in int8 as gkp makes it (NNCF's scales and biases) and NNCF alone on the dense
network, with weights of 8 and of 7 bits, run by ONNX Runtime, by the same without saturating sums ("exact") and by
OpenVINO; and ONNX Runtime's calibrators on the dense network (QDQ, per channel, symmetric weights), run by ONNX Runtime.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import logging
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnxruntime import quantization as ortq

from gkp.converter.calibration import Calibration
from gkp.converter.dynamic import batch_axes, free_axes
from gkp.converter.graph import Graph
from gkp.converter.lower.emit import lower
from gkp.converter.recognise import recognise, simplify
from gkp.converter.sources import OpenOptions, open_any
from gkp.converter.sources._torchfile import read_pickle_file
from gkp.images.accuracy import accuracy
from gkp.images.reading import open_images, read_samples
from gkp.runtime.runners import OpenVinoRunner, OrtRunner, Runner
from gkp.types import silent

_BATCH = 100


_ENGINES: dict[str, Callable[[bytes], Runner]] = {
    "ort": lambda data: OrtRunner(data, 1), "ort exact": lambda data: OrtRunner(data, 1, exact=True),
    "openvino": lambda data: OpenVinoRunner(data, 1)}
_SATURATING = ("ort", "openvino")
"""With weights of 8 bits, on processors without VNNI."""


@dataclass(frozen=True)
class Row:
    checkpoint: str
    draw: int
    calibrator: str
    correct: int
    total: int


class _Reader(ortq.CalibrationDataReader):  # type: ignore[misc]
    """Images one at a time, as ONNX Runtime's calibrators ask for them."""

    def __init__(self, name: str, images: Any) -> None:
        self._feeds = iter([{name: images[k:k + 1]} for k in range(len(images))])

    def get_next(self) -> Any:
        return next(self._feeds, None)


def _ort(stock: onnx.ModelProto, images: Any, method: Any) -> onnx.ModelProto:
    with tempfile.TemporaryDirectory() as folder:
        given, made = Path(folder) / "given.onnx", Path(folder) / "made.onnx"
        onnx.save(stock, given)
        with contextlib.redirect_stdout(io.StringIO()):
            ortq.quantize_static(given, made, _Reader(stock.graph.input[0].name, images), calibrate_method=method,
                                 quant_format=ortq.QuantFormat.QDQ, per_channel=True, weight_type=ortq.QuantType.QInt8,
                                 activation_type=ortq.QuantType.QUInt8)
        return onnx.load(made)


def rows(path: Path, data: str, draws: int, count: int) -> Iterator[Row]:
    model = open_any(path, OpenOptions())
    graph = simplify(recognise(Graph(model.model, model.budget)))
    stock = lower(graph, {}).to_model()
    name, shape = stock.graph.input[0].name, tuple(d.dim_value for d in stock.graph.input[0].type.tensor_type.shape.dim[1:])
    test = open_images(data, shape, "test", read_pickle_file, system=model.system)

    def row(draw: int, calibrator: str, made: onnx.ModelProto, engine: str = "ort") -> Row:
        found = accuracy(_ENGINES[engine](free_axes(made, batch_axes(made)).SerializeToString()).run, name, test, _BATCH)
        return Row(path.name, draw, f"{calibrator}, {engine}", found.correct, found.total)

    for engine in _SATURATING:
        yield row(0, "float32", stock, engine)
    for draw in range(draws):
        samples = read_samples(data, shape, count, draw, read_pickle_file, system=model.system)
        for bits in (8, 7):
            used = Calibration(samples, silent, bits)
            ours, theirs = lower(used.graph(graph), {}).to_model(), used.stock(stock)
            for engine in _ENGINES if bits == 8 else _SATURATING:
                yield row(draw, f"gkp (NNCF's scales on the form), {bits} bits", ours, engine)
                yield row(draw, f"NNCF alone, {bits} bits", theirs, engine)
        for method in ("MinMax", "Entropy", "Percentile"):
            yield row(draw, f"ONNX Runtime, {method}", _ort(stock, samples.images, getattr(ortq.CalibrationMethod, method)))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoints", nargs="+", type=Path)
    parser.add_argument("--data", required=True)
    parser.add_argument("--draws", type=int, default=3)
    parser.add_argument("--images", type=int, default=300)
    given = parser.parse_args(arguments)
    logging.disable(logging.WARNING)
    for path in given.checkpoints:
        found: dict[str, list[float]] = {}
        for row in rows(path, given.data, given.draws, given.images):
            share = 100 * row.correct / row.total
            found.setdefault(row.calibrator, []).append(share)
            print(f"{row.checkpoint}, draw {row.draw}: {row.calibrator}: {share:.2f} %", flush=True)
        print(f"\n| {path.name} | median of the draws | all |\n|---|---|---|")
        for calibrator, shares in found.items():
            print(f"| {calibrator} | {np.median(shares):.2f} | {', '.join(f'{s:.2f}' for s in shares)} |")


if __name__ == "__main__":
    main()
