"""What the coordinator falls back to: the whole split model in its own process."""

from __future__ import annotations

import os
import time
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as NotInTime
from pathlib import Path

from gkp.edge.coordinate.failures import ComputeError, DeadlineError
from gkp.edge.coordinate.trace import Trace
from gkp.edge.device.in_process import InProcessExecutor
from gkp.edge.device.shard import open_shard
from gkp.edge.plan.schema import Plan, device_folder
from gkp.edge.wire.oip import check_finite
from gkp.errors import GkpError
from gkp.types import Array, Closing


class LocalFallback(Closing):
    """plan: one whose programs may run here. Opens the devices' folders in `directory` in the background, so that it is
    there at once when devices are lost. Computes one request at a time, with all cores. A context manager."""

    def __init__(self, directory: Path, plan: Plan) -> None:
        self._hash = plan.hash
        self._pool = ThreadPoolExecutor(1, "gkp-fallback")
        self._plan, self._devices = plan, plan.replicas[0]  # one is enough
        here = all((device_folder(directory, s.device) / s.file).is_file() for s in plan.segments
                   if s.device in self._devices)
        self._opened: Future[InProcessExecutor] | None = self._pool.submit(self._load, directory) if here else None

    def _load(self, directory: Path) -> InProcessExecutor:
        """The files are compared with the plan's checksums, as on a device."""
        shards = {k: open_shard(device_folder(directory, k), os.cpu_count() or 1, frozenset({self._hash}))
                  for k in self._devices}
        return InProcessExecutor(self._plan, lambda s: shards[s.device].runners[s.index], self._devices)

    @property
    def there(self) -> bool:
        """Whether it can compute, as far as is known: the folders are there, and opening them did not fail."""
        opened = self._opened
        return opened is not None and not (opened.done() and (opened.cancelled() or opened.exception() is not None))

    def run(self, x: Array, deadline: float) -> Array:
        """deadline: of time.monotonic. DeadlineError when it is over first, ComputeError when the model cannot be
        computed, or makes NaN or infinity."""
        assert self._opened is not None
        opened = self._opened
        task = self._pool.submit(lambda: opened.result().run(x))
        try:
            y = task.result(max(0.0, deadline - time.monotonic()))
            check_finite(self._plan.output, y)
            return y
        except NotInTime:
            task.cancel()
            raise DeadlineError("devices are lost, and the coordinator itself was not done at the deadline",
                                "allow more time") from None
        except GkpError as e:
            raise ComputeError(f"devices are lost, and the coordinator cannot compute the model: {e.message}", e.hint) from e

    def trace(self, attempts: int, total_ms: float) -> Trace:
        """The trace of a request that was computed here."""
        return Trace(plan=self._hash, ran="coordinator", attempts=attempts, total_ms=total_ms, shares=[], steps=[])

    def close(self) -> None:
        """Waits for what is being computed."""
        self._pool.shutdown(wait=True, cancel_futures=True)
        if self._opened is not None and self.there:
            self._opened.result().close()
