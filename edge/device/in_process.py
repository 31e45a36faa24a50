"""All devices of a plan in this process, one after the other: to verify a split model, and to run it without a network."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from gkp.edge.device.dataflow import Dataflow, DeviceView, entering
from gkp.edge.device.encoding import packed, unpacked
from gkp.edge.device.segment_file import open_segment
from gkp.edge.plan.schema import COORDINATOR, Plan, Segment, SplitModel, Transfer, device_folder
from gkp.errors import GkpError
from gkp.runtime.runners import Runner
from gkp.types import Array

Open = Callable[[Segment], Runner]


class InProcessExecutor:
    """Runs a plan with one session per segment. devices: to open, by default all that compute something; wire: how
    float32 values travel between devices. moved: the values that devices handed to each other during the last request, with
    the bytes of the arrays themselves (the coordinator's included)."""

    def __init__(self, plan: SplitModel, open_segment: Open, devices: Sequence[int] | None = None,
                 wire: str = "float32") -> None:
        self.plan, self.wire = plan, wire
        self.moved: list[Transfer] = []
        self._replicas, self._values = plan.replicas, {v.name: v for v in plan.values}
        self._sends = DeviceView(plan, COORDINATOR).targets
        self._views = {d: DeviceView(plan, d) for d in (plan.busy_devices if devices is None else devices)}
        self._runners: Mapping[int, Runner] = {s.index: open_segment(s) for s in plan.segments if s.device in self._views}

    @classmethod
    def open(cls, plan: Plan, directory: Path, threads: int = 1, trust_code: bool = False) -> InProcessExecutor:
        """The executor for the folder of a split model. Errors of gkp.edge.device.segment_file.open_segment."""
        return cls(plan, lambda s: open_segment(device_folder(directory, s.device), plan, s, threads, trusted=trust_code))

    def run(self, x: Array, replica: int = 0) -> Array:
        """One request. replica: which of the plan's replicas takes it. UsageError when x has another shape or dtype than the
        plan's input."""
        flows = {d: Dataflow(self.plan, d, self._views[d]) for d in self._replicas[replica]}
        self.moved = []
        answer: list[Array] = []
        ready: deque[Segment] = deque()
        for name, array in entering(self.plan, x).items():
            self._hand_over(name, array, COORDINATOR, self._sends[name], flows, ready, answer)
        while ready:
            segment = ready.popleft()
            outputs = self._compute(segment, flows[segment.device])
            done = flows[segment.device].done(segment, outputs)
            ready.extend(done.ready)
            for send in done.sends:
                self._hand_over(send.value, send.array, segment.device, send.targets, flows, ready, answer)
        if not answer or not all(f.finished for f in flows.values()):
            raise GkpError("the plan came to no end: a segment waits for a value that nobody makes", "split the model again")
        return answer[0]

    def _compute(self, segment: Segment, flow: Dataflow) -> Sequence[Array]:
        runner = self._runners[segment.index]
        by_name = dict(zip(runner.outputs, runner.run(flow.feeds(segment)), strict=True))
        return [by_name[name] for name in segment.outputs]

    def _hand_over(self, name: str, array: Array, source: int, targets: Sequence[int], flows: Mapping[int, Dataflow],
                   ready: deque[Segment], answer: list[Array]) -> None:
        for target in targets:
            if target == COORDINATOR:
                answer.append(array)
            elif target in flows:
                ready.extend(flows[target].give(name, self._moved(name, array) if source != COORDINATOR else array))
            else:
                continue
            self.moved.append(Transfer(value=name, source=source, target=target, bytes=array.nbytes))

    def _moved(self, name: str, array: Array) -> Array:
        value = self._values[name]
        return unpacked(value, packed(value, self.wire, array))

    def close(self) -> None:
        """Let the sessions go."""
        for runner in self._runners.values():
            runner.close()
        self._runners = {}
