"""What a source gives: the model as it was published, as ONNX, and a way to compute what the checkpoint computes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import onnx

from gkp.converter.budget import Budget
from gkp.converter.sources import _torchfile
from gkp.errors import FileError, GkpError
from gkp.images.normalisation import Normalisation
from gkp.text import first_line
from gkp.types import Array, Progress, Run, silent


@dataclass(frozen=True)
class OpenOptions:
    """How to open: input_shapes by input name ("" names the only input), arch `pkg:callable`, trust_code. progress: is told
    what is being done."""

    input_shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    arch: str | None = None
    trust_code: bool = False
    progress: Progress = silent

    def shape(self, name: str, default: tuple[int, ...] | None = None) -> tuple[int, ...] | None:
        """The shape asked for this input, else the default."""
        return self.input_shapes.get(name, self.input_shapes.get("", default))


@dataclass(frozen=True)
class GroupedModel:
    """An opened checkpoint.

    model: ONNX as published, with static shapes (nothing simplified). dynamic: the axes that may vary, by input name:
    {axis: name}. reference: computes the checkpoint's own outputs from a dict of inputs. pruned: the file says that it was
    pruned from a dense network (zeros say it of the others: see gkp.converter.twin). own_groups: the groups of its
    convolutions are then its architecture's, and did not come of pruning. dense_width_of: layers known to have
    lost output channels, with the layer that shows how many they had: {"b0.layers_a": "b0.layers_b"}. dense: exports the
    unpruned architecture with random weights, for networks whose lost filters left no trace. at_batch: exports the model
    as published for another batch size, for sources whose exports are static. assumed: the network that the names and shapes
    of a state dict were taken for, "" where the file says more. budget: what is left of what the file may
    cost; None for a module of the caller's own. normalisation: what the model does with its pixels (gkp.converter.pixels),
    None where it takes floats.
    """

    model: onnx.ModelProto
    system: str
    reference: Run
    reference_name: str
    pruned: bool = False
    own_groups: bool = False
    description: str = ""
    assumed: str = ""
    dynamic: Mapping[str, Mapping[int, str]] = field(default_factory=dict)
    dense_width_of: Mapping[str, str] = field(default_factory=dict)
    dense: Callable[[], onnx.ModelProto] | None = None
    at_batch: Callable[[int], onnx.ModelProto] | None = None
    budget: Budget | None = None
    normalisation: Normalisation | None = None


class SourceFile:
    """A file on its way to a source. Its kind is found by content; its payload is read once, with nothing executed.

    budget: what opening it may cost; readers charge it before they take memory or time.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            if path.is_dir():
                raise FileError(f"{path} is a directory", "give a model file")
            size = path.stat().st_size
        except FileNotFoundError:
            raise FileError(f"no such file: {path}", "check the path") from None
        except OSError as e:
            raise FileError(f"{path} cannot be read: {e.strerror}", "check its permissions") from e
        if size == 0:
            raise FileError(f"{path} is empty", "download or save the model again")
        self.budget = Budget(size)

    @cached_property
    def kind(self) -> str:
        """torchscript, torch-zip, torch-legacy, pickle, npy, pt2, onnx, json, ... (by content)."""
        if self.path.suffix == ".onnx":
            return "onnx"
        return str(_torchfile.container_kind(self.path))

    @cached_property
    def payload(self) -> Any:
        """What a PyTorch file holds: plain Python, numpy arrays, inert records (UnsafeFileError when it wants more)."""
        with self.budget.running():
            return _torchfile.read_torch(self.path, self.budget)


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Within it, what Python and numpy say to values that no honest program writes becomes a FileError."""
    try:
        yield
    except GkpError:
        raise
    except (ArithmeticError, AttributeError, LookupError, MemoryError, RecursionError, TypeError, ValueError) as e:
        raise FileError(f"{path} is damaged: {type(e).__name__}: {first_line(e, 200)}", "get the file again") from e


class Source(Protocol):
    """A module of this folder: one file format of one pruning system."""

    @staticmethod
    def matches(file: SourceFile) -> bool:
        """Does this source know what the file is? May read it, must not run it."""
        ...

    @staticmethod
    def open(file: SourceFile, options: OpenOptions) -> GroupedModel: ...


def in_precision(feeds: Mapping[str, Array], io: str) -> dict[str, Array]:
    """The arrays as a model takes them whose float inputs are "fp32" or "fp16"."""
    return {k: x.astype(np.float16) if io == "fp16" and x.dtype == np.float32 else x for k, x in feeds.items()}


def fed(run: Run, io: str) -> Run:
    """The function with float32 inputs, whatever the model's own are."""
    return lambda feeds: run(in_precision(feeds, io))


def sample_inputs(model: onnx.ModelProto, seed: int = 0, batch: int | None = None,
                  dynamic: Mapping[str, Mapping[int, str]] | None = None) -> dict[str, Array]:
    """Standard normal inputs of the model's static shapes (dynamic axis 0 resized to `batch` where given); of uint8 any
    bytes, of other integers 0 and 1 (they are indices, or flags)."""
    rng = np.random.default_rng(seed)
    feeds = {}
    for value in model.graph.input:
        shape = [d.dim_value or 1 for d in value.type.tensor_type.shape.dim]
        if batch is not None and shape and (dynamic is None or 0 in dynamic.get(value.name, {})):
            shape[0] = batch
        dtype = onnx.helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type)
        feeds[value.name] = (rng.standard_normal(shape).astype(dtype) if dtype.kind == "f"
                             else rng.integers(0, 256 if dtype == np.uint8 else 2, shape).astype(dtype))
    return feeds
