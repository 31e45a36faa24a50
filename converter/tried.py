"""Precisions that were tried: which of them may be taken, and the table that says why."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from gkp import manifest
from gkp.converter.stages import Prepared
from gkp.converter.targets import Target
from gkp.errors import GkpError, VerificationError
from gkp.images.accuracy import Accuracy

AGREEMENT = 0.99
"""Share of inputs that have to stay in their class where there are no labels."""
_BITS = {"int8": 8, "fp16": 16, "bf16": 16, "fp32": 32}
_ROUNDING = 1e-9


class AccuracyError(VerificationError):
    """More accuracy is lost than was allowed. tried: the table to show."""

    def __init__(self, message: str, hint: str, tried: Sequence[manifest.Tried]) -> None:
        super().__init__(message, hint)
        self.tried = tuple(tried)


@dataclass
class Way:
    """A target in one precision. prepared: None where it could not be made; refused: why it is not to be taken, "" while it
    may be; error: what made that impossible; engine: what computed its outputs; agreement: share of `inputs` that it puts in
    the same class as the checkpoint; times: by batch size."""

    target: Target
    prepared: Prepared | None = None
    refused: str = ""
    error: GkpError | None = None
    engine: str | None = None
    accuracy: Accuracy | None = None
    agreement: float | None = None
    inputs: str = ""
    times: Mapping[str, manifest.Timing] = field(default_factory=dict)

    @property
    def precision(self) -> str:
        return self.target.precision

    @property
    def name(self) -> str:
        return f"{self.target.name} {self.precision}"

    @property
    def bits(self) -> int:
        return _BITS[self.precision]


@dataclass(frozen=True)
class Rule:
    """What may be taken. auto: one of several; limit: percentage points that may be lost on labelled images, None: any;
    basis: the accuracy in float32, None without such images; reference: what computes that of the checkpoint itself."""

    auto: bool
    limit: float | None
    basis: Accuracy | None
    reference: str

    def refusal(self, way: Way) -> str:
        """Why it may not be taken, or ""."""
        if self.basis is not None and way.accuracy is not None:
            lost = _lost(way.accuracy, self.basis)
            too_much = self.limit is not None and lost > self.limit + _ROUNDING
            return f"{_points(lost)}, {self.limit:g} are allowed" if too_much else ""
        if way.precision == "fp32" or not self.auto:
            return ""
        if way.agreement is None:
            return "the model gives no classes to compare: only fp32 is taken"
        return f"{_agrees(way)}, less than {100 * AGREEMENT:g} %" if way.agreement < AGREEMENT else ""

    def rows(self, ways: Sequence[Way], taken: Way | None) -> list[manifest.Tried]:
        """The table; first the checkpoint itself, where nothing else is in fp32."""
        basis, rows = self.basis, []
        if basis is not None and all(way.accuracy is not basis for way in ways):
            rows.append(manifest.Tried(target="", precision="fp32", engine=self.reference, correct=basis.correct,
                                       total=basis.total, reason="the checkpoint itself"))
        for way in ways:
            found = way.accuracy
            rows.append(manifest.Tried(
                target=way.target.name, precision=way.precision, engine=way.engine,
                correct=None if found is None else found.correct, total=None if found is None else found.total,
                agreement=way.agreement, latency_ms=dict(way.times) or None, taken=way is taken,
                reason=way.refused or self._reason(way, ways, taken)))
        return rows

    def _reason(self, way: Way, ways: Sequence[Way], taken: Way | None) -> str:
        """Of one that may be taken."""
        close = _agrees(way) if way.agreement is not None else ""
        if way.accuracy is not None and self.basis is not None and way.accuracy is not self.basis:
            close = _points(_lost(way.accuracy, self.basis))
        return ", ".join(part for part in (_why(way, ways, taken, self.auto), close) if part)


def _why(way: Way, ways: Sequence[Way], taken: Way | None, auto: bool) -> str:
    able = [w for w in ways if w.prepared is not None and not w.refused]
    timed = all(w.times for w in able)
    if way is not taken:
        return "" if taken is None else f"slower than {taken.name}" if timed else f"not timed: {taken.name} has fewer bits"
    if len(able) > 1:
        return "the fastest that may be taken" if timed else "the fewest bits that may be taken (not timed)"
    if not auto:
        return "as asked"
    return f"--target {way.target.name} computes in nothing else" if len(ways) == 1 else "the only one that may be taken"


def _lost(found: Accuracy, basis: Accuracy) -> float:
    """Percentage points."""
    return 100 * (basis.correct / basis.total - found.correct / found.total)


def _points(lost: float) -> str:
    return f"{abs(lost):.2f} points {'below' if lost > 0 else 'above'} fp32" if lost else "as accurate as fp32"


def _agrees(way: Way) -> str:
    return f"{100 * (way.agreement or 0):.1f} % of {way.inputs} stay in fp32's class"


def accuracy_data(found: Accuracy | None) -> manifest.AccuracyData | None:
    """Where the images come from."""
    if found is None:
        return None
    origin = found.origin
    mean, std = (None if values is None else list(values) for values in (origin.mean, origin.std))
    return manifest.AccuracyData(kind=origin.kind, split=origin.split, count=found.total, left_out=found.left_out,
                                 sha256=origin.sha256, mean=mean, std=std)
