"""Choose a form for every layer: measured in the whole model where the runtime is here, estimated where it is not."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from gkp.branched import BranchedConv
from gkp.converter import node as branched_node
from gkp.converter.cache import Cache, Entry
from gkp.converter.cost import estimate_ms
from gkp.converter.dynamic import free_axes
from gkp.converter.graph import Graph, spatial
from gkp.converter.lower.candidates import DENSE_PADDED, Candidate, candidates
from gkp.converter.lower.emit import lower
from gkp.converter.sources.base import sample_inputs
from gkp.converter.targets.base import Target
from gkp.errors import UsageError
from gkp.manifest import CandidateTime
from gkp.runtime.environment import cpu_model
from gkp.runtime.measure import interleave, ratio, timing
from gkp.runtime.runners import Runner

Progress = Callable[[str, float], None]
STRATEGIES = ("auto", "dense", "fuse", "split")
_SCREEN_ROUNDS, _SCREEN_RATIO = 5, 0.97
_FINALISTS, _ROUNDS = 3, 9
_HOPELESS, _MOST_TRIED = 2.5, 4
_BATCH_MS_LIMIT = 120.0


@dataclass(frozen=True)
class Settings:
    """How to choose. batches: the batch sizes that count (the artefact's own, or 1 and 64). measure: time candidates.
    default: what a layer is when nothing beats it ("dense"; "given" keeps the groups of a model designed with them)."""

    strategy: str = "auto"
    overrides: Mapping[str, str] = field(default_factory=dict)
    threads: int = 1
    batches: tuple[int, ...] = (1,)
    measure: bool = True
    default: str = "dense"
    dynamic: Mapping[str, Mapping[int, str]] = field(default_factory=dict)


@dataclass
class LayerChoice:
    """One layer: all candidates with what is known of them, the chosen one and why."""

    conv: BranchedConv
    plane: tuple[int, ...]
    options: tuple[Candidate, ...]
    chosen: Candidate
    reason: str
    times: dict[str, CandidateTime]

    def take(self, name: str, reason: str) -> None:
        self.chosen = next(c for c in self.options if c.name == name)
        self.reason = reason


Choice = dict[str, LayerChoice]


def choose(graph: Graph, target: Target, settings: Settings, progress: Progress = lambda text, share: None) -> Choice:
    """A candidate for every BranchedConv of the (simplified) graph. UsageError for unknown layers or candidates."""
    choice = {node.name: _layer(node, target, settings) for node in graph.branched()}
    unknown = [name for name in settings.overrides if name not in choice]
    if unknown:
        raise UsageError(f"--layer: no layer is called {unknown[0]!r}", f"layers: {', '.join(choice)}")
    if settings.strategy == "auto":
        if settings.measure and target.measurable():
            _Measuring(graph, target, settings, choice, progress).run()
        else:
            _estimate(choice, target)
    for name, wanted in settings.overrides.items():
        layer = choice[name]
        if wanted not in {c.name for c in layer.options}:
            raise UsageError(f"--layer: {name} has no form {wanted!r}",
                             f"its forms: {', '.join(c.name for c in layer.options)}")
        layer.take(wanted, "asked for with --layer")
    return choice


def chosen(choice: Choice) -> dict[str, Candidate]:
    """The candidates to lower with."""
    return {name: layer.chosen for name, layer in choice.items()}


def all_default(choice: Choice, default: str) -> dict[str, Candidate]:
    """Every layer in its default form."""
    return {name: _default(layer.options, default) for name, layer in choice.items()}


def _default(options: Sequence[Candidate], default: str) -> Candidate:
    given = [c for c in options if not c.parallel and not c.is_dense and not c.name.endswith("-padded")]
    return max(given, key=lambda c: len(c.groups), default=options[0]) if default == "given" else options[0]


def _layer(node: Any, target: Target, settings: Settings) -> LayerChoice:
    conv = branched_node.read(node)
    plane = spatial(node.outputs[0])
    options = target.candidates(conv, plane or (1,)) if plane else candidates(conv, target.block, (1,))
    first = _default(options, settings.default)
    reason = "one branch" if len(options) == 1 and len(conv.branches) < 2 else f"default: {first.name}"
    if conv.is_copy:
        reason = "moves channels only"
    elif len(options) == 1 and len(conv.branches) > 1:
        reason = "no other form executes fewer multiply-accumulates"
    if settings.strategy in ("fuse", "split") and len(options) > 1:
        wanted = [c for c in options if not c.is_dense and c.parallel == (settings.strategy == "split")
                  and not c.name.endswith("-padded")]
        if wanted:
            first, reason = max(wanted, key=lambda c: len(c.groups)), f"--strategy {settings.strategy}"
    times = {c.name: CandidateTime(name=c.name, macs_executed=c.macs(plane or (1,))) for c in options}
    return LayerChoice(conv, plane or (1,), options, first, reason, times)


def _estimate(choice: Choice, target: Target) -> None:
    for layer in choice.values():
        if len(layer.options) < 2:
            continue
        ms = {c.name: estimate_ms(layer.conv, c, layer.plane, target.block) for c in layer.options}
        layer.times = {c.name: CandidateTime(name=c.name, macs_executed=c.macs(layer.plane), estimated_ms=ms[c.name])
                       for c in layer.options}
        best = min(ms, key=lambda name: ms[name])
        layer.take(best, "estimated fastest (not measured)")


class _Measuring:
    """Times candidates in context: the whole model with all layers of one kind in another form, against all dense."""

    def __init__(self, graph: Graph, target: Target, settings: Settings, choice: Choice, progress: Progress) -> None:
        self.graph, self.target, self.settings, self.choice, self.progress = graph, target, settings, choice, progress
        self.default = all_default(choice, settings.default)
        self.model = graph.to_model()
        self.cache = Cache()
        self.context = Cache.key({"runtime": target.version(), "cpu": cpu_model(), "threads": settings.threads,
                                  "default": settings.default, "dynamic": str(settings.dynamic),
                                  "model": _structure(graph)})

    def run(self) -> None:
        kinds: dict[str, list[str]] = {}
        for name, layer in self.choice.items():
            if len(self._worth_trying(layer)) > 0:
                kinds.setdefault(_signature(layer), []).append(name)
        padded = [n for n, layer in self.choice.items() if any(c.name == DENSE_PADDED for c in layer.options)]
        if not kinds and not padded:
            return
        base = self._runner(self.default)
        batches = self._batches(base)
        if padded and self.settings.default == "dense":  # together: one layer alone changes too little to be seen
            self.progress(f"measuring {len(padded)} layers with padded channels", 0.0)
            if self._measure(padded, [DENSE_PADDED], base, batches):
                base.close()
                base = self._runner(self.default)
        for number, names in enumerate(kinds.values()):
            self.progress(f"measuring {names[0]}" + (f" and {len(names) - 1} like it" if len(names) > 1 else ""),
                          number / len(kinds))
            self._measure(names, self._worth_trying(self.choice[names[0]]), base, batches)
        base.close()
        self.cache.save()

    def _worth_trying(self, layer: LayerChoice) -> list[str]:
        """The candidates other than the default that the cost model ranks best, none that it puts far behind."""
        default = _default(layer.options, self.settings.default)
        limit = _HOPELESS * estimate_ms(layer.conv, default, layer.plane, self.target.block)
        out: list[tuple[float, str]] = []
        for c in layer.options:
            if c.name in (default.name, DENSE_PADDED):
                continue
            estimate = estimate_ms(layer.conv, c, layer.plane, self.target.block)
            layer.times[c.name] = CandidateTime(name=c.name, macs_executed=layer.times[c.name].macs_executed,
                                                estimated_ms=estimate)
            if estimate <= limit:
                out.append((estimate, c.name))
            else:
                layer.reason = "every other form is estimated to be over " \
                               f"{_HOPELESS:g} times slower (too few channels per group)"
        return [name for _, name in sorted(out)[:_MOST_TRIED]]

    def _runner(self, forms: Mapping[str, Candidate]) -> Runner:
        model = free_axes(lower(self.graph, forms).to_model(), self.settings.dynamic)
        return self.target.runner(model, self.settings.threads)

    def _batches(self, base: Runner) -> list[int]:
        """The smallest batch that counts, and the largest, or what still runs in 0.3 s in its place."""
        wanted = sorted(set(self.settings.batches))
        if len(wanted) == 1:
            return wanted
        feeds = self._feeds(wanted[0])
        once = timing(interleave({"base": lambda: base.run(feeds)}, budget_s=0.2)["base"]).median
        largest = min(wanted[-1], max(wanted[0] * 2, int(_BATCH_MS_LIMIT / max(once, 1e-3)) * wanted[0]))
        return [wanted[0], largest]

    def _feeds(self, batch: int) -> dict[str, Any]:
        return sample_inputs(self.model, batch=batch if self.settings.dynamic else None)

    def _measure(self, names: list[str], tried: list[str], base: Runner, batches: list[int]) -> bool:
        """Time the candidates `tried` for these layers together; take the best if it beats what is there now."""
        known: dict[str, dict[int, Entry]] = {c: {} for c in tried}
        forms = {n: c.name for n, c in self.default.items()}
        keys = {(c, b): Cache.key({"context": self.context, "default": forms, "layers": names, "form": c, "batch": b})
                for c in tried for b in batches}
        for (c, b), key in keys.items():
            if (entry := self.cache.get(key)) is not None:
                known[c][b] = entry
        missing = [] if any(known.values()) else tried
        if missing:
            for c, found in self._time(names, missing, base, batches).items():
                known[c] = found
                for b, entry in found.items():
                    self.cache.put(keys[c, b], entry)
        return self._take(names, known, len(batches))

    def _time(self, names: list[str], missing: list[str], base: Runner,
              batches: list[int]) -> dict[str, dict[int, Entry]]:
        """All candidates briefly at the first batch, the best few of them thoroughly, the winners at the next batch."""
        runners = {c: self._runner({**self.default, **{n: self._option(n, c) for n in names}}) for c in missing}
        found: dict[str, dict[int, Entry]] = {c: {} for c in missing}
        left = list(missing)
        for number, batch in enumerate(batches):
            feeds = self._feeds(batch)

            def sample(which: list[str], budget_s: float, rounds: int, batch: int = batch, feeds: Any = feeds) -> None:
                calls = {c: _caller(r, feeds) for c, r in {"": base, **{c: runners[c] for c in which}}.items()}
                samples = interleave(calls, budget_s=budget_s, min_rounds=rounds)
                for c in which:
                    found[c][batch] = _entry(samples[""], samples[c])

            if number == 0:
                sample(left, 0.0, _SCREEN_ROUNDS)
                left = sorted((c for c in left if found[c][batch].ratio.value > _SCREEN_RATIO),
                              key=lambda c: -found[c][batch].ratio.value)[:_FINALISTS]
            if left:
                sample(left, 0.4 * (1 + len(left)), _ROUNDS)
            left = [c for c in left if found[c][batch].ratio.low > 1]
        for runner in runners.values():
            runner.close()
        return found

    def _option(self, layer: str, name: str) -> Candidate:
        return next(c for c in self.choice[layer].options if c.name == name)

    def _take(self, names: list[str], known: dict[str, dict[int, Entry]], batches: int) -> bool:
        winners = {c: min(e.ratio.value for e in found.values()) for c, found in known.items()
                   if len(found) == batches and all(e.ratio.low > 1 for e in found.values())}
        best = max(winners, key=lambda c: winners[c], default=None)
        for name in names:
            layer = self.choice[name]
            for c, found in known.items():
                first = next(iter(found.values()), None)
                layer.times[c] = CandidateTime(name=c, macs_executed=layer.times[c].macs_executed,
                                               ms=first.ms if first else None,
                                               ratios={str(b): e.ratio for b, e in found.items()})
            if best is None:
                worst = {c: min(e.ratio.value for e in found.values()) for c, found in known.items() if found}
                tried = max(worst, key=lambda c: worst[c])
                layer.reason = f"measured: the best other form, {tried}, is {worst[tried]:.2f}x in the model"
            else:
                layer.take(best, f"measured: {winners[best]:.3f}x in the model ({len(names)} layers together)")
                if best == DENSE_PADDED:
                    self.default[name] = layer.chosen
        return best is not None


def _caller(runner: Runner, feeds: dict[str, Any]) -> Callable[[], object]:
    return lambda: runner.run(feeds)


def _entry(base: list[float], other: list[float]) -> Entry:
    return Entry(ms=timing(other).median, ratio=ratio(base, other))


def _signature(layer: LayerChoice) -> str:
    """Layers with equal signatures are measured together: geometry, plane and branch sizes."""
    c = layer.conv
    sizes = sorted((b.in_index.size, b.out_index.size) for b in c.branches)
    return str((c.in_channels, c.out_channels, c.kernel_shape, c.strides, c.pads, c.dilations, layer.plane, sizes))


def _structure(graph: Graph) -> str:
    """Digest of the operators, shapes and index lists: everything but the weights."""
    parts = []
    for node in graph.nodes:
        attrs = {k: str(np.asarray(v).tolist()) for k, v in sorted(node.attrs.items())
                 if isinstance(v, (list, tuple, int, float, str))}
        parts.append([node.op, attrs, [str(t.shape) for t in (*node.inputs, *node.outputs)]])
    return Cache.key({"nodes": parts})


