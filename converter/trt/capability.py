"""CUDA compute capabilities: which GPUs an engine is built for."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from gkp.errors import UsageError
from gkp.options.trt import Capability

TURING: Capability = (7, 5)
AMPERE: Capability = (8, 0)


def engine_groups(asked: Sequence[Capability], offered: Sequence[Capability]) -> list[tuple[Capability, ...]]:
    """What each engine is built for: Turing apart (an engine that serves it too need not be fast on later GPUs), the rest
    together. Nothing asked: all that is offered from Ampere on. UsageError for a capability that is not offered."""
    unknown = [c for c in asked if c not in offered]
    if unknown:
        raise UsageError(f"no engine can be built for compute capability {listed(unknown)}",
                         f"this package builds for {listed(offered)}")
    wanted = sorted(set(asked)) or sorted(c for c in offered if c >= AMPERE)
    groups = (tuple(c for c in wanted if c == TURING), tuple(c for c in wanted if c != TURING))
    return [group for group in groups if group]


def dotted(capability: Capability) -> str:
    """ "8.9"."""
    return f"{capability[0]}.{capability[1]}"


def listed(capabilities: Iterable[Capability]) -> str:
    """ "8.6, 8.9"."""
    return ", ".join(dotted(c) for c in capabilities)


def engine_file(capabilities: Iterable[Capability]) -> str:
    """ "engine.sm86+sm89.trt"."""
    return f"engine.{'+'.join(f'sm{major}{minor}' for major, minor in capabilities)}.trt"
