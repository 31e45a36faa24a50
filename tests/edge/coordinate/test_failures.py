"""What a user reads when a request could not be answered."""

from __future__ import annotations

import time
from pathlib import Path

import cluster_kit as kit
import numpy as np
import pytest

from gkp.edge.coordinate.failures import ComputeError, Verdict, typed, verdict
from gkp.edge.coordinate.fallback import LocalFallback
from gkp.edge.wire.client import RemoteError


@pytest.mark.parametrize(("status", "error", "what"), [
    ("UNAVAILABLE", "draining", Verdict.LOST), ("UNAVAILABLE", "peer", Verdict.PEER), ("RESOURCE_EXHAUSTED", "full", Verdict.BUSY),
    ("DATA_LOSS", "checksum", Verdict.CORRUPT), ("DEADLINE_EXCEEDED", "", Verdict.DEADLINE), ("NOT_FOUND", "plan", Verdict.REFUSED),
    ("PERMISSION_DENIED", "role", Verdict.REFUSED), ("INTERNAL", "compute", Verdict.FAILED),
    ("INVALID_ARGUMENT", "not-finite", Verdict.FAILED), ("UNKNOWN", "", Verdict.LOST)])
def test_every_error_says_what_to_do(status: str, error: str, what: Verdict) -> None:
    said = RemoteError(status, error, 1, "d1: so it was")
    assert verdict(said) is what
    assert (typed(said).message, bool(typed(said).hint)) == ("d1: so it was", True)
    assert ("float16" in typed(said).hint) == (error == "not-finite")


def test_the_coordinator_itself_gives_no_answer_that_is_not_finite_either(tmp_path: Path) -> None:
    made = kit.split(tmp_path, "branch", 2)
    with LocalFallback(made.directory, made.plan) as fallback:
        made.check(fallback.run(kit.images(), time.monotonic() + 60), kit.images())
        with pytest.raises(ComputeError, match="NaN or infinity"):
            fallback.run(np.full(kit.SHAPE, 3e38, np.float32), time.monotonic() + 60)
