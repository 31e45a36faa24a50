"""Errors call tensors and modules what the checkpoint calls them."""

from __future__ import annotations

import time

import pytest

from gkp.pruning.models import FAMILIES
from gkp.pruning.models.names import FileNames
from gkp.text import clean

CANONICAL = {name: family.canonical for family in FAMILIES for name in family.names}
RESNET = ("conv1.weight", "layer1.0.conv1.weight", "layer2.0.conv1.weight", "layer2.0.conv2.weight", "layer2.0.bn2.bias")


@pytest.mark.parametrize(
    ("family", "names", "ours", "theirs"),
    [
        ("cifar_resnet", RESNET, "stage_2.0.conv_b.weight", "layer2.0.conv2.weight"),
        ("cifar_resnet", RESNET, "stage_2.0.conv_b", "layer2.0.conv2"),
        ("cifar_resnet", RESNET, "stage_1.0.conv_b.weight", "layer1.0.conv2.weight"),
        ("cifar_resnet", RESNET, "stage_1.0.bn_b.running_var", "layer1.0.bn2.running_var"),
        ("cifar_mobilenet", ("layer1.0.d_conv.weight", "layer2.0.p_conv.weight"), "layers.2.conv1.weight",
         "layer2.0.d_conv.weight"),
        ("cifar_vgg", ("features.0.weight", "classifier.0.weight"), "classifier.bias", "classifier.0.bias"),
        ("cifar_vgg", (), "classifier.bias", "classifier.bias"),
    ],
)
def test_names_that_the_file_lacks_are_made_like_those_beside_them(
    family: str, names: tuple[str, ...], ours: str, theirs: str
) -> None:
    assert FileNames(CANONICAL[family], names)(ours) == theirs


def test_a_prefix_is_part_of_the_name() -> None:
    canonical = CANONICAL["cifar_resnet"]
    names = FileNames(lambda name: canonical(name.removeprefix("module.")), [f"module.{name}" for name in RESNET])
    assert names("stage_2.0.conv_b.weight") == "module.layer2.0.conv2.weight"
    assert names("stage_1.0.conv_b") == "module.layer1.0.conv2"


def test_a_name_of_a_million_parts_takes_no_longer_than_reading_it() -> None:
    endless = "a." * 1_000_000
    start = time.process_time()
    assert FileNames(str, [endless])(endless) == clean(endless, 120)
    assert FileNames(str, [endless])("stage_1.0") == "stage_1.0"
    assert FileNames(str, [])(endless) == clean(endless, 120)
    assert time.process_time() - start < 2
