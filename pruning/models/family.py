"""A family of architectures: what its file offers, and what it is told of a checkpoint's tensors.

A new architecture is one file like vgg.py, which offers a `Family`, and one line in the tuple FAMILIES of __init__.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from torch import nn

from gkp.errors import UnsupportedModelError

Scheme = Literal["canonical", "layer"]
Shortcut = Literal["pad", "pad_both", "conv"]

ARCH_HINT = "pass --arch pkg:callable, a function that returns the torch.nn.Module, and --input-shape"
CLASSIFIERS = ("classifier", "fc", "linear")  # what our networks call their last layer
MAX_BLOCKS = 200  # in a stage: the deepest CIFAR ResNet, 1202, has so many
SPURIOUS = "new_weight"  # TMI-GKP's grouped networks hold this alias of their last conv at the root

CIFAR = (3, 32, 32)
IMAGENET = (3, 224, 224)


@dataclass(frozen=True)
class Variant:
    """One network of a family, and which names the checkpoint at hand gives its tensors.

    family: one of the names of its Family; depth: counts convolutions and the classifier, as the papers do.
    shortcut: of a CIFAR ResNet, see CifarResNet; "conv" for all others.
    input_shape: (channels, height, width) of one image.
    scheme: "canonical" (the names of our modules) or "layer" (other usual ones, see the `canonical` of its Family).
    """

    family: str
    depth: int
    shortcut: Shortcut
    num_classes: int
    input_shape: tuple[int, int, int]
    scheme: Scheme = "canonical"


@dataclass(frozen=True)
class State:
    """Tensors of a checkpoint. names: all of them but counters, without a prefix in front; shapes: of those that are at
    hand, which the weights of branched convolutions are not."""

    names: frozenset[str]
    shapes: Mapping[str, tuple[int, ...]]

    @cached_property
    def roots(self) -> frozenset[str]:
        """What stands before the first dot of each name."""
        return frozenset(name.partition(".")[0] for name in self.names)

    def has(self, *roots: str) -> bool:
        """Tell whether the network has modules of all these names."""
        return self.roots.issuperset(roots)

    def classes(self, *names: str) -> int:
        """Outputs of the classifier, which has one of these names. UnsupportedModelError: there is none."""
        for name in names:
            shape = self.shapes.get(f"{name}.weight", ())
            if len(shape) == 2:
                return int(shape[0])
        raise UnsupportedModelError(f"no classifier weight [classes, features] called {' or '.join(names)}", ARCH_HINT)

    def blocks(self, stage: str) -> int:
        """Highest block index of a stage, plus one. UnsupportedModelError: it is not a sequence of blocks."""
        indices = {name.split(".")[1] for name in self.names if name.startswith(f"{stage}.")}
        if not indices or not all(i.isascii() and i.isdigit() and int(i[:4]) < MAX_BLOCKS for i in indices):
            raise UnsupportedModelError(f"{stage} is not a sequence of blocks", ARCH_HINT)
        return max(int(i[:4]) for i in indices) + 1

    def equal_blocks(self, stages: Iterable[str]) -> int:
        """The number of blocks that the three stages have in common. UnsupportedModelError: they differ."""
        blocks = {self.blocks(stage) for stage in stages}
        if len(blocks) != 1:
            raise UnsupportedModelError("the three stages have different numbers of blocks", ARCH_HINT)
        return blocks.pop()


@dataclass(frozen=True)
class Family:
    """Architectures that share a file.

    names: what checkpoints of gkp call them; title: the usual name, such as "resnet{}", {} for the depth.
    recognise: which of them has this state dict; None: no one, another family may know it. UnsupportedModelError: it
    looks like one of them and is not.
    build: the dense network with random weights; None: there is none of this depth and shortcut.
    canonical: our name of the tensor or module that the "layer" scheme calls so; without such a scheme the same name.
    guess: what leaves no trace in its state dicts, in words.
    """

    names: tuple[str, ...]
    title: str
    recognise: Callable[[State], Variant | None]
    build: Callable[[Variant], nn.Module | None]
    canonical: Callable[[str], str] = str
    guess: Callable[[Variant], str] = lambda _: "ReLU"


def renamed(name: str, root: Mapping[str, str], block: Mapping[str, str]) -> str:
    """The name with its first part, the root module, and its third, the module inside a block, as the tables say."""
    parts = name.split(".")
    parts[0] = root.get(parts[0], parts[0])
    if len(parts) > 2:
        parts[2] = block.get(parts[2], parts[2])
    return ".".join(parts)
