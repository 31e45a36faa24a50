"""Which of several predicted plans to take, and why not the others. Pure: plans in, words and a choice out.

`auto` takes what the objective likes best, but splits only for a gain beyond doubt: 5 % where segment times are measured,
20 % where they are estimates (the error that predictions are held to). Otherwise it answers "local": do not split.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import inf, prod

import msgspec

from gkp.branched import BranchedConv
from gkp.edge.forecast.predict import busy_ms, device_memory, predict, shared_ms
from gkp.edge.forecast.profile import Profiles, plan_times
from gkp.edge.forecast.simulate import simulate
from gkp.edge.plan import describe
from gkp.edge.plan.schema import Link, Prediction, SplitModel
from gkp.errors import UsageError
from gkp.report.wording import milliseconds
from gkp.text import clean, plural

OBJECTIVES = ("latency", "throughput", "memory")
ALIKE = 1.03
"""Times that differ by less are no reason for more messages: of all that is reckoned with, what these take differs most from
machine to machine."""
MARGIN: Mapping[str, float] = {"measured": 0.05, "estimated": 0.20}
BEYOND = 1.02
"""A gain of so many times what working at once can bring is no more than that, within what is known of times."""
_BYTES = 4


@dataclass(frozen=True)
class Candidate:
    """A predicted plan. too_full: for every device that it does not fit, what is wrong, in words; compute_ms: of
    the device that computes most, without the messages it handles; link_ms: of the busiest direction of the link."""

    plan: SplitModel
    prediction: Prediction
    too_full: tuple[str, ...]
    compute_ms: float
    link_ms: float

    @property
    def mode(self) -> str:
        return self.prediction.mode

    @property
    def devices(self) -> int:
        return len(self.plan.busy_devices)


@dataclass(frozen=True)
class Decision:
    """chosen: with its reason; rejected: one prediction for every other mode, with reasons; notes: in words."""

    objective: str
    chosen: Candidate
    rejected: tuple[Prediction, ...]
    notes: tuple[str, ...]


def candidate(plan: SplitModel, profiles: Profiles | None = None) -> Candidate:
    """Predict a plan."""
    times, _ = plan_times(plan, profiles)
    memory = device_memory(plan, [simulate(plan, times, requests=max(1, len(plan.replicas)))])
    pairs = [(d, d.memory_bytes, need) for d, need in zip(plan.devices, memory, strict=True) if d.memory_bytes is not None]
    full = tuple(f"{clean(d.name, 40, middle=True)} needs {describe.size(need)} and has {describe.size(limit)}"
                 for d, limit, need in pairs if need > limit)
    busy = busy_ms(plan, times)
    busy.update(shared_ms(plan, busy))
    computed = [sum(times[s.index] for s in plan.segments if s.device == d) for d in range(len(plan.devices))]
    return Candidate(plan, predict(plan, profiles), full, max(computed),
                     max((t for (kind, _), t in busy.items() if kind != "compute"), default=0.0))


def best_of(candidates: Sequence[Candidate], objective: str) -> Candidate:
    """The one that fits and costs least; of equal ones that with fewer messages and devices."""
    return min(candidates, key=lambda c: (bool(c.too_full), describe.cost(c.prediction, objective), c.prediction.messages,
                                          c.devices))


def best_variant(candidates: Sequence[Candidate], objective: str) -> Candidate:
    """Of one mode: the best of them, or one that takes about as long with fewer messages."""
    best = best_of(candidates, objective)
    most = describe.cost(best.prediction, objective) * (1.0 if objective == "memory" else ALIKE)
    alike = [c for c in candidates if bool(c.too_full) == bool(best.too_full)
             and describe.cost(c.prediction, objective) <= most]
    return min(alike, key=lambda c: (c.prediction.messages, describe.cost(c.prediction, objective), c.devices))


def decide(candidates: Sequence[Candidate], objective: str, asked: str = "auto",
           impossible: Mapping[str, str] | None = None) -> Decision:
    """Choose among one candidate per mode. asked: "auto", or the mode to take whatever it costs. impossible: why a mode is
    not among the candidates. UsageError when the mode asked for is not there, or when nothing fits the devices' memory."""
    by_mode = {c.mode: c for c in candidates}
    if asked == "auto":
        chosen, why = _automatic(by_mode, objective)
    elif asked in by_mode:
        chosen, why = by_mode[asked], "asked for with --mode"
    else:
        raise UsageError(f"the model cannot be split in mode {asked}: {(impossible or {}).get(asked, 'no such mode')}",
                         "leave --mode out, and see what the other modes cost")
    notes = [*_warnings(chosen, by_mode, objective, asked, why), *_full(chosen, by_mode, asked), *_idle(chosen)]
    notes += [f"mode {mode} is not possible: {clean(text, 200)}" for mode, text in (impossible or {}).items()]
    rejected = [msgspec.structs.replace(c.prediction, reason=_against(c, chosen, objective))
                for c in candidates if c is not chosen]
    taken = replace(chosen, prediction=msgspec.structs.replace(chosen.prediction, reason=why))
    return Decision(objective, taken, tuple(rejected), tuple(notes))


