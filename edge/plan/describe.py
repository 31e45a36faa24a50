"""What a plan says, in words and rounded numbers; for the terminal and for plan.html."""

from __future__ import annotations

from dataclasses import dataclass

from gkp.edge.plan.schema import Plan, Prediction
from gkp.report.wording import milliseconds
from gkp.text import clean, plural

MODE_TEXTS = {
    "local": "the whole network on one device",
    "replicas": "the whole network on every device, a request to each in turn",
    "branch": "every device computes its own groups (or output channels)",
    "spatial": "every device computes its own rows, and asks its neighbours for the rows at the border",
    "pipeline": "every device computes some consecutive blocks",
    "hybrid": "every block in the way that suits it",
}


def size(count: float) -> str:
    """Bytes with a decimal unit, as links count them."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= scale:
            return f"{count / scale:.3g} {unit}"
    return f"{count:.0f} B"


def per_second(period_ms: float) -> str:
    """Requests per second."""
    return f"{1e3 / period_ms:.3g}" if 1e3 / max(period_ms, 1e-9) < 1e3 else f"{1e3 / max(period_ms, 1e-9):,.0f}"


def amount(prediction: Prediction, objective: str) -> str:
    """What the objective counts, in words."""
    if objective == "throughput":
        return f"{per_second(prediction.period_ms)} requests a second"
    return size(prediction.memory_bytes) if objective == "memory" else f"{milliseconds(prediction.critical_path_ms)} ms"


def cost(prediction: Prediction, objective: str) -> float:
    """What the objective wants to be small."""
    return {"latency": prediction.critical_path_ms, "throughput": prediction.period_ms,
            "memory": float(prediction.memory_bytes)}[objective]


def link_text(plan: Plan) -> str:
    """`1gbe: 117 MB/s, round trip 0.2 ms, 0.2 ms per message`."""
    link = plan.link
    shared = ", shared by all" if link.shared else ""
    return (f"{clean(link.name, 60, middle=True)}: {size(link.bandwidth)}/s{shared}, round trip {link.rtt * 1e3:.3g} ms, "
            f"{link.overhead * 1e3:.3g} ms per message")


@dataclass(frozen=True)
class ModeRow:
    """A mode's row: the written one first. ratio: one device's cost / this one's by the objective, None without a row of
    mode "local"."""

    prediction: Prediction
    chosen: bool
    ratio: float | None


def rows(plan: Plan) -> list[ModeRow]:
    """The chosen mode and what was rejected, cheapest first."""
    given = [p for p in (plan.predicted, *plan.rejected) if p is not None]
    local = next((p for p in given if p.mode == "local"), None)

    def ratio(prediction: Prediction) -> float | None:
        mine = cost(prediction, plan.objective)
        return cost(local, plan.objective) / mine if local is not None and mine > 0 else None

    chosen = [ModeRow(plan.predicted, True, ratio(plan.predicted))] if plan.predicted is not None else []
    others = sorted(plan.rejected, key=lambda p: cost(p, plan.objective))
    return [*chosen, *(ModeRow(p, False, ratio(p)) for p in others)]


def headline(plan: Plan) -> str:
    """What was chosen and what that buys, in one line."""
    found = rows(plan)
    if not found or not found[0].chosen:
        return f"{clean(plan.mode, 20)} on {plural(len(plan.busy_devices), 'device')}: not predicted"
    first = found[0]
    best, based = amount(first.prediction, plan.objective), first.prediction.based_on
    if plan.mode == "local":
        return f"Do not split: one device needs {best} ({clean(based, 20)})" if plan.objective != "throughput" else \
            f"Do not split: one device answers {best} ({clean(based, 20)})"
    words = f"{clean(plan.mode, 20)} on {plural(len(plan.busy_devices), 'device')}: {best}"
    if first.ratio is None:
        return f"{words} ({clean(based, 20)})"
    if plan.objective == "memory":
        return f"{words} on the fullest, {1 / first.ratio:.2f} of what one device needs ({clean(based, 20)})"
    return f"{words}, {first.ratio:.2f}x the speed of one device ({clean(based, 20)})"


def reasons(plan: Plan) -> list[str]:
    """Why the plan's mode, and why not each of the others."""
    return [f"{clean(row.prediction.mode, 20)}: {clean(row.prediction.reason, 400)}" for row in rows(plan)]


def predicted_text(plan: Plan) -> str:
    """What was predicted of one request, to be compared with a measured one."""
    p = plan.predicted
    if p is None:
        return "not predicted"
    return (f"predicted: one request {milliseconds(p.critical_path_ms)} ms (segments {clean(p.based_on, 20)}; the link "
            f"{link_text(plan)}), {p.bytes:,} bytes moved")
