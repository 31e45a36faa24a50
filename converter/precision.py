"""--precision auto, --data and --max-drop: a conversion for each precision, the accuracy of each on labelled images, all of
them timed against each other; the fastest that is accurate enough is written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from gkp.converter.artefact import Artefact
from gkp.converter.calibration import image_shape
from gkp.converter.conversion import check_output, finish, opened_form, prepare_opened
from gkp.converter.fastest import TARGETS, check_measured, cpu_targets, labelled
from gkp.converter.pixels import as_pixels
from gkp.converter.rows import time_rows
from gkp.converter.sources._torchfile import read_pickle_file
from gkp.converter.sources.base import fed, sample_inputs
from gkp.converter.stages import Job, Opened, Prepared, Recognised, default_output
from gkp.converter.targets import Target, make_target
from gkp.converter.tried import AccuracyError, Rule, Way, accuracy_data
from gkp.converter.verify import check_inputs
from gkp.converter.verify_int8 import agreement
from gkp.converter.writing import verified
from gkp.errors import BackendMissingError, GkpError, UnsupportedModelError, UsageError, VerificationError
from gkp.images.accuracy import Accuracy, accuracy
from gkp.images.image_set import ImageSet
from gkp.images.reading import open_images
from gkp.options.convert import ConvertOptions
from gkp.options.targets import CpuOptions
from gkp.text import plural
from gkp.types import Array, Progress, Run

FEWEST = 2_000
"""Images that a choice may hang on: half a point of them is ten."""
MAX_DROP = 0.5
_BATCH = 64


def convert_tried(source: Any, options: ConvertOptions, progress: Progress, targets: Sequence[Target] = ()) -> Artefact:
    """What is written of all that the options allow. targets: one for each precision, in place of the options' own.

    UsageError: there are not 2,000 labelled images to choose by, or the model and the options do not fit together.
    AccuracyError: nothing is as accurate as was asked for. Nothing is written then. Else as gkp.converter.convert."""
    if isinstance(options.target, CpuOptions):
        check_measured(options)
    trial = _Trial(source, options, progress, {})
    ways = [Way(target) for target in targets or _targets(options, progress)]
    for way in ways:
        trial.make(way)
    if all(way.prepared is None for way in ways):
        raise next(way.error for way in ways if way.error is not None)
    return trial.take(ways)


def _targets(options: ConvertOptions, progress: Progress) -> list[Target]:
    """The target, or each of the CPU's, in the precision that was given, or in each of its own."""
    cpu = isinstance(options.target, CpuOptions)
    if options.precision != "auto":
        return cpu_targets(options, progress) if cpu else [
            make_target(options.target, options.precision, options.benchmark, progress)]
    structs = [struct() for struct in TARGETS] if cpu else [options.target]
    return [make_target(struct, precision, options.benchmark, labelled(progress, f"{struct.name} {precision}"))
            for struct in structs for precision in struct.precisions if precision in options.target.precisions]


@dataclass(frozen=True)
class _Shared:
    """What all precisions of a target have in common. images: None without --data; classes: how many the model tells apart,
    None where its output is something else."""

    opened: Opened
    recognised: Recognised
    seconds: Mapping[str, float]
    images: ImageSet | None
    classes: int | None