def _automatic(by_mode: Mapping[str, Candidate], objective: str) -> tuple[Candidate, str]:
    fitting = [c for c in by_mode.values() if not c.too_full]
    if not fitting:
        closest = min(by_mode.values(), key=lambda c: c.prediction.memory_bytes)
        raise UsageError(f"the model fits into these devices in no mode: in mode {closest.mode}, {closest.too_full[0]}",
                         "more devices, or more memory in devices.yaml")
    best, local = best_of(fitting, objective), by_mode.get("local")
    if local is None or local.too_full:
        full = f": one device alone does not do ({local.too_full[0]})" if local is not None else ""
        return best, f"best by {objective} of what fits{full}"
    unknown = ""
    if local.prediction.based_on == "measured" != best.prediction.based_on and objective != "memory":
        # a measured time against an estimate: their difference would count as a gain
        unknown = f"; {best.mode} cannot be compared, because not all of its segments are in the profile"
        best = best_of([c for c in fitting if c.prediction.based_on == "measured"], objective)
    if best is local:
        return local, f"no other mode costs less{unknown}"
    gain = describe.cost(local.prediction, objective) / describe.cost(best.prediction, objective) - 1
    based_on = max(best.prediction.based_on, local.prediction.based_on, key=lambda text: MARGIN[text])
    margin = MARGIN[based_on]
    if gain < margin:
        cure = "" if based_on == "measured" else " (gkp edge profile measures them)"
        return local, (f"the best other mode, {best.mode}, would gain {gain:.1%}: less than the {margin:.0%} that "
                       f"{based_on} times can promise{cure}{unknown}")
    return best, f"{gain + 1:.2f} times as good as one device by {objective}{unknown}"


def _warnings(chosen: Candidate, by_mode: Mapping[str, Candidate], objective: str, asked: str, why: str) -> list[str]:
    local, notes = by_mode.get("local"), []
    mine = describe.amount(chosen.prediction, objective)
    if chosen.mode == "local" and asked == "auto":
        others = [c for c in by_mode.values() if c is not chosen]
        others.sort(key=lambda c: describe.cost(c.prediction, objective))
        told = "; ".join(f"{c.mode} {describe.amount(c.prediction, objective)}"
                         + (f" ({c.too_full[0]})" if c.too_full else "") for c in others)
        what = "one device does" if objective == "throughput" else "one device needs"
        inside = f" (computing: {milliseconds(chosen.compute_ms)} ms)" if objective == "latency" else ""
        notes.append(f"do not split: {what} {mine}{inside}" + (f", the other modes: {told}" if told else "")
                     + (f". {why[0].upper()}{why[1:]}" if describe.cost(chosen.prediction, objective) > min(
                         (describe.cost(c.prediction, objective) for c in others if not c.too_full), default=inf) else ""))
    elif local is not None and not local.too_full and describe.cost(chosen.prediction, objective) > describe.cost(
            local.prediction, objective):
        notes.append(f"warning: {chosen.mode} loses against one device: {mine} against "
                     f"{describe.amount(local.prediction, objective)} ({_why_slow(chosen)})")
    if local is not None and chosen is not local and objective != "memory":
        notes += _beyond_parallelism(chosen, local, objective)
    for text in chosen.too_full:
        notes.append(f"warning: the plan does not fit: {text}")
    return notes


def _full(chosen: Candidate, by_mode: Mapping[str, Candidate], asked: str) -> list[str]:
    """The other modes that do not fit, where the words above do not tell."""
    if chosen.mode == "local" and asked == "auto":
        return []
    full = [f"{c.mode} ({c.too_full[0]})" for c in by_mode.values() if c.too_full and c is not chosen]
    return [f"does not fit: {', '.join(full)}"] if full else []


