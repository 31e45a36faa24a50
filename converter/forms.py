"""The nouns of choosing: settings, and per layer its candidates, the chosen one and why."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from gkp.branched import BranchedConv
from gkp.converter.encoding import Encoding
from gkp.converter.lower.candidates import Candidate
from gkp.manifest import CandidateTime
from gkp.text import plural

Forms = Mapping[str, Candidate]
"""The form of every layer, by its name; a layer that is not in it is dense."""


@dataclass(frozen=True)
class Settings:
    """How to choose. batches: the batch sizes that count (the artefact's own, or 1 and 64). measure: time candidates.
    default: what a layer is when nothing beats it ("dense"; "given" keeps the groups of a model designed with them);
    own_groups: layers that keep them in any case. encoding: of the models that are measured."""

    strategy: str = "auto"
    overrides: Mapping[str, str] = field(default_factory=dict)
    threads: int = 1
    batches: tuple[int, ...] = (1,)
    measure: bool = True
    default: str = "dense"
    own_groups: frozenset[str] = frozenset()
    dynamic: Mapping[str, Mapping[int, str]] = field(default_factory=dict)
    encoding: Encoding = field(default_factory=Encoding)

    def default_form(self, name: str, options: Sequence[Candidate]) -> Candidate:
        """That of a layer."""
        given = self.default == "given" or name in self.own_groups
        exact = [c for c in options if not c.parallel and not c.is_dense and not c.name.endswith("-padded")]
        return max(exact, key=lambda c: len(c.groups), default=options[0]) if given else options[0]


@dataclass
class LayerChoice:
    """One layer: all candidates with what is known of them, the chosen one and why. estimated: there was something to
    choose, and the cost model has; versus: the form that measured ratios are relative to; late: the time for trials was up
    before its kind was tried."""

    conv: BranchedConv
    plane: tuple[int, ...]
    options: tuple[Candidate, ...]
    chosen: Candidate
    reason: str
    times: dict[str, CandidateTime]
    estimated: bool = False
    versus: str = ""
    late: bool = False

    def take(self, name: str, reason: str) -> None:
        self.chosen = next(c for c in self.options if c.name == name)
        self.reason = reason


Choice = dict[str, LayerChoice]


def untried(choice: Choice) -> tuple[str, ...]:
    """What is to be said of the layers that came too late to be tried."""
    late = [layer for layer in choice.values() if layer.late]
    if not late:
        return ()
    macs, total = (sum(layer.chosen.macs(layer.plane) for layer in layers) for layers in (late, choice.values()))
    return (f"the time for trying forms was up before {plural(len(late), 'layer')} with {macs / max(1, total):.1%} of the "
            "multiply-accumulates: they have the forms in which the whole model was measured before",)


def chosen(choice: Choice) -> dict[str, Candidate]:
    """The candidates to lower with."""
    return {name: layer.chosen for name, layer in choice.items()}


def all_default(choice: Choice, settings: Settings) -> dict[str, Candidate]:
    """Every layer in its default form."""
    return {name: settings.default_form(name, layer.options) for name, layer in choice.items()}
