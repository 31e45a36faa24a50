"""What a target is, and what the CPU targets share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar, Protocol

import onnx

from gkp.branched import BranchedConv
from gkp.converter.lower.candidates import Candidate, candidates
from gkp.runtime.runners import Runner


class Target(Protocol):
    """One file of this folder. `name`: as in --target. `block`: channels per vector of its fast kernels."""

    name: ClassVar[str]
    summary: ClassVar[str]

    @property
    def block(self) -> int: ...

    @property
    def provider(self) -> str | None: ...

    def require(self, precision: str) -> None:
        """Raise BackendMissingError or UsageError when the target cannot be served here."""
        ...

    def version(self) -> str:
        """Name and version of the runtime, for the measurement cache."""
        ...

    def measurable(self) -> bool:
        """Can models be timed here?"""
        ...

    def runner(self, model: onnx.ModelProto, threads: int) -> Runner: ...

    def candidates(self, conv: BranchedConv, plane: Sequence[int]) -> tuple[Candidate, ...]: ...

    def fast_kernel(self, candidate: Candidate) -> str:
        """Does the runtime's fast kernel take this form? "yes", or "no: why"."""
        ...

    def emit(self, model: onnx.ModelProto, out: Path) -> list[str]:
        """Write the artefact's files into `out`; their names."""
        ...


class StockOnnx(ABC):
    """What the targets share that read stock ONNX: the forms of gkp.converter.lower, one model.onnx."""

    @property
    @abstractmethod
    def block(self) -> int: ...

    padding_slack: ClassVar[float] = 0.03
    """Dense layers are padded to the block by default where it adds at most this share of filters: a remainder of a few
    channels costs the blocked kernels more than that."""

    def candidates(self, conv: BranchedConv, plane: Sequence[int]) -> tuple[Candidate, ...]:
        return candidates(conv, self.block, plane, self.padding_slack)

    def fast_kernel(self, candidate: Candidate) -> str:
        """The rule of the CPU runtimes: a grouped convolution runs in the blocked kernel when its channels per group, in
        and out, are multiples of the vector block (measured with ONNX Runtime: below that it is up to 9 times less
        efficient per multiply-accumulate)."""
        if candidate.is_dense or candidate.parallel:
            return "yes"
        o, i = candidate.groups[0].weight.shape[:2]
        if i % self.block == 0 and o % self.block == 0:
            return "yes"
        return f"no: {i} -> {o} channels per group, needs multiples of {self.block}"

    def emit(self, model: onnx.ModelProto, out: Path) -> list[str]:
        (out / "model.onnx").write_bytes(model.SerializeToString())
        return ["model.onnx"]
