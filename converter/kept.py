"""Which operators of a model in half precision stay in float32: said in the file itself, where its builder looks it up."""

from __future__ import annotations

import json
from collections.abc import Collection

import onnx

_KEY = "gkp.fp32"


def mark_kept(model: onnx.ModelProto, names: Collection[str]) -> onnx.ModelProto:
    """The same model, with the names of the nodes that stay in float32 in its metadata, in place of what its source says
    there."""
    for entry in [e for e in model.metadata_props if e.key == _KEY]:
        model.metadata_props.remove(entry)
    if names:
        model.metadata_props.add(key=_KEY, value=json.dumps(sorted(names)))
    return model


def kept_fp32(model: onnx.ModelProto) -> list[str]:
    """Names of the nodes that were kept in float32, of a model that mark_kept returned; empty where nothing says so."""
    return [str(name) for entry in model.metadata_props if entry.key == _KEY for name in json.loads(entry.value)]
