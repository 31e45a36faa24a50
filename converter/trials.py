"""Trials: candidates timed in the whole model, because an isolated layer pays layout changes that the model does not."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from gkp.converter.cache import Cache, FormTime
from gkp.converter.forms import Choice, Forms, LayerChoice, Settings, all_default, chosen
from gkp.converter.graph import Graph
from gkp.converter.lower.candidates import DENSE_PADDED, Candidate
from gkp.converter.sources.base import in_precision, sample_inputs
from gkp.converter.targets.base import Target
from gkp.manifest import CandidateTime
from gkp.runtime.environment import cpu_model
from gkp.runtime.measure import interleave, ratio, timing
from gkp.runtime.runners import Runner
from gkp.text import plural
from gkp.types import Progress

_ROUNDS, _FEWEST, _BEHIND = 13, 4, 0.999
"""Of a candidate; before one may be stopped; and which ratio is behind: equal times are not, though clocks round."""
_SPLIT_HANDICAP = 0.005
"""Several convolutions must be that much better than one to be worth their nodes."""
_STEADY = 0.08
"""Only what has intervals narrower than this share of their value is remembered."""
_HOPELESS, _MOST_TRIED = 2.5, 4
"""Times the estimate of the form that a layer has; and forms of a kind of layer."""
_BATCH_MS_LIMIT = 120.0
_BUDGET_S = 60.0
"""After so long no other kind of layer is begun."""
_SMALL = 0.01
"""Of the multiply-accumulates: what a kind of layer with fewer could gain is lost in the noise."""
_BASE, _ESTIMATED = "", "estimated"
_Found = dict[str, dict[int, FormTime]]
"""By variant and batch."""


@dataclass
class _Base:
    """The model that others are timed against. forms: of its layers."""

    forms: Forms
    runner: Runner


class Trials:
    """Times candidates in context: first the whole model in the estimated forms against all default ones; then, from the
    faster of these two on, all layers of one kind in another form, kinds with many multiply-accumulates first, until time is
    up. choice: the estimated forms, which become those that stay."""

    def __init__(self, graph: Graph, target: Target, settings: Settings, choice: Choice, progress: Progress) -> None:
        self.graph, self.target, self.settings, self.choice, self.progress = graph, target, settings, choice, progress
        self.default, self.estimated = all_default(choice, settings), chosen(choice)
        self.model = graph.to_model()
        self.cache = Cache()
        self.context = {"runtime": target.version(), "cpu": cpu_model(), "threads": settings.threads,
                        "dynamic": str(settings.dynamic), "precision": [settings.encoding.precision, settings.encoding.io],
                        "model": _structure(graph)}

    def run(self) -> None:
        began = time.perf_counter()
        for name, layer in self.choice.items():
            if layer.estimated:
                layer.take(self.default[name].name, f"default: {self.default[name].name}")
        padded = [n for n, layer in self.choice.items()
                  if self.default[n].name == "dense" and any(c.name == DENSE_PADDED for c in layer.options)]
        if not padded and not any(layer.estimated for layer in self.choice.values()):
            return
        base = _Base(self.default, self._runner(self.default))
        batches = self._batches(base.runner)
        if padded and self.settings.default == "dense":  # all together: one layer alone changes too little to be seen
            self.progress(f"measuring {len(padded)} layers with padded channels", None)
            base = self._pad(padded, base, batches)
        base = self._begin(base, batches)
        changed = self._try_kinds(base, batches, began)
        base.runner.close()
        self._confirm(changed, base.forms, batches)
        self.cache.save()

    def _pad(self, names: list[str], base: _Base, batches: list[int]) -> _Base:
        """Of two dense forms the faster one is the default."""
        wide = {n: self._option(n, DENSE_PADDED) for n in names}
        if not self._take(names, self._measure({DENSE_PADDED: wide}, base, batches), len(batches)):
            return base
        self.default.update(wide)
        return self._in_place_of(base, self.default)

    def _begin(self, base: _Base, batches: list[int]) -> _Base:
        """The forms that trials begin with: the estimated ones, if the whole model is faster in them beyond doubt. Where
        these differ in one kind of layer, its own trial says so, too."""
        forms = {n: self._dense(n) if c.is_dense else c for n, c in self.estimated.items() if self.choice[n].estimated}
        names = [n for n, c in forms.items() if c is not base.forms[n]]
        if len({self._signature(n, base) for n in names}) < 2:
            return base
        self.progress(f"measuring {plural(len(names), 'layer')} in the estimated forms", None)
        found = self._measure({_ESTIMATED: {n: forms[n] for n in names}}, base, batches)[_ESTIMATED]
        if len(found) < len(batches) or not all(_wins(_ESTIMATED, e) for e in found.values()):
            return base
        gain = min(e.ratio.value for e in found.values())
        for n in names:
            self.choice[n].take(forms[n].name, f"estimated fastest; {gain:.3f}x in the model, measured with "
                                               f"{plural(len(names), 'layer')} in the estimated forms")
        return self._in_place_of(base, {**base.forms, **forms})

    def _try_kinds(self, base: _Base, batches: list[int], began: float) -> list[list[str]]:
        """Take the best form of every kind. The kinds whose forms have changed."""
        macs = {n: c.macs(self.choice[n].plane) for n, c in base.forms.items()}
        total, changed = sum(macs.values()), []
        kinds = sorted(self._kinds(base), key=lambda names: -sum(macs[n] for n in names))
        for number, names in enumerate(kinds):
            spent = time.perf_counter() - began
            if sum(macs[n] for n in names) < _SMALL * total:
                self._leave(names, f"under {_SMALL:.0%} of the multiply-accumulates")
            elif spent > _BUDGET_S:
                self._leave(names, f"{_BUDGET_S:.0f} s were spent on layers with more multiply-accumulates", late=True)
            else:
                like = f" and {len(names) - 1} like it" if len(names) > 1 else ""
                self.progress(f"measuring {names[0]}{like} (kind {number + 1} of {len(kinds)})",
                              max(number / len(kinds), spent / _BUDGET_S))
                variants = {c: {n: self._option(n, c) for n in names} for c in self._worth_trying(names[0], base)}
                if self._take(names, self._measure(variants, base, batches), len(batches)):
                    changed.append(names)
        return changed

    def _kinds(self, base: _Base) -> list[list[str]]:
        """Layers with something to try, those that are tried together in one list."""
        kinds: dict[str, list[str]] = {}
        for name, layer in self.choice.items():
            if layer.estimated and self._worth_trying(name, base):
                kinds.setdefault(self._signature(name, base), []).append(name)
        return list(kinds.values())

    def _leave(self, names: list[str], why: str, late: bool = False) -> None:
        for n in names:
            layer = self.choice[n]
            layer.late, layer.reason = late, f"{layer.reason}; no other form was tried: {why}"

    def _confirm(self, kinds: list[list[str]], before: Forms, batches: list[int]) -> None:
        """Gains do not simply add up: with everything chosen in place, a kind that the model is faster without goes back
        to what it was before."""
        if len(kinds) < 2:
            return
        self.progress("measuring the chosen forms together", None)
        forms = chosen(self.choice)
        runners = {"": self._runner(forms)}
        for names in kinds:
            runners[names[0]] = self._runner({**forms, **{n: before[n] for n in names}})
        feeds = self._feeds(batches[0])
        samples = interleave({k: _caller(r, feeds) for k, r in runners.items()},
                             budget_s=0.4 * len(runners), min_rounds=_ROUNDS)
        for names in kinds:
            without = ratio(samples[""], samples[names[0]])
            if without.low > 1:
                for n in names:
                    self.choice[n].take(before[n].name, f"measured: the model is {without.value:.3f}x without "
                                                        f"{forms[n].name} once the other layers are chosen")
        for runner in runners.values():
            runner.close()

    def _worth_trying(self, name: str, base: _Base) -> list[str]:
        """The candidates of a layer other than what it is: its default, which has to be beaten, and those that the cost
        model ranks best, none that it puts far behind."""
        layer, now = self.choice[name], base.forms[name]
        limit = _HOPELESS * self.target.estimate(layer.conv, now, layer.plane).cost
        others = [c for c in layer.options if not c.is_dense] + ([] if now.is_dense else [self._dense(name)])
        costs = {c.name: self.target.estimate(layer.conv, c, layer.plane).cost for c in others if c is not now}
        if costs and min(costs.values()) > limit and now is self.default[name] and not layer.versus:
            layer.reason = "every other form is estimated to be over " \
                           f"{_HOPELESS:g} times slower (too few channels per group)"
        first = [] if now is self.default[name] else [self.default[name].name]
        ranked = sorted((c for c in costs if costs[c] <= limit and c not in first), key=lambda c: (costs[c], c))
        return [*first, *ranked][:_MOST_TRIED]

    def _signature(self, name: str, base: _Base) -> str:
        return _signature(self.choice[name], base.forms[name], self.target.block)

    def _dense(self, name: str) -> Candidate:
        """The faster of a layer's dense forms."""
        return self.default[name] if self.default[name].is_dense else self.choice[name].options[0]

    def _option(self, layer: str, name: str) -> Candidate:
        return next(c for c in self.choice[layer].options if c.name == name)

    def _runner(self, forms: Forms) -> Runner:
        settings = self.settings
        return self.target.build(self.graph, forms, settings.dynamic, settings.encoding, settings.threads).runner()

    def _in_place_of(self, base: _Base, forms: Forms) -> _Base:
        base.runner.close()
        return _Base(forms, self._runner(forms))

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

    def _measure(self, variants: Mapping[str, Forms], base: _Base, batches: list[int]) -> _Found:
        """Time the model with the layers of each variant in other forms, if that is not remembered."""
        known: _Found = {v: {} for v in variants}
        keys = {(v, b): Cache.key({"context": self.context, "base": _names(base.forms), "forms": _names(forms), "batch": b})
                for v, forms in variants.items() for b in batches}
        for (v, b), key in keys.items():
            if (entry := self.cache.get(key)) is not None:
                known[v][b] = entry
        if any(known.values()):
            return known
        known = self._time(variants, base, batches)
        for v, found in known.items():
            if all(entry.ratio.high - entry.ratio.low < _STEADY * entry.ratio.value for entry in found.values()):
                for b, entry in found.items():
                    self.cache.put(keys[v, b], entry)
        return known

    def _time(self, variants: Mapping[str, Forms], base: _Base, batches: list[int]) -> _Found:
        """At the first batch, each until it is clearly behind; the winners at the next batch."""
        runners = {v: self._runner({**base.forms, **forms}) for v, forms in variants.items()}
        found: _Found = {v: {} for v in variants}
        left = list(variants)
        for batch in batches if left else ():
            feeds = self._feeds(batch)
            calls = {v: _caller(r, feeds) for v, r in {_BASE: base.runner, **{v: runners[v] for v in left}}.items()}
            samples = interleave(calls, budget_s=0.4 * len(calls), min_rounds=_ROUNDS, stop=_behind)
            for v in left:
                found[v][batch] = _entry(samples[_BASE], samples[v])
            left = [v for v in left if _wins(v, found[v][batch])]
            if not left:
                break
        for runner in runners.values():
            runner.close()
        return found

    def _take(self, names: list[str], known: _Found, batches: int) -> bool:
        """Does one of the candidates, timed for these layers together, beat what is there now? It takes its place."""
        winners = {c: min(e.ratio.value for e in found.values()) for c, found in known.items()
                   if len(found) == batches and all(_wins(c, e) for e in found.values())}
        best = max(winners, key=lambda c: winners[c] - (_SPLIT_HANDICAP if c.startswith("split") else 0), default=None)
        for name in names:
            layer = self.choice[name]
            layer.versus = layer.chosen.name
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
        return best is not None


