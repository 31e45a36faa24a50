"""Networks that state dicts are recognised as, and the modules that hold grouped convolutions."""

from __future__ import annotations

from gkp.pruning.models import densenet, mobilenet, preresnet, resnet12, resnet_cifar, resnet_imagenet, vgg
from gkp.pruning.models.family import Family

# The first one that recognises a state dict builds it.
FAMILIES: tuple[Family, ...] = (resnet_cifar.FAMILY, mobilenet.FAMILY, resnet_imagenet.FAMILY, preresnet.FAMILY,
                                densenet.FAMILY, vgg.FAMILY, resnet12.FAMILY)
