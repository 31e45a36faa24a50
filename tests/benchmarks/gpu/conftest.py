"""The GPU suite at a size that a CPU runs in a moment."""

from __future__ import annotations

from functools import partial

import pytest

from gkp.benchmarks.cases import Case
from gkp.benchmarks.gpu.suite import Settings
from gkp.benchmarks.gpu.sweep import Shape
from gkp.benchmarks.networks import resnet20, tmi_style


@pytest.fixture
def small() -> Case:
    """A TMI-style ResNet-20 on 8x8 images."""
    return Case("small", partial(resnet20, tmi_style), partial(resnet20, None), (1, 3, 8, 8))


@pytest.fixture
def settings(small: Case) -> Settings:
    """That network, two layers, one Gather."""
    return Settings(device="cpu", budget_s=300.0, seconds=0.01, batches=(1, 2), precisions=("fp32",), cases=(small,),
                    main=(Shape(16, 4, batch=2),), rest=(Shape(8, 4, kernel=1, batch=2),), gathers=(Shape(16, 4, batch=2),))
