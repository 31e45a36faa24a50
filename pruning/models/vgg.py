"""VGG with BatchNorm for CIFAR (Simonyan and Zisserman 2015, "Very deep convolutional networks ...", table 1, D and kin).

The three fully connected layers of the paper are one, as everywhere for 32x32 images. The names in the state dict are
those of most public code: features.{n}.{weight,bias}, n the place among convs, norms, ReLUs and poolings; classifier.
Structure-LTH leaves the last pooling out and averages what stands there.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from gkp.errors import UnsupportedModelError, UsageError
from gkp.pruning.models.family import ARCH_HINT, CIFAR, Family, State, Variant
from gkp.pruning.models.residual import init_convs
from gkp.pruning.models.wiring import Chain

WIDTHS = (64, 128, 256, 512, 512)
DEPTHS: dict[int, tuple[int, ...]] = {  # convs in each of the five stages, which a max-pooling follows
    11: (1, 1, 2, 2, 2),
    13: (2, 2, 2, 2, 2),
    16: (2, 2, 3, 3, 3),
    19: (2, 2, 4, 4, 4),
}


def conv_places(depth: int) -> list[int]:
    """The n of every conv of the VGG of this depth, in order. KeyError: no such depth."""
    places, n = [], 0
    for convs in DEPTHS[depth]:
        places += [n + 3 * i for i in range(convs)]
        n += 3 * convs + 1
    return places


class CifarVgg(nn.Module):  # type: ignore[misc]
    """x float [N, 3, 32, 32] -> logits [N, num_classes]. Any H and W from 32 on work: the last pooling is global.

    stages: convs in each of the five. last_pool: is the last stage followed by max-pooling, too?
    `normalize` is the identity unless `build` finds a mean and a std.
    """

    def __init__(self, stages: tuple[int, ...], num_classes: int = 10, last_pool: bool = True) -> None:
        super().__init__()
        self.normalize: nn.Module = nn.Identity()
        layers: list[nn.Module] = []
        channels, chain = 3, []
        for convs, width in zip(stages, WIDTHS, strict=True):
            for _ in range(convs):
                chain.append((f"features.{len(layers)}", f"features.{len(layers) + 1}"))
                layers += [nn.Conv2d(channels, width, 3, 1, 1), nn.BatchNorm2d(width), nn.ReLU()]
                channels = width
            layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*(layers if last_pool else layers[:-1]))
        self.chain: Chain = tuple(chain)
        self.classifier = nn.Linear(channels, num_classes)
        init_convs(self)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.features(self.normalize(x))
        return self.classifier(torch.flatten(F.adaptive_avg_pool2d(x, 1), 1))


def cifar_vgg(depth: int, num_classes: int = 10, last_pool: bool = True) -> CifarVgg:
    """VGG-11, 13, 16 or 19. UsageError: any other depth."""
    if depth not in DEPTHS:
        raise UsageError(f"no VGG of depth {depth}", f"use one of {', '.join(map(str, DEPTHS))}")
    return CifarVgg(DEPTHS[depth], num_classes, last_pool)


# ---- the family ------------------------------------------------------------------------------------------------------
def _recognise(state: State) -> Variant | None:
    if not state.has("features", "classifier"):
        return None
    norms = {f"{n.removesuffix('.running_mean')}.weight" for n in state.names if n.endswith(".running_mean")}
    convs = {n for n in state.names if n.startswith("features.") and n.endswith(".weight")} - norms
    family = "cifar_vgg_avgpool" if "normalize.mean" in state.names else "cifar_vgg"
    for depth in DEPTHS:
        if convs == {f"features.{n}.weight" for n in conv_places(depth)}:
            if "classifier.0.weight" in state.shapes:
                return Variant(family, depth, "conv", state.classes("classifier.0"), CIFAR, "layer")
            return Variant(family, depth, "conv", state.classes("classifier"), CIFAR)
    raise UnsupportedModelError("`features` is neither a known VGG with BatchNorm nor DenseNet-86", ARCH_HINT)


def _build(variant: Variant) -> nn.Module | None:
    known = variant.depth in DEPTHS
    return cifar_vgg(variant.depth, variant.num_classes, variant.family == "cifar_vgg") if known else None


def _canonical(name: str) -> str:
    """The "layer" scheme has the classifier in a sequence: classifier.0."""
    return "classifier" + name.removeprefix("classifier.0") if f"{name}.".startswith("classifier.0.") else name


def _guess(variant: Variant) -> str:
    return f"ReLU and {'max-pooling' if variant.family == 'cifar_vgg' else 'an average'} at its end"


FAMILY = Family(("cifar_vgg", "cifar_vgg_avgpool"), "vgg{}", _recognise, _build, _canonical, _guess)
