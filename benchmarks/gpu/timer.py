"""Times calls on a GPU turn by turn: CUDA events where a call only queues work, else the host's clock and a wait."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

EVENTS, WALL = "events", "wall"
NEEDS_GPU = "needs an NVIDIA GPU"
_WARM_UPS = 3
_FEWEST, _MOST_ROUNDS, _MOST_REPEATS = 7, 200, 200


@dataclass(frozen=True)
class Running:
    """Something ready to run. call: runs it once on PyTorch's current stream (EVENTS), or wherever it likes (WALL).
    per_call: how many times it does the work that is to be timed."""

    call: Callable[[], object]
    clock: str = EVENTS
    per_call: int = 1
    close: Callable[[], None] = lambda: None


def clock_for(device: str, running: Running) -> str:
    """The host's clock on a CPU, where there are no events."""
    return running.clock if device == "cuda" else WALL


def interleave(device: str, calls: Mapping[str, Running], seconds: float, sample_ms: float = 2.0) -> dict[str, list[float]]:
    """Milliseconds of work, one entry per round and name; a new random order each round, so that none always follows the
    one that leaves the caches worst. Every call is warmed up first and repeated until a sample lasts `sample_ms`. Rounds go
    on for about `seconds`, at least 7."""
    repeats = {name: _repeats(device, running, sample_ms) for name, running in calls.items()}
    samples: dict[str, list[float]] = {name: [] for name in calls}
    rng = np.random.default_rng(0)
    end = time.perf_counter() + seconds
    for round_number in range(_MOST_ROUNDS):
        if round_number >= _FEWEST and time.perf_counter() > end:
            break
        for name in rng.permutation(list(calls)).tolist():
            count = repeats[name]
            samples[name].append(_sample(device, calls[name], count) / count / calls[name].per_call)
    return samples


def _repeats(device: str, running: Running, sample_ms: float) -> int:
    for _ in range(_WARM_UPS):
        running.call()
    once = min(_sample(device, running, 2), _sample(device, running, 2)) / 2
    return max(1, min(_MOST_REPEATS, round(sample_ms / max(once, 1e-4))))


def _sample(device: str, running: Running, count: int) -> float:
    """Milliseconds of `count` calls."""
    if clock_for(device, running) == EVENTS:
        return _by_events(running, count)
    synchronise(device)
    start = time.perf_counter()
    for _ in range(count):
        running.call()
    synchronise(device)
    return (time.perf_counter() - start) * 1e3


def _by_events(running: Running, count: int) -> float:
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    first.record()
    for _ in range(count):
        running.call()
    last.record()
    last.synchronize()
    elapsed: float = first.elapsed_time(last)
    return elapsed


def synchronise(device: str) -> None:
    """Wait for everything that was queued."""
    if device == "cuda":
        torch.cuda.synchronize()


def random_input(shape: tuple[int, ...], precision: str, device: str) -> Any:
    """Normal, fixed seed."""
    generator = torch.Generator(device).manual_seed(0)
    return torch.randn(shape, generator=generator, device=device).to(DTYPES[precision])


DTYPES = {"fp32": torch.float32, "fp16": torch.float16}
