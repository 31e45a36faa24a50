"""Any other PyTorch checkpoint: a state dict of a known architecture, or of the user's own with --arch."""

from __future__ import annotations

from itertools import islice

from gkp.converter.sources._checkpoints import network_in, open_network, payload_of, state_dict_in
from gkp.converter.sources._modules import RELU, Known
from gkp.converter.sources._prune_masks import apply_masks
from gkp.converter.sources._public_networks import public_hint
from gkp.converter.sources._records import Record
from gkp.converter.sources._torchfile import CHECKPOINTS, state_dict_of
from gkp.converter.sources.base import GroupedModel, OpenOptions, SourceFile
from gkp.errors import GkpError, UnsupportedModelError
from gkp.text import clean

ARCH_HINT = "pass --arch pkg:callable and --input-shape with a state dict, or export the model to ONNX and convert that"
KNOWN_CLASSES = ("torchvision.models.resnet.ResNet",)
TORCHVISION = {
    "torchvision.models.resnet.ResNet": Known(("ImageNetResNet",), {"relu": RELU}, pool="avgpool", free=("maxpool",)),
    "torchvision.models.resnet.BasicBlock": Known(("BasicBlock",), {"relu": RELU}),
    "torchvision.models.resnet.Bottleneck": Known(("Bottleneck",), {"relu": RELU}),
}


def matches(file: SourceFile) -> bool:
    """Whatever torch.save, pickle or safetensors wrote: this is the last of the sources."""
    return file.kind in CHECKPOINTS


def open(file: SourceFile, options: OpenOptions) -> GroupedModel:
    """Rebuild the network (dense), or fill the module of options.arch. A pickled module's masks of torch.nn.utils.prune are
    multiplied in.

    UnsupportedModelError: no state dict, an unknown architecture, or a pickled module of a class that is not known
    (its code is not in the file). UsageError: options.arch fails or does not fit."""
    payload = payload_of(file)
    record = network_in(payload)
    tensors = state_dict_in(payload)
    if record is not None and (options.arch or record.name in KNOWN_CLASSES):
        dense, kept = apply_masks(state_dict_of(record, file.budget), file.budget)
        note = f" ({kept:.1%} of the masked weights kept)" if kept < 1 else ""
        return open_network(file, dense, system="torch", options=options, pruned=kept < 1, record=record,
                            classes=TORCHVISION, description=f"pickled PyTorch module{note}")
    if record is not None and tensors is None:
        raise UnsupportedModelError(f"{file.path} is a pickled module of class {clean(record.name, 100)}, whose code "
                                    "gkp does not have", _hint(record, file))
    if tensors is None:
        raise UnsupportedModelError(f"{file.path} holds no network that gkp knows: {_summary(payload)}", ARCH_HINT)
    writer = "safetensors" if file.kind == "safetensors" else "PyTorch"
    return open_network(file, tensors, system="torch", options=options, description=f"{writer} state dict")


def _hint(record: Record, file: SourceFile) -> str:
    """What to do about a module of a class that is not known: its tensors tell, unless they cost more than that is worth."""
    try:
        return public_hint(state_dict_of(record, file.budget), whole_module=True) or ARCH_HINT
    except GkpError:
        return ARCH_HINT


def _summary(payload: object) -> str:
    if isinstance(payload, dict):
        keys = (clean(key, 30) if isinstance(key, str) else f"a {type(key).__name__}" for key in islice(payload, 8))
        return f"a dict with {', '.join(keys) or 'nothing in it'}"
    return f"a {type(payload).__name__}"
