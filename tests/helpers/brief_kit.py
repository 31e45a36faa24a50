"""Measuring in less time, where no number that comes out proves anything: 3 blocks, as of slow models, in place of 5 and of
up to 10 on a busy machine, as it is while tests run. How many there are otherwise is proved in tests/runtime/test_measure.py."""

from __future__ import annotations

import pytest

from gkp.runtime import measure

BRIEF = "from gkp.runtime import measure; measure._more = lambda taken, *_: taken < measure.FEWEST_BLOCKS"
"""For a process of its own, before its program."""


def measure_briefly(monkeypatch: pytest.MonkeyPatch) -> None:
    """For this process, until the test has ended."""
    monkeypatch.setattr(measure, "_more", lambda taken, *_: taken < measure.FEWEST_BLOCKS)
