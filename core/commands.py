"""What the subcommands do; gkp.cli says how they are called. Each returns an exit code, or None for 0."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from gkp import manifest as manifest_module
from gkp.arguments import parse_shapes
from gkp.console import Screen
from gkp.edge_commands import EDGE_COMMANDS, run_split
from gkp.errors import FileError, UsageError
from gkp.files import write_file
from gkp.npz import map_npy, read_npz
from gkp.options.convert import convert_options
from gkp.text import clean, plural


def convert(screen: Screen, *, model: Path, output: Path | None, report: Path | None, json_to: str | None,
            input_shape: tuple[str, ...], **options: Any) -> None:
    from gkp.converter.convert import convert as run
    from gkp.converter.tried import AccuracyError
    from gkp.report import tables

    if report is not None:
        from gkp.report.html import require_jinja2

        require_jinja2()
    made = convert_options(output=output, input_shapes=parse_shapes(input_shape), **options)
    try:
        with screen.progress() as progress:
            artefact = run(model, made, progress)
    except AccuracyError as e:
        screen.show(tables.tried_table(e.tried))
        raise
    if screen.verbose:
        screen.show(tables.layer_table(artefact.manifest))
    screen.show(tables.conversion_table(artefact.manifest, screen.verbose))
    if artefact.directory is not None:
        built = artefact.manifest.target != "trt" or artefact.manifest.engines
        usage = f"   (gkp.load({str(artefact.directory)!r}).run(x))" if built else ""
        screen.say(f"\nwritten: {artefact.directory}{usage}")
    else:
        screen.say("\ndry run: nothing was written")
    if report is not None:
        from gkp.report.html import write_html

        write_html(artefact.manifest, report)
        screen.say(f"report:  {report}")
    screen.json(json_to, manifest_module.encode(artefact.manifest))
    if artefact.incomplete is not None:
        raise artefact.incomplete


def inspect(screen: Screen, *, model: Path, target: str, input_shape: tuple[str, ...], json_to: str | None,
            **options: Any) -> None:
    from gkp.report import tables

    if model.is_dir():  # needs none of the converter's packages
        shown = manifest_module.read(model)
    else:
        from gkp.converter.convert import convert as run

        with screen.progress() as progress:
            shown = run(model, convert_options(target, benchmark=False, dry_run=True, input_shapes=parse_shapes(input_shape),
                                               **options), progress).manifest
    screen.show(tables.layer_table(shown))
    screen.say("")
    if screen.verbose:
        for layer in shown.layers:
            if layer.candidates:
                screen.show(tables.candidates_table(layer))
    screen.show(tables.conversion_table(shown, screen.verbose))
    screen.json(json_to, manifest_module.encode(shown))


def verify(screen: Screen, *, a: Path, b: Path, precision: str | None, calibration: str | None, input_shape: tuple[str, ...],
           json_to: str | None, arch: str | None, trust_code: bool) -> int:
    from gkp.converter.compare import compare_models
    from gkp.converter.compare_int8 import AGAINST
    from gkp.converter.sources import OpenOptions
    from gkp.report.facts import verification_words

    with screen.progress() as progress:
        opening = OpenOptions(parse_shapes(input_shape), arch, trust_code, progress)
        result = compare_models(a, b, opening, precision, calibration, progress)
    screen.say(verification_words(result), style="bold green" if result.passed else "bold red")
    for check in result.checks:
        if check.name.startswith(AGAINST):
            screen.say(f"{check.name}: the same largest output for {check.top1_agreement:.1%} of {check.batch} inputs; "
                       f"largest difference {check.max_abs_error:.3g}, allowed {check.tolerance:.3g}")
    screen.json(json_to, msgspec.json.format(msgspec.json.encode(result), indent=2) + b"\n")
    return 0 if result.passed else 1


def evaluate(screen: Screen, *, model: Path, data: str, mean: str | None, std: str | None, batch: int,
             input_shape: tuple[str, ...], json_to: str | None, arch: str | None, trust_code: bool) -> None:
    from gkp.converter.compare import open_runnable
    from gkp.converter.pixels import as_pixels
    from gkp.converter.sources import OpenOptions
    from gkp.converter.sources._torchfile import read_pickle_file
    from gkp.images.accuracy import accuracy
    from gkp.images.normalisation import numbers
    from gkp.images.reading import open_images

    means, stds = numbers(mean, "--mean"), numbers(std, "--std")
    with screen.progress() as progress:
        progress("opening", None)
        opened = open_runnable(model, OpenOptions(parse_shapes(input_shape), arch, trust_code, progress))
        own = opened.normalisation
        if len(opened.inputs) != 1 or not (own or opened.dtypes[0].startswith("float")):
            types = ", ".join(map(clean, opened.dtypes))
            raise UsageError(f"the model has {plural(len(opened.inputs), 'input')} of {types}",
                             "gkp eval needs a classifier of images, with one input of floats")
        if own is not None and (means or stds):
            raise UsageError("the model takes pixels and normalises them itself", "leave out --mean and --std")
        if own is not None:
            means, stds = own.mean, own.std
        progress("looking for images", None)
        images = open_images(data, opened.shapes[0][1:], "test", read_pickle_file, mean=means, std=stds,
                             system=opened.system)
        found = accuracy(as_pixels(opened.run, own), opened.inputs[0], images, opened.fixed_batch or batch,
                         progress=progress)
    origin = found.origin
    used = "as they are in the file" if origin.mean is None or origin.std is None else \
        f"mean {', '.join(map(str, origin.mean))}; std {', '.join(map(str, origin.std))}"
    screen.say(f"{found.correct} of {found.total} correct: {found.share:.2%}  ({used})")
    screen.json(json_to, msgspec.json.encode({"schema_version": 1, "model": clean(str(model)), "data": clean(data),
                                             "correct": found.correct, "total": found.total, "accuracy": found.share,
                                             "mean": origin.mean, "std": origin.std, "sha256": origin.sha256}) + b"\n")


def run(screen: Screen, *, directory: Path, input_file: Path, output_file: Path | None, json_to: str | None,
        trust_code: bool, local: bool, cluster: Path | None, profile: bool) -> None:
    from gkp.runtime.load import load

    if output_file is not None and output_file.exists() and input_file.exists() and output_file.samefile(input_file):
        raise UsageError(f"--output {output_file} is the input itself", "choose another file")
    where: dict[str, Any] = {}
    if local or cluster is not None:
        outputs, where = run_split(screen, directory, _read_arrays(input_file), profile, cluster=cluster, local=local,
                                    trust_code=trust_code)
    elif (directory / "plan.json").is_file() or profile:
        raise UsageError(f"{directory} holds a split model" if not profile else "--profile is for a split model",
                         "give --local, or --cluster FILE.yaml")
    else:
        with screen.progress() as progress:
            progress(f"opening {clean(directory.name, 60)}", None)
            with load(directory, trust_code) as model:
                progress("running it", None)
                result = model.run(_read_arrays(input_file))
        outputs = result if isinstance(result, dict) else {model.manifest.outputs[0].name: result}
    summary = []
    for name, value in outputs.items():
        entry: dict[str, Any] = {"name": name, "shape": list(value.shape), "dtype": str(value.dtype)}
        if value.ndim == 2:
            entry["top1"] = value.argmax(1).tolist()
        summary.append(entry)
        shown = f"; top-1 of the first samples: {entry['top1'][:10]}" if "top1" in entry else ""
        screen.say(f"{name}: {list(value.shape)} {value.dtype}{shown}")
    if output_file is not None:
        _write_arrays(output_file, outputs)
        screen.say(f"written: {output_file}")
    screen.json(json_to, msgspec.json.encode({"schema_version": 1, "outputs": summary, **where}) + b"\n")


def _read_arrays(path: Path) -> Any:
    try:
        with path.open("rb") as file:
            packed = file.read(2) == b"PK"
    except FileNotFoundError:
        raise FileError(f"no such file: {path}", "check the path") from None
    except OSError as e:
        raise FileError(f"{path} cannot be read: {e.strerror}", "check its permissions") from e
    return read_npz(path) if packed else np.array(map_npy(path))


def _write_arrays(path: Path, outputs: dict[str, Any]) -> None:
    buffer = io.BytesIO()
    if len(outputs) == 1:
        np.save(buffer, next(iter(outputs.values())))
    else:
        np.savez(buffer, **outputs)
    write_file(path, buffer.getvalue())


def bench(screen: Screen, *, directories: tuple[Path, ...], suite: str | None, calibrate: str | None,
          checkpoints: Path | None, batches: tuple[int, ...], seconds: float, json_to: str | None, trust_code: bool,
          devices: tuple[int, ...], data: str | None, calibration: str | None, models: Path | None, only: str | None,
          variants: str | None, links: tuple[str, ...], device_speed: float | None) -> None:
    from gkp.benchmarks import bench as benchmarks
    from gkp.benchmarks.command import cpu_bench, finish
    from gkp.benchmarks.results import Bench
    from gkp.runtime.environment import fingerprint

    if bool(directories) + bool(suite) + bool(calibrate) != 1:
        raise UsageError("give artefact directories, or --suite cpu|gpu|edge|zoo, or --calibrate trt",
                         "e.g. gkp bench model.ort model.openvino")
    if (data or calibration) and suite != "cpu":
        raise UsageError("--data and --calibration are of --suite cpu", "leave them out")
    if (models or variants) and suite != "zoo":
        raise UsageError("--models and --variants are of --suite zoo", "leave them out")
    if only and suite not in ("cpu", "zoo", "edge"):
        raise UsageError("--only is of --suite cpu, zoo and edge", "leave it out")
    if (devices or links or device_speed is not None) and suite != "edge":
        name = "--devices" if devices else "--link" if links else "--device-speed"
        raise UsageError(f"{name} is of --suite edge", "leave it out")
    if suite == "gpu" or calibrate:
        from gkp.benchmarks.gpu.command import gpu_bench

        gpu_bench(screen, bool(calibrate), json_to)
        return
    if suite == "edge":
        from gkp.benchmarks.edge.command import edge_bench

        edge_bench(screen, devices, checkpoints, seconds, json_to, links=links, only=only,
                   speed=1.0 if device_speed is None else device_speed)
        return
    if suite == "zoo":
        from gkp.benchmarks.zoo.command import zoo_bench

        zoo_bench(screen, models, only, variants, seconds, json_to)
        return
    if suite == "cpu":
        cpu_bench(screen, checkpoints, data, calibration, only, json_to)
        return
    before = fingerprint()
    with screen.progress() as progress:
        found = Bench(rows=benchmarks.bench(directories, batches, seconds, progress, trust_code), environment=before)
    finish(screen, found, json_to)


def prune(screen: Screen, *, baseline: Path, output: Path, json_to: str | None, **options: Any) -> None:
    from gkp.converter.sources._torchfile import read_pickle_file
    from gkp.converter.sources.dense import open_dense

    say = screen.say if screen.verbose else None
    try:
        with screen.progress() as progress:
            progress(f"opening {clean(baseline.name, 60)}", None)
            opened = open_dense(baseline)
            from gkp.pruning import command  # needs PyTorch, which open_dense asks for in words

            dense = command.Baseline(baseline, opened.arch, opened.module, opened.meta)
            setting = command.prune(command.Request(output=output, **options), dense, read_pickle_file, say, progress)
    except KeyboardInterrupt:
        if (output / "setting.json").is_file():
            screen.say(f"{output} holds what is finished: the same command goes on from there")
        raise
    if setting is None:  # not the first of several processes
        return
    table, following = command.summary(setting, output)
    screen.show(table)
    screen.say(f"\nnext: {following}", wrap=False)
    screen.json(json_to, msgspec.json.format(msgspec.json.encode(setting), indent=2) + b"\n")


COMMANDS: dict[str, Callable[..., int | None]] = {
    "convert": convert, "inspect": inspect, "verify": verify, "eval": evaluate, "run": run, "bench": bench,
    "prune": prune, **EDGE_COMMANDS}
