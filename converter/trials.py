"""Trials: candidates timed in the whole model, because an isolated layer pays layout changes that the model does not."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from gkp.converter.cache import Cache, FormTime
from gkp.converter.forms import Choice, LayerChoice, Settings, all_default
from gkp.converter.graph import Graph
from gkp.converter.lower.candidates import DENSE_PADDED, Candidate
from gkp.converter.sources.base import in_precision, sample_inputs
from gkp.converter.targets.base import Target
from gkp.manifest import CandidateTime
from gkp.runtime.environment import cpu_model
from gkp.runtime.measure import interleave, ratio, timing
from gkp.runtime.runners import Runner
from gkp.types import Progress

_SCREEN_ROUNDS, _SCREEN_RATIO = 5, 0.97
_FINALISTS, _ROUNDS = 3, 13
_SPLIT_HANDICAP = 0.005
"""Several convolutions must be that much better than one to be worth their nodes."""
_STEADY = 0.08
"""Only measurements with an interval narrower than this share of their value are remembered."""
_HOPELESS, _MOST_TRIED = 2.5, 4
_BATCH_MS_LIMIT = 120.0


class Trials:
    """Times candidates in context: the whole model with all layers of one kind in another form, against all dense."""

    def __init__(self, graph: Graph, target: Target, settings: Settings, choice: Choice, progress: Progress) -> None:
        self.graph, self.target, self.settings, self.choice, self.progress = graph, target, settings, choice, progress
        self.default = all_default(choice, settings)
        self.model = graph.to_model()
        self.cache = Cache()
        self.context = Cache.key({"runtime": target.version(), "cpu": cpu_model(), "threads": settings.threads,
                                  "default": settings.default, "dynamic": str(settings.dynamic),
                                  "precision": [settings.encoding.precision, settings.encoding.io],
                                  "model": _structure(graph)})

    def run(self) -> None:
        kinds: dict[str, list[str]] = {}
        for name, layer in self.choice.items():
            if len(self._worth_trying(name)) > 0:
                kinds.setdefault(_signature(layer, self.target.block), []).append(name)
        padded = [n for n, layer in self.choice.items()
                  if self.default[n].name == "dense" and any(c.name == DENSE_PADDED for c in layer.options)]
        if not kinds and not padded:
            return
        base = self._runner(self.default)
        batches = self._batches(base)
        if padded and self.settings.default == "dense":  # all together: one layer alone changes too little to be seen
            self.progress(f"measuring {len(padded)} layers with padded channels", 0.0)
            if self._measure(padded, [DENSE_PADDED], base, batches):
                base.close()
                base = self._runner(self.default)
        for number, names in enumerate(kinds.values()):
            self.progress(f"measuring {names[0]}" + (f" and {len(names) - 1} like it" if len(names) > 1 else ""),
                          number / len(kinds))
            self._measure(names, self._worth_trying(names[0]), base, batches)
        base.close()
        self._confirm([names for names in kinds.values() if self._changed(names)], batches)
        self.cache.save()

    def _changed(self, names: list[str]) -> bool:
        return self.choice[names[0]].chosen is not self.default[names[0]]

    def _confirm(self, kinds: list[list[str]], batches: list[int]) -> None:
        """Gains do not simply add up: with everything chosen in place, a kind that the model is faster without goes back
        to its default."""
        if len(kinds) < 2:
            return
        self.progress("measuring the chosen forms together", 1.0)
        forms = {n: layer.chosen for n, layer in self.choice.items()}
        runners = {"": self._runner(forms)}
        for names in kinds:
            runners[names[0]] = self._runner({**forms, **{n: self.default[n] for n in names}})
        feeds = self._feeds(batches[0])
        samples = interleave({k: _caller(r, feeds) for k, r in runners.items()},
                             budget_s=0.4 * len(runners), min_rounds=_ROUNDS)
        for names in kinds:
            without = ratio(samples[""], samples[names[0]])
            if without.low > 1:
                for n in names:
                    self.choice[n].take(self.default[n].name, f"measured: the model is {without.value:.3f}x without "
                                                              f"{forms[n].name} once the other layers are chosen")
        for runner in runners.values():
            runner.close()

    def _worth_trying(self, name: str) -> list[str]:
        """The candidates of a layer other than the default that the cost model ranks best, none that it puts far behind."""
        layer = self.choice[name]
        default = self.settings.default_form(name, layer.options)
        limit = _HOPELESS * self.target.estimate(layer.conv, default, layer.plane).cost
        out: list[tuple[float, str]] = []
        for c in layer.options:
            if c.is_dense or c is default:
                continue
            estimate = self.target.estimate(layer.conv, c, layer.plane)
            layer.times[c.name] = CandidateTime(name=c.name, macs_executed=layer.times[c.name].macs_executed,
                                                estimated_ms=estimate.ms)
            if estimate.cost <= limit:
                out.append((estimate.cost, c.name))
            else:
                layer.reason = "every other form is estimated to be over " \
                               f"{_HOPELESS:g} times slower (too few channels per group)"
        return [name for _, name in sorted(out)[:_MOST_TRIED]]

    def _runner(self, forms: Mapping[str, Candidate]) -> Runner:
        settings = self.settings
        return self.target.build(self.graph, forms, settings.dynamic, settings.encoding, settings.threads).runner()

    def _batches(self, base: Runner) -> list[int]:
        """The smallest batch that counts, and the largest, or what still runs in _BATCH_MS_LIMIT in its place."""
        wanted = sorted(set(self.settings.batches))
        if len(wanted) == 1:
            return wanted
        feeds = self._feeds(wanted[0])
        once = timing(interleave({"base": lambda: base.run(feeds)}, budget_s=0.2)["base"]).median
        largest = min(wanted[-1], max(wanted[0] * 2, int(_BATCH_MS_LIMIT / max(once, 1e-3)) * wanted[0]))
        return [wanted[0], largest]

    def _feeds(self, batch: int) -> dict[str, Any]:
        feeds = sample_inputs(self.model, batch=batch if self.settings.dynamic else None)
        return in_precision(feeds, self.settings.encoding.io)

    def _measure(self, names: list[str], tried: list[str], base: Runner, batches: list[int]) -> bool:
        """Time the candidates `tried` for these layers together; take the best if it beats what is there now."""
        known: dict[str, dict[int, FormTime]] = {c: {} for c in tried}
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
                    if entry.ratio.high - entry.ratio.low < _STEADY * entry.ratio.value:
                        self.cache.put(keys[c, b], entry)
        return self._take(names, known, len(batches))

    def _time(self, names: list[str], missing: list[str], base: Runner,
              batches: list[int]) -> dict[str, dict[int, FormTime]]:
        """All candidates briefly at the first batch, the best few of them thoroughly, the winners at the next batch."""
        runners = {c: self._runner({**self.default, **{n: self._option(n, c) for n in names}}) for c in missing}
        found: dict[str, dict[int, FormTime]] = {c: {} for c in missing}
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
            left = [c for c in left if _wins(c, found[c][batch])]
        for runner in runners.values():
            runner.close()
        return found

    def _option(self, layer: str, name: str) -> Candidate:
        return next(c for c in self.choice[layer].options if c.name == name)

    def _take(self, names: list[str], known: dict[str, dict[int, FormTime]], batches: int) -> bool:
        winners = {c: min(e.ratio.value for e in found.values()) for c, found in known.items()
                   if len(found) == batches and all(_wins(c, e) for e in found.values())}
        best = max(winners, key=lambda c: winners[c] - (_SPLIT_HANDICAP if c.startswith("split") else 0), default=None)
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


def _wins(form: str, entry: FormTime) -> bool:
    """A form that is not dense must beat it beyond doubt; between dense and padded dense the median decides."""
    return (entry.ratio.value if form == DENSE_PADDED else entry.ratio.low) > 1


def _caller(runner: Runner, feeds: dict[str, Any]) -> Callable[[], object]:
    return lambda: runner.run(feeds)


def _entry(base: list[float], other: list[float]) -> FormTime:
    return FormTime(ms=timing(other).median, ratio=ratio(base, other))


def _signature(layer: LayerChoice, block: int) -> str:
    """Layers with equal signatures are measured together, so that a gain which one alone would lose in the noise shows:
    geometry, plane, number of branches, and their sizes to the precision of the runtime's vector block."""
    c = layer.conv
    sizes = [-(-n // block) for n in (c.in_channels, c.out_channels, max(b.in_index.size for b in c.branches),
                                      max(b.out_index.size for b in c.branches))]
    names = [o.name for o in layer.options if o.name != DENSE_PADDED]
    return str((sizes, c.kernel_shape, c.strides, c.pads, c.dilations, layer.plane, len(c.branches), names))


def _structure(graph: Graph) -> str:
    """Digest of the operators, shapes and index lists: everything but the weights."""
    parts = []
    for node in graph.nodes:
        attrs = {k: str(np.asarray(v).tolist()) for k, v in sorted(node.attrs.items())
                 if isinstance(v, (list, tuple, int, float, str))}
        parts.append([node.op, attrs, [str(t.shape) for t in (*node.inputs, *node.outputs)]])
    return Cache.key({"nodes": parts})