def _beyond_parallelism(chosen: Candidate, local: Candidate, objective: str) -> list[str]:
    """n devices working at once cannot be more than n times as fast as one of them: what is above that is no gain of
    distribution."""
    speeds = [d.speed for d in chosen.plan.devices]
    alone = max(speeds[d] for d in local.plan.busy_devices)
    most = sum(speeds[d] for d in chosen.plan.busy_devices) / alone
    gain = describe.cost(local.prediction, objective) / max(describe.cost(chosen.prediction, objective), 1e-12)
    if gain <= most * BEYOND:
        return []
    return [f"of the gain of {gain:.2f}x, {most:.2f}x at most can come from working in parallel: the rest comes from layers "
            "whose parts are faster than their share, or from wrong times"]


def _idle(chosen: Candidate) -> list[str]:
    busy = set(chosen.plan.busy_devices)
    idle = [clean(d.name, 40, middle=True) for k, d in enumerate(chosen.plan.devices) if k not in busy]
    return [f"idle: {', '.join(idle[:8])}" + (f" and {len(idle) - 8} more" if len(idle) > 8 else "")] if idle else []


def _against(other: Candidate, chosen: Candidate, objective: str) -> str:
    if other.too_full:
        return f"does not fit: {other.too_full[0]}"
    parts = f"{plural(other.devices, 'device')}; {_why_slow(other)}"
    mine, best = describe.cost(other.prediction, objective), describe.cost(chosen.prediction, objective)
    if mine < best:
        return f"better by {objective}, but not chosen; {parts}"
    return f"{mine / max(best, 1e-12):.2f} times the cost of {chosen.mode}; {parts}"


def _why_slow(c: Candidate) -> str:
    """Where its time goes."""
    computing = f"the busiest device computes {milliseconds(c.compute_ms)} ms"
    link = f"the busiest direction of the link is taken for {milliseconds(c.link_ms)} ms"
    if not c.prediction.messages:
        return f"{computing}, {link}, nothing moves between devices"
    return (f"{computing}, {link}, {plural(c.prediction.messages, 'message')} of {describe.size(c.prediction.bytes)} "
            "between devices")


# ---- the break-even of a grouped convolution ------------------------------------------------------------------------
@dataclass(frozen=True)
class BreakEven:
    """One grouped convolution, its channels scattered and gathered: devices pay for it only if rate / bandwidth is below
    area x channels / (2 x bytes x n).

    rate: multiply-accumulates per second of a device; n: dense over kept products, the number of groups where they are
    disjoint; area: taps."""

    rate: float
    bandwidth: float
    area: int
    channels: int
    groups: int
    n: float

    @property
    def ratio(self) -> float:
        return self.rate / self.bandwidth

    @property
    def limit(self) -> float:
        return self.area * self.channels / (2 * _BYTES * self.n)

    @property
    def text(self) -> str:
        side = "above" if self.ratio >= self.limit else "below"
        return (f"break-even of scattering one grouped convolution: R/B < {self.area}C/(2bn). Here R/B = "
                f"{self.rate / 1e9:.3g}e9 multiply-adds/s / {self.bandwidth / 1e6:.4g}e6 bytes/s = {self.ratio:.4g}, {side} "
                f"the best layer's {self.area}*{self.channels}/(2*{_BYTES}*{self.n:.3g}) = {self.limit:.3g} (C = "
                f"{self.channels} channels in {plural(self.groups, 'group')}, n = {self.n:.3g} dense over kept "
                f"products, b = {_BYTES} bytes)"
                + (": it pays for no layer" if self.ratio >= self.limit else
                   ": by its bytes that layer would pay; the time per message and the other layers are not in this"))


def break_even(convs: Sequence[BranchedConv], rate: float, link: Link) -> BreakEven | None:
    """The figures of the layer that would pay first; None without a grouped convolution."""
    grouped = [c for c in convs if len(c.branches) > 1 and not c.is_copy]
    found = []
    for c in grouped:
        kept = sum(b.in_index.size * b.out_index.size for b in c.branches)
        found.append(BreakEven(rate, link.bandwidth, prod(c.kernel_shape), c.out_channels, len(c.branches),
                               c.in_channels * c.out_channels / max(1, kept)))
    return max(found, key=lambda b: b.limit, default=None)
