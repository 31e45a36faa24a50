"""Exports twenty well-known networks as ONNX files, for `gkp bench --suite zoo`.

    python tools/export_zoo.py OUT [--only NAME ...]

Weights are random, from a fixed seed: times hardly depend on values, and nothing is downloaded. One pass over random images
sets the statistics of every BatchNormalization, so that activations stay in range. torchvision and timm, which hold the
networks, are no part of gkp: install versions that fit the PyTorch that is here.

One line per network. A package that is not installed is exit code 4, before anything is written; a network that cannot be
exported is said, the rest goes on, and the exit code is 1.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import onnx
import torch
from torch import nn

from gkp.errors import BackendMissingError, FileError, GkpError, UnsupportedModelError, UsageError
from gkp.text import one_line, plural

OPSET = 17
IMAGES = 4  # of the calibration; one alone leaves a BatchNormalization behind a global pool without a variance


@dataclass(frozen=True)
class Network:
    """make: the module, from the package where it is of one; size: height and width of its images; finish: a last change
    of the module, once it has its statistics."""

    name: str
    make: Callable[..., Any]
    package: str | None = None
    size: int = 224
    finish: Callable[[Any], Any] | None = None


class _Out(nn.Module):  # type: ignore[misc]
    """The segmentation alone, of a network that answers with a dictionary."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Any) -> Any:
        return self.model(x)["out"]


def _double(inside: int, outside: int) -> Any:
    layers: list[Any] = []
    for channels in (inside, outside):
        layers += [nn.Conv2d(channels, outside, 3, padding=1, bias=False), nn.BatchNorm2d(outside), nn.ReLU()]
    return nn.Sequential(*layers)


class UNet(nn.Module):  # type: ignore[misc]
    """Ronneberger, Fischer, Brox: U-Net, 2015, with padded convolutions and BatchNormalization: `levels` halvings, as many
    transposed convolutions up again, each level beside what came down there. [N, 3, H, W] to [N, classes, H, W]; H and W
    divisible by 2**levels."""

    def __init__(self, width: int = 32, levels: int = 4, classes: int = 2) -> None:
        super().__init__()
        widths = [width << level for level in range(levels + 1)]
        self.down = nn.ModuleList(_double(a, b) for a, b in zip([3, *widths], widths, strict=False))
        self.up = nn.ModuleList(nn.ConvTranspose2d(2 * w, w, 2, stride=2) for w in reversed(widths[:-1]))
        self.join = nn.ModuleList(_double(2 * w, w) for w in reversed(widths[:-1]))
        self.head = nn.Conv2d(width, classes, 1)

    def forward(self, x: Any) -> Any:
        kept = []
        for number, block in enumerate(self.down):
            x = block(x if number == 0 else nn.functional.max_pool2d(x, 2))
            kept.append(x)
        kept.pop()
        for up, join in zip(self.up, self.join, strict=True):
            x = join(torch.cat([kept.pop(), up(x)], 1))
        return self.head(x)


def _torchvision(package: Any, name: str, **options: Any) -> Any:
    return getattr(package.models, name)(weights=None, **options)


def _googlenet(package: Any) -> Any:
    return package.models.googlenet(weights=None, aux_logits=False, init_weights=True)


def _deeplab(package: Any) -> Any:
    made = package.models.segmentation.deeplabv3_mobilenet_v3_large(weights=None, weights_backbone=None, aux_loss=False)
    return _Out(made)


def _timm(package: Any, name: str) -> Any:
    return package.create_model(name, pretrained=False)


def _merged(model: Any) -> Any:
    """RepVGG as it is deployed: the branches of a block as one convolution."""
    return importlib.import_module("timm.utils").reparameterize_model(model)


def _of_torchvision(name: str) -> Network:
    return Network(name, partial(_torchvision, name=name), "torchvision")


ZOO = (
    *map(_of_torchvision, ("resnet18", "resnet50", "resnext50_32x4d", "wide_resnet50_2", "regnet_x_800mf", "regnet_y_400mf",
                           "shufflenet_v2_x1_0", "mobilenet_v2", "mobilenet_v3_small", "efficientnet_b0", "densenet121",
                           "convnext_tiny", "squeezenet1_1")),
    Network("googlenet", _googlenet, "torchvision"),
    _of_torchvision("vgg16_bn"),
    Network("ghostnet_100", partial(_timm, name="ghostnet_100"), "timm"),
    Network("repvgg_a2", partial(_timm, name="repvgg_a2"), "timm", finish=_merged),
    Network("res2net50_26w_4s", partial(_timm, name="res2net50_26w_4s"), "timm"),
    Network("deeplabv3_mobilenet_v3_large", _deeplab, "torchvision", size=320),
    Network("unet", UNet, size=256),
)


