"""The last line of `make demo`: the example in int8 in native kernels, its time beside that of the dense network
in int8 in the fastest stock engine, its accuracy.

    python tools/demo_int8.py MODEL BASELINE OUTPUT [--images cifar10:data]

Without the images (no such folder) ranges are learned from random numbers: then only the time means something, and the line
says so.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import gkp
from gkp.manifest import Manifest, Tried


def converted(model: Path, baseline: Path, output: Path, images: str) -> Manifest:
    kind, _, folder = images.partition(":")
    there = kind == "random" or Path(folder).is_dir()
    made = gkp.convert(model, "native", baseline=baseline, output=output, force=True, threads=1, precision="int8",
                       calibration=images if there else "random", data=images if there else None)
    return made.manifest


def line(manifest: Manifest) -> str:
    """What a reader wants to know of it."""
    time, dense = manifest.latency_ms.converted, manifest.latency_ms.dense
    told = "time not measured" if time is None else f"{time.median:.3g} ms"
    if time is not None and dense is not None:
        told += f" (dense in int8: {dense.median:.3g} ms)"
    return f"int8 in native kernels: {told}, {_accuracy(manifest.tried)}"


def _accuracy(tried: Sequence[Tried]) -> str:
    shares = {row.precision: row.correct / row.total for row in tried if row.correct is not None and row.total}
    if "int8" not in shares or "fp32" not in shares:
        return "accuracy not measured: no images in data/"
    return f"{shares['int8']:.2%} of {shares['fp32']:.2%} correct"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("model", "baseline", "output"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--images", default="cifar10:data", metavar="cifar10:DIR|folder:DIR")
    given = parser.parse_args(arguments)
    print(line(converted(given.model, given.baseline, given.output, given.images)))


if __name__ == "__main__":
    main()
