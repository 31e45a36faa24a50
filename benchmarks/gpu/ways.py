"""Ways to run a network on a GPU, each from an array in the host's memory to one there, as `gkp.load(DIR).run` takes and
gives them: what gkp convert wrote, and PyTorch."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from gkp.benchmarks import adapter
from gkp.benchmarks.cases import Case
from gkp.benchmarks.gpu.engines import nhwc, tensorrt_missing
from gkp.benchmarks.gpu.results import CONVERTED, DENSE, FORMS, PUBLISHED
from gkp.benchmarks.gpu.timer import DTYPES, NEEDS_GPU
from gkp.errors import BackendMissingError, GkpError
from gkp.manifest import Manifest
from gkp.require import install
from gkp.runtime.load import load
from gkp.runtime.runners import import_ort
from gkp.types import Array

_CUDA = "CUDAExecutionProvider"
Call = Callable[[], object]


@dataclass
class Networks:
    """A case in one precision. Artefacts are written below `folder` when they are first asked for, for any batch from the
    smallest to the largest of `batches`, best for the first; manifests: of those, by (form, target)."""

    case: Case
    precision: str
    device: str
    batches: Sequence[int]
    folder: Path
    manifests: dict[tuple[str, str], Manifest] = field(default_factory=dict)
    _failed: dict[tuple[str, str], Exception] = field(default_factory=dict)
    _modules: dict[str, Any] = field(default_factory=dict)

    def module(self, form: str) -> Any:
        """The PyTorch network, of the caller's own: dense, or in the pruning system's form."""
        name = DENSE if form == DENSE else PUBLISHED
        if name not in self._modules:
            make = self.case.baseline if name == DENSE and self.case.baseline else self.case.source
            self._modules[name] = make()
        return copy.deepcopy(self._modules[name])

    def artefact(self, form: str, target: str, options: Mapping[str, Any]) -> Path:
        """What gkp convert writes for the dense network or the pruned one, forms chosen without timing them. What
        the conversion raises is raised again whenever its artefact is asked for."""
        key, folder = (form, target), self.folder / f"{form}.{target}"
        if key in self._failed:
            raise self._failed[key]
        if key not in self.manifests:
            try:
                made = adapter.convert(self.module(form), target, output=folder, input_shapes=self.case.shapes,
                                       precision=self.precision, benchmark=False, **options)
            except Exception as e:
                self._failed[key] = e
                raise
            self.manifests[key] = made.manifest
        return folder

    def leave(self, target: str, why: str) -> None:
        """Convert nothing more for this target."""
        for form in (DENSE, CONVERTED):
            self._failed.setdefault((form, target), GkpError(why))

    def converted(self) -> str:
        """The target of the first converted artefact that there is. GkpError when there is none."""
        found = next((target for form, target in self.manifests if form == CONVERTED), None)
        if found is None:
            raise GkpError("there is no artefact to compare with", "see the reasons of the engines")
        return found


Open = Callable[[Networks, str, Array, ExitStack], Call]


@dataclass(frozen=True)
class Way:
    """open(networks, form, x, stack): a call that computes the form for x, a float32 array; what it holds is closed with the
    stack; raises whatever the engine raises. missing(device): why it is not to be had, None where it is. forms: those it
    runs; converted ones beside PyTorch are the artefact's. seconds: first guess of what preparing and timing takes. target,
    convert, convert_s: of its artefacts, what writes both, and a first guess of how long that takes; of PyTorch none."""

    name: str
    seconds: float
    open: Open
    missing: Callable[[str], str | None]
    forms: Sequence[str] = FORMS
    target: str | None = None
    convert: Callable[[Networks], None] | None = None
    convert_s: float = 0.0


# ---- gkp convert ----------------------------------------------------------------------------------------------------
def artefacts(name: str, target: str, convert_s: float, missing: Callable[[str], str | None],
              options: Callable[[Sequence[int]], Mapping[str, Any]]) -> Way:
    """A target of gkp convert; options(batches): of the conversion."""
    def open_one(networks: Networks, form: str, x: Array, stack: ExitStack) -> Call:
        return _loaded(networks.artefact(form, target, options(networks.batches)), x, stack)

    def convert(networks: Networks) -> None:
        for form in (DENSE, CONVERTED):
            with suppress(Exception):  # told when it is asked for
                networks.artefact(form, target, options(networks.batches))

    return Way(name, 6.0, open_one, missing, (DENSE, CONVERTED), target, convert, convert_s)


def _loaded(artefact: Path, x: Array, stack: ExitStack) -> Call:
    return partial(stack.enter_context(load(artefact)).run, x)


def _profile(batches: Sequence[int]) -> Mapping[str, Any]:
    return {"batch_profile": f"{min(batches)},{batches[0]},{max(batches)}"}


def _on_cuda(batches: Sequence[int]) -> Mapping[str, Any]:
    return {"dynamic_batch": True, "provider": "cuda"}


def _ort_missing(device: str) -> str | None:
    if device != "cuda":
        return NEEDS_GPU
    try:
        ort = import_ort()
    except BackendMissingError as e:
        return e.message
    return None if _CUDA in ort.get_available_providers() else "this ONNX Runtime has no CUDA provider"


# ---- PyTorch --------------------------------------------------------------------------------------------------------
def _pytorch(arrange: Callable[[Any], Any], compiles: bool) -> Open:
    def open_one(networks: Networks, form: str, x: Array, stack: ExitStack) -> Call:
        if form == CONVERTED:
            return _loaded(networks.folder / f"{form}.{networks.converted()}", x, stack)
        dtype = DTYPES[networks.precision]
        network = arrange(networks.module(form).to(networks.device, dtype))
        if compiles:
            network = torch.compile(network, dynamic=False)
            stack.callback(torch.compiler.reset)  # what was compiled before counts towards a limit
        host = torch.from_numpy(x)
        return lambda: network(arrange(host.to(networks.device, dtype))).cpu()

    return open_one


def _as_it_is(value: Any) -> Any:
    return value


def _always(device: str) -> str | None:
    return None


def _on_gpu(device: str) -> str | None:
    return None if device == "cuda" else NEEDS_GPU


COMPILED = Way("torch.compile", 90.0, _pytorch(nhwc, True), _on_gpu)
ARTEFACTS = (artefacts("TensorRT", "trt", 120.0, tensorrt_missing, _profile),
             artefacts("ORT CUDA", "ort", 80.0, _ort_missing, _on_cuda))
WAYS = (*ARTEFACTS, Way("channels_last", 5.0, _pytorch(nhwc, False), _always),
        Way("PyTorch eager", 5.0, _pytorch(_as_it_is, False), _always), COMPILED)
"""In the order in which they are timed: artefacts first, which PyTorch is then compared with."""


def require_artefacts() -> None:
    """BackendMissingError when nothing that gkp convert writes could run on the GPU here."""
    reasons = {way.name: way.missing("cuda") for way in ARTEFACTS}
    if all(reasons.values()):
        raise BackendMissingError("nothing here runs what gkp convert writes for a GPU: "
                                  + "; ".join(f"{name}: {why}" for name, why in reasons.items()),
                                  install("torch,gpu,trt"))
