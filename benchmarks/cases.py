"""The models that the suites measure: published checkpoints where they are at hand, networks with random weights in the
forms of the pruning systems."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from gkp.benchmarks.networks import aligned, block_diagonal, resnet20, resnet50, tmi_style
from gkp.errors import UsageError
from gkp.images.normalisation import CIFAR10, IMAGENET, Normalisation, cifar10_of
from gkp.text import clean

CPU_TARGETS = ("ort", "openvino", "native")
_IMAGENET, _CIFAR = (1, 3, 224, 224), (1, 3, 32, 32)
_DENSE = partial(resnet50, None)
_BLOCKS = "ResNet-50 block-diagonal 3x3, 8 groups"


@dataclass(frozen=True)
class Case:
    """One model. source: gives a path or a module; baseline: gives the dense one, None: its twin; input_shape: batch first,
    None: as the file says; targets: what to convert it for; trained: it tells images apart; normalisation: of its images."""

    name: str
    source: Callable[[], Any]
    baseline: Callable[[], Any] | None = None
    input_shape: tuple[int, ...] | None = None
    targets: tuple[str, ...] = CPU_TARGETS
    trained: bool = False
    normalisation: Normalisation = IMAGENET

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """As converter and sources take them."""
        return {} if self.input_shape is None else {"": self.input_shape}


def published(checkpoints: Path | None) -> list[Case]:
    """The ResNet-20 of TMI-GKP and of DSP, as far as they are below `checkpoints`."""
    if checkpoints is None:
        return []
    tmi, dsp = checkpoints / "tmi_gkp" / "resnet20_cifar10", checkpoints / "dsp" / "resnet20_g4.pt"
    baseline = partial(Path, tmi / "baseline") if (tmi / "baseline").is_file() else None
    found = [(tmi / "grouped", Case("TMI-GKP ResNet-20", partial(Path, tmi / "grouped"), baseline, trained=True,
                                   normalisation=CIFAR10)),
             (dsp, Case("DSP ResNet-20 g4", partial(Path, dsp), trained=True, normalisation=cifar10_of("dsp")))]
    return [case for path, case in found if path.is_file()]


def named(cases: Sequence[Case], words: Sequence[str]) -> list[Case]:
    """Those in whose names one of the words stands, whatever its case; all without words. UsageError for a word that is in
    none."""
    for word in words:
        if not any(word.lower() in case.name.lower() for case in cases):
            raise UsageError(f"--only: nothing is called {clean(word, 40)!r}",
                             f"networks: {', '.join(case.name for case in cases)}")
    return [case for case in cases if not words or any(word.lower() in case.name.lower() for word in words)]


def cpu_cases(checkpoints: Path | None) -> list[Case]:
    """Of --suite cpu."""
    return [*published(checkpoints), Case(_BLOCKS, partial(resnet50, block_diagonal), None, _IMAGENET),
            Case("ResNet-50 TMI-GKP style 3x3", partial(resnet50, tmi_style), None, _IMAGENET)]


def edge_cases(checkpoints: Path | None) -> list[Case]:
    """Of --suite edge: two ResNet-50, the 3x3 convolutions as TMI-GKP's, and all but the first in aligned groups."""
    return [*published(checkpoints), Case("ResNet-50 TMI-GKP style", partial(resnet50, tmi_style), _DENSE, _IMAGENET),
            Case("ResNet-50 aligned groups", partial(resnet50, aligned, everywhere=True), _DENSE, _IMAGENET)]


def gpu_cases() -> tuple[Case, ...]:
    """Of --suite gpu: groups that share no channel, and groups that overlap."""
    return (Case(_BLOCKS, partial(resnet50, block_diagonal), _DENSE, _IMAGENET),
            Case("ResNet-20 TMI-GKP style, 8 groups", partial(resnet20, tmi_style), partial(resnet20, None), _CIFAR))