def _behind(ms: Mapping[str, Sequence[float]], rounds: int) -> list[str]:
    """gkp.runtime.measure.Stop: what has been slower than the base in three quarters of the rounds."""
    if rounds < _FEWEST:
        return []
    return [v for v in ms if v != _BASE and np.percentile(np.divide(ms[_BASE][:len(ms[v])], ms[v]), 75) < _BEHIND]


def _wins(form: str, entry: FormTime) -> bool:
    """A form that is not dense must beat it beyond doubt; between dense and padded dense the median decides."""
    return (entry.ratio.value if form == DENSE_PADDED else entry.ratio.low) > 1


def _caller(runner: Runner, feeds: dict[str, Any]) -> Callable[[], object]:
    return lambda: runner.run(feeds)


def _entry(base: list[float], other: list[float]) -> FormTime:
    return FormTime(ms=timing(other).median, ratio=ratio(base, other))


def _names(forms: Forms) -> dict[str, str]:
    return {name: form.name for name, form in forms.items()}


def _signature(layer: LayerChoice, now: Candidate, block: int) -> str:
    """Layers with equal signatures are measured together, so that a gain which one alone would lose in the noise shows:
    geometry, plane, number of branches, their sizes to the precision of the runtime's vector block, and the form now."""
    c = layer.conv
    sizes = [-(-n // block) for n in (c.in_channels, c.out_channels, max(b.in_index.size for b in c.branches),
                                      max(b.out_index.size for b in c.branches))]
    names = [o.name for o in layer.options if o.name != DENSE_PADDED]
    return str((sizes, c.kernel_shape, c.strides, c.pads, c.dilations, layer.plane, len(c.branches), now.name, names))


def _structure(graph: Graph) -> str:
    """Digest of the operators, shapes and index lists: everything but the weights."""
    parts = []
    for node in graph.nodes:
        attrs = {k: str(np.asarray(v).tolist()) for k, v in sorted(node.attrs.items())
                 if isinstance(v, (list, tuple, int, float, str))}
        parts.append([node.op, attrs, [str(t.shape) for t in (*node.inputs, *node.outputs)]])
    return Cache.key({"nodes": parts})