def packages(networks: Sequence[Network]) -> dict[str, Any]:
    """The packages that these networks are of, by name. BackendMissingError, which names all that are missing."""
    found: dict[str, Any] = {}
    missing = []
    for name in dict.fromkeys(n.package for n in networks if n.package is not None):
        try:
            found[name] = importlib.import_module(name)
        except (ImportError, RuntimeError) as e:  # RuntimeError: of a torchvision that was built for another PyTorch
            absent = isinstance(e, ModuleNotFoundError) and e.name == name
            missing.append(f"{name} {'is not installed' if absent else f'does not work here ({one_line(e, 200)})'}")
    if missing:
        raise BackendMissingError("; ".join(missing), "pip install --no-deps torchvision timm, in versions for PyTorch "
                                  f"{torch.__version__}, or choose others with --only")
    return found


def calibrate(model: Any, x: Any) -> None:
    """Set the statistics of every BatchNormalization to those of these images. What else training changes stays off. One
    that begins at zero (the last of a residual branch, in timm) is set to one: else the branch computes nothing, and a
    converter that notices that measures another network."""
    model.eval()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            if module.weight is not None and not module.weight.any():
                nn.init.ones_(module.weight)
            module.reset_running_stats()
            module.momentum = None  # the average of all passes, of which there is one
            module.train()
    model(x)
    model.eval()


def export(network: Network, package: Any, path: Path) -> int:
    """Write one network; the number of its weights. UnsupportedModelError when what it computes is not finite. Errors of
    torchvision, timm and the exporter come through."""
    torch.manual_seed(0)
    model = network.make() if package is None else network.make(package)
    x = torch.randn(IMAGES, 3, network.size, network.size)
    with torch.no_grad():
        calibrate(model, x)
        if network.finish is not None:
            model = network.finish(model).eval()
        if not torch.isfinite(model(torch.randn_like(x))).all():
            raise UnsupportedModelError(f"{network.name} computes numbers that are not finite")
        torch.onnx.export(model, (x[:1],), str(path), opset_version=OPSET, dynamo=False, input_names=["input"],
                          output_names=["output"])
    onnx.checker.check_model(str(path))
    return sum(p.numel() for p in model.parameters())


def run(out: Path, networks: Sequence[Network]) -> int:
    """Write OUT/NAME.onnx of each, one line per network; an exit code. GkpErrors: packages are missing, OUT is no folder."""
    found = packages(networks)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise FileError(f"cannot make {out}: {e.strerror}", "choose another folder") from e
    failed = 0
    for number, network in enumerate(networks, 1):
        started = time.monotonic()
        with tempfile.TemporaryDirectory(dir=out, prefix=".export-") as folder:
            path = Path(folder) / "model.onnx"
            try:
                weights = export(network, found.get(network.package or ""), path)
                os.replace(path, out / f"{network.name}.onnx")
            except Exception as e:  # of torchvision, timm or the exporter
                failed += 1
                told = f"failed: {one_line(e, 200) or type(e).__name__}"
            else:
                told = f"{weights / 1e6:.1f} M weights, {time.monotonic() - started:.0f} s"
        print(f"[{number}/{len(networks)}] {network.name}: {told}", file=sys.stderr, flush=True)
    if failed:
        print(f"error: {plural(failed, 'network')} of {len(networks)} could not be exported", file=sys.stderr)
    return 1 if failed else 0


def _chosen(names: Sequence[str]) -> list[Network]:
    """UsageError for a name that is not among them."""
    unknown = [name for name in names if name not in {n.name for n in ZOO}]
    if unknown:
        raise UsageError(f"there is no network {one_line(', '.join(unknown))}",
                         f"take some of {', '.join(n.name for n in ZOO)}")
    return [network for network in ZOO if not names or network.name in names]


def main(arguments: Sequence[str] | None = None) -> int:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, metavar="OUT", help="the folder to write NAME.onnx into")
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="these networks instead of all")
    given = parser.parse_args(arguments)
    warnings.simplefilter("ignore")  # the exporter's, about itself and about shapes that it takes for constant
    try:
        return run(given.out, _chosen(given.only))
    except GkpError as e:
        print(f"error: {e.message}\n  try: {e.hint}", file=sys.stderr)
        return e.exit_code


if __name__ == "__main__":
    sys.exit(main())