@dataclass(frozen=True)
class _Trial:
    """A request. shared: what was opened for it, by target."""

    source: Any
    options: ConvertOptions
    progress: Progress
    shared: dict[str, _Shared]

    @property
    def auto(self) -> bool:
        return self.options.precision == "auto"

    @property
    def limit(self) -> float | None:
        """Percentage points that may be lost."""
        return MAX_DROP if self.auto and self.options.max_drop is None else self.options.max_drop

    # ---- one precision ----------------------------------------------------------------------------------------------
    def make(self, way: Way) -> None:
        """Convert it, and look how accurate it is; where it cannot be made, `refused` says why."""
        way.refused = self._not_tried(way)
        if way.refused:
            return
        job = self._job(way)
        try:
            way.target.require(way.precision)
        except (BackendMissingError, UsageError) as e:
            _give_up(way, e)
            return
        shared = self._open(job)
        opened = replace(shared.opened, calibration=None)
        if way.precision == "int8" and shared.opened.calibration is not None:
            own = replace(shared.opened.calibration, progress=job.progress)
            opened = replace(opened, calibration=own, rivals=own)
        twin = shared.recognised.twin  # which the dense baseline simplifies
        recognised = replace(shared.recognised, twin=None if twin is None else twin.copy())
        try:
            prepared = prepare_opened(job, opened, recognised, shared.seconds)
            if self.auto and way.precision == "fp32":
                verified(prepared)  # it is the measure of the others: what is rewritten wrongly is wrong in all of them
        except (BackendMissingError, UnsupportedModelError, VerificationError) as e:
            _give_up(way, e)
            return
        way.prepared = prepared
        self._judge(way, prepared, shared)

    def _not_tried(self, way: Way) -> str:
        if way.precision != "int8" or not self.auto:
            return ""
        if self.options.calibration is None:
            return "not tried: it needs --calibration"
        return "" if self.options.data is not None else "not tried: it is taken by labelled images only (--data)"

    def _job(self, way: Way) -> Job:
        """In the precision of this way alone."""
        options, target = self.options, way.target
        output = options.output
        if output is None and isinstance(self.source, str | Path):
            output = default_output(Path(self.source), options.target.name)
        own = replace(options, target=target.options, precision=way.precision, output=output)
        return Job(self.source, own, target, labelled(self.progress, way.name))

    def _open(self, job: Job) -> _Shared:
        """The checkpoint and all images, once for each target (one with a fixed image size leaves no other axes free), and
        everything about them that can be wrong."""
        name = job.target.name
        if name not in self.shared:
            check_output(job)
            whole = replace(job.options, precision=self.options.precision)
            opened, recognised, seconds = opened_form(replace(job, options=whole, progress=self.progress))
            found = opened.model.reference(sample_inputs(opened.model.model))[0]
            classes = int(found.shape[1]) if found.ndim == 2 and found.shape[1] > 1 else None
            self.shared[name] = _Shared(opened, recognised, seconds, self._images(opened, classes), classes)
        return self.shared[name]

    def _images(self, opened: Opened, classes: int | None) -> ImageSet | None:
        options = self.options
        if options.data is None:
            return None
        shape = image_shape(opened.model)
        if shape is None or classes is None:
            raise UsageError("--data measures accuracy, and the model is no classifier: it takes something else than "
                             "[N, C, H, W], or gives something else than [N, classes]", "leave it out, and give --precision")
        self.progress("looking for labelled images", None)
        images = open_images(options.data, shape, "test", read_pickle_file, mean=options.mean, std=options.std,
                             system=opened.model.system)
        images.check_classes(classes)
        self._enough(images.count, 0)
        return images

    def _enough(self, count: int, left_out: int) -> None:
        """UsageError where something hangs on too few images."""
        if self.limit is not None and count < FEWEST:
            also = f" besides {left_out:,} to calibrate with" if left_out else ""
            raise UsageError(f"--data has {plural(count, 'image')}{also}, too few to tell {self.limit:g} points of accuracy",
                             f"give at least {FEWEST:,} labelled images")

    def _judge(self, way: Way, prepared: Prepared, shared: _Shared) -> None:
        """Its accuracy; or, without labels, of how many inputs it says the same as the checkpoint."""
        options = prepared.job.options
        if shared.images is not None:
            way.engine, run = prepared.measured.built.engines()[-1]
            way.accuracy = self._accuracy(fed(run, options.io_precision), shared, shared.images, prepared.job)
        elif way.precision != "fp32" and shared.classes is not None:
            way.engine, run = prepared.measured.built.engines()[-1]
            way.inputs, inputs = _inputs(shared.opened)
            way.agreement, _ = agreement(run, shared.opened.model.reference, inputs)

    def _accuracy(self, run: Run, shared: _Shared, images: ImageSet, job: Job) -> Accuracy:
        opened, value = shared.opened, shared.opened.model.model.graph.input[0]
        without = () if opened.calibration is None else opened.calibration.samples.digests
        size = value.type.tensor_type.shape.dim[0].dim_value or 1
        if 0 in opened.dynamic.get(value.name, {}):
            low, _, high = job.options.target.batch_range or (1, 1, _BATCH)
            size = min(max(low, _BATCH), high)
        run = as_pixels(run, opened.model.normalisation)
        found = accuracy(run, value.name, images, size, frozenset(without), job.progress)
        self._enough(found.total, found.left_out)
        return found

    # ---- all of them ------------------------------------------------------------------------------------------------
    def take(self, ways: Sequence[Way]) -> Artefact:
        """Write the fastest that may be taken. With auto, one that fails verification gives way to the next."""
        made = {way.name: (way, way.prepared) for way in ways if way.prepared is not None}
        order, notes = self._ordered(made)
        rule = self._rule([way for way, _ in made.values()])
        for way, _ in made.values():
            way.refused = rule.refusal(way)
        able = [name for name in order if not made[name][0].refused]
        for name in able:
            way, prepared = made[name]
            row = replace(prepared, notes=(*prepared.notes, *notes), tried=tuple(rule.rows(ways, way)),
                          accuracy_data=accuracy_data(way.accuracy))
            try:
                return finish(row)
            except VerificationError as e:
                if not self.auto or name == able[-1]:
                    raise
                way.refused = e.message
        told = "; ".join(f"{way.name}: {way.refused}" for way in ways if way.refused)
        raise AccuracyError(f"too much accuracy is lost: {told}", "nothing was written; give more or other images to "
                            "calibrate with, another --precision, or a larger --max-drop", rule.rows(ways, None))

    def _ordered(self, made: Mapping[str, tuple[Way, Prepared]]) -> tuple[list[str], tuple[str, ...]]:
        """(names, the fastest first, or that of the fewest bits where not all can be timed; what is to be said of it). They
        are timed once more, turn by turn: conversions one after another meet different phases of a machine."""
        way, first = next(iter(made.values()))
        if len(made) == 1:
            way.times = {str(m.batch): m.latency_ms.converted for m in first.measured.rows if m.latency_ms.converted}
            return [way.name], ()
        by_bits = sorted(made, key=lambda name: made[name][0].bits)
        if not all(p.job.measured for _, p in made.values()):
            return by_bits, ()
        rows = {name: (lambda batch, p=p: p.measured.built) for name, (_, p) in made.items()}
        opened = first.opened
        timed = time_rows(rows, opened.model.model, opened.batches, opened.dynamic, threads=first.job.threads,
                          longest_ms=opened.longest_ms, progress=self.progress)
        if not all(s.ms for s in timed.samples.values()):
            return by_bits, timed.notes
        for name, (way, _) in made.items():
            way.times = {str(batch): s.timing(name) for batch, s in timed.samples.items() if name in s.ms}
        return sorted(made, key=timed.relative), timed.notes

    def _rule(self, made: Sequence[Way]) -> Rule:
        """With the accuracy of what was made in float32, else of the checkpoint itself."""
        shared = next(iter(self.shared.values()))
        model = shared.opened.model
        basis = next((way.accuracy for way in made if way.precision == "fp32"), None)
        if basis is None and shared.images is not None:
            job = Job(self.source, self.options, made[0].target, labelled(self.progress, "the checkpoint"))
            basis = self._accuracy(model.reference, shared, shared.images, job)
        return Rule(self.auto, self.limit, basis, model.reference_name)


def _give_up(way: Way, error: GkpError) -> None:
    way.error, way.refused = error, f"{error.message} (try: {error.hint})" if error.hint else error.message


def _inputs(opened: Opened) -> tuple[str, list[tuple[str, int, Mapping[str, Array]]]]:
    """(what they are, (name, batch, inputs)): the images to calibrate with, else what verification uses."""
    if opened.calibration is None:
        return "verification's inputs", [*check_inputs(opened.model.model, opened.dynamic)]
    value = opened.model.model.graph.input[0]
    size = value.type.tensor_type.shape.dim[0].dim_value or 1
    return "calibration images", [("images", size, feeds) for feeds in opened.calibration.feeds(value.name, size)]
