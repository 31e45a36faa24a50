"""The table of architectures: each is one file and one line."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from gkp.errors import UnsupportedModelError
from gkp.pruning import models
from gkp.pruning.models import FAMILIES
from gkp.pruning.models.architecture import Architecture, skeleton
from gkp.pruning.models.family import CIFAR, Family, State, Variant
from gkp.pruning.models.recognise import recognise

FOLDER = Path(models.__file__).parent


def test_a_new_architecture_is_one_file_and_one_line() -> None:
    texts = {path.name: path.read_text() for path in FOLDER.glob("*.py")}
    for family in FAMILIES:
        mentioned = [name for name, text in texts.items() if any(f'"{own}"' in text for own in family.names)]
        assert len(mentioned) == 1, f"{family.names} are known to {mentioned}"
        assert f"{mentioned[0].removesuffix('.py')}.FAMILY" in texts["__init__.py"]
    assert sum("\nFAMILY = " in text for text in texts.values()) == len(FAMILIES)


def test_every_name_is_one_familys() -> None:
    names = [name for family in FAMILIES for name in family.names]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize(("family", "depth", "shortcut"), [
    ("cifar_resnet", 20, "none"), ("cifar_resnet", 21, "pad"), ("cifar_resnet", 10**9 + 2, "pad"), ("imagenet_resnet", 20, "conv"),
    ("cifar_preresnet", 12, "conv"), ("cifar_densenet", 41, "conv"), ("cifar_vgg", 15, "conv"), ("cifar_mobilenet", 20, "conv"),
    ("resnet12", 18, "conv"), ("no_family", 20, "conv")])
def test_what_no_family_builds_is_named(family: str, depth: int, shortcut: str) -> None:
    with pytest.raises(UnsupportedModelError, match=f"no architecture '{family}' of depth {depth} with shortcut '{shortcut}'"):
        skeleton(Architecture(family, depth, shortcut, 10, CIFAR))


def test_the_first_family_that_recognises_a_state_dict_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[State] = []

    def known(state: State) -> Variant | None:
        seen.append(state)
        return Variant("toy", 3, "conv", state.classes("head"), CIFAR) if state.has("stem", "head") else None

    toy = Family(("toy",), "toynet{}", known, lambda variant: None)
    monkeypatch.setattr("gkp.pruning.models.recognise.FAMILIES", (*FAMILIES, toy))
    monkeypatch.setattr("gkp.pruning.models.architecture.FAMILIES", (*FAMILIES, toy))
    tensors = {"module.stem.weight": np.zeros((4, 3, 3, 3)), "module.head.weight": np.zeros((7, 4)),
               "module.stem.num_batches_tracked": np.zeros(())}
    found = recognise(tensors, ["module.branches"])
    assert (found.name, found.num_classes, found.prefix) == ("toynet3", 7, "module.")
    assert seen == [State(frozenset({f"{prefix}stem.weight", f"{prefix}head.weight", f"{prefix}branches.weight"}),
                          {f"{prefix}stem.weight": (4, 3, 3, 3), f"{prefix}head.weight": (7, 4)}) for prefix in ("module.", "")]


@pytest.mark.parametrize("classes", [0, 5_000_000])
def test_more_classes_than_any_data_set_has_are_refused_before_they_take_memory(classes: int) -> None:
    with pytest.raises(UnsupportedModelError, match=f"and {classes} classes"):
        skeleton(Architecture("cifar_resnet", 20, "pad", classes, (3, 32, 32)))
