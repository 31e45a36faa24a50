"""What the subcommands do; gkp.cli says how they are called. Each returns an exit code, or None for 0."""

from __future__ import annotations

import io
import zipfile
import zlib
from collections.abc import Callable, Mapping
from math import prod
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from gkp import manifest as manifest_module
from gkp.console import Screen, write_json
from gkp.errors import FileError, UsageError
from gkp.files import check_writable, write_file


def convert(screen: Screen, *, model: Path, output: Path | None, report: Path | None, json_to: str | None,
            input_shape: tuple[str, ...], layers: tuple[str, ...], no_benchmark: bool, no_engine: bool,
            **options: Any) -> None:
    from gkp.benchmarks import tables
    from gkp.converter.convert import ConvertOptions
    from gkp.converter.convert import convert as run

    if report is not None:
        from gkp.benchmarks.report import require_jinja2

        require_jinja2()
    made = ConvertOptions(output=output, input_shapes=parse_shapes(input_shape), layers=parse_layers(layers),
                          benchmark=not no_benchmark, engine=not no_engine, **options)
    with screen.progress() as progress:
        artefact = run(model, made, progress)
    if screen.verbose:
        screen.show(tables.layer_table(artefact.manifest, verbose=True))
    screen.show(tables.conversion_table(artefact.manifest))
    if artefact.directory is not None:
        built = artefact.manifest.target != "trt" or artefact.manifest.engines
        usage = f"   (gkp.load({str(artefact.directory)!r}).run(x))" if built else ""
        screen.say(f"\nwritten: {artefact.directory}{usage}")
    else:
        screen.say("\ndry run: nothing was written")
    if report is not None:
        from gkp.benchmarks.report import write_html

        write_html(artefact.manifest, report)
        screen.say(f"report:  {report}")
    write_json(json_to, manifest_module.encode(artefact.manifest))
    if artefact.incomplete is not None:
        raise artefact.incomplete


def inspect(screen: Screen, *, model: Path, target: str, input_shape: tuple[str, ...], json_to: str | None,
            **options: Any) -> None:
    from gkp.benchmarks import tables
    from gkp.converter.convert import ConvertOptions
    from gkp.converter.convert import convert as run

    if model.is_dir():
        shown = manifest_module.read(model)
    else:
        with screen.progress() as progress:
            shown = run(model, ConvertOptions(target=target, benchmark=False, dry_run=True,
                                              input_shapes=parse_shapes(input_shape), **options), progress).manifest
    screen.show(tables.layer_table(shown, verbose=screen.verbose))
    if screen.verbose:
        for layer in shown.layers:
            if layer.candidates:
                screen.show(tables.candidates_table(layer))
    screen.show(tables.conversion_table(shown))
    for note in shown.notes:
        screen.say(f"note: {note}")
    write_json(json_to, manifest_module.encode(shown))


def verify(screen: Screen, *, a: Path, b: Path, precision: str, input_shape: tuple[str, ...], json_to: str | None,
           arch: str | None, trust_code: bool) -> int:
    from gkp.benchmarks.wording import verification_words
    from gkp.converter.compare import compare_models
    from gkp.converter.sources import OpenOptions

    with screen.progress() as progress:
        progress("comparing", None)
        result = compare_models(a, b, OpenOptions(parse_shapes(input_shape), arch, trust_code), precision)
    screen.say(verification_words(result), style="bold green" if result.passed else "bold red")
    write_json(json_to, msgspec.json.format(msgspec.json.encode(result), indent=2) + b"\n")
    return 0 if result.passed else 1


def evaluate(screen: Screen, *, model: Path, data: str, mean: str | None, std: str | None, batch: int,
             input_shape: tuple[str, ...], json_to: str | None, arch: str | None, trust_code: bool) -> None:
    from gkp.benchmarks import datasets
    from gkp.converter.compare import open_runnable
    from gkp.converter.graph import clean
    from gkp.converter.sources import OpenOptions

    test = datasets.load_test_set(data)
    opened = open_runnable(model, OpenOptions(parse_shapes(input_shape), arch, trust_code))
    usual = datasets.normalisation(opened.system)
    means, stds = datasets.triple(mean, usual[0], "--mean"), datasets.triple(std, usual[1], "--std")
    batch = opened.fixed_batch or batch
    correct, total = 0, len(test.y)
    with screen.progress() as progress:
        for start in range(0, total, batch):
            progress(f"evaluating {total} images", start / total)
            correct += _correct(opened.run, opened.inputs[0], test, start, batch, means, stds)
    screen.say(f"{correct} of {total} correct: {correct / total:.2%}  "
               f"(mean {', '.join(map(str, means))}; std {', '.join(map(str, stds))})")
    write_json(json_to, msgspec.json.encode({"schema_version": 1, "model": clean(str(model)), "data": clean(data),
                                             "correct": correct, "total": total, "accuracy": correct / total,
                                             "mean": means, "std": stds}) + b"\n")


def _correct(run: Callable[[Mapping[str, Any]], list[Any]], name: str, test: Any, start: int, batch: int,
             mean: tuple[float, ...], std: tuple[float, ...]) -> int:
    x = test.normalised(start, start + batch, mean, std)
    n = len(x)
    if n < batch:  # the last batch of a model with a fixed batch size
        x = np.concatenate([x, np.zeros((batch - n, *x.shape[1:]), x.dtype)])
    scores = run({name: x})[0]
    if scores.ndim != 2 or len(scores) != batch:
        raise UsageError(f"the model returns shape {list(scores.shape)}, not [batch, classes]",
                         "gkp eval needs a classifier")
    return int((scores[:n].argmax(1) == test.y[start:start + n]).sum())


def run(screen: Screen, *, directory: Path, input_file: Path, output_file: Path | None, json_to: str | None,
        trust_code: bool, local: bool, cluster: Path | None, profile: bool) -> None:
    from gkp.runtime.load import load

    where: dict[str, Any] = {}
    if local or cluster is not None:
        outputs, where = _run_split(screen, directory, _read_arrays(input_file), profile, cluster=cluster, local=local,
                                    trust_code=trust_code)
    elif (directory / "plan.json").is_file() or profile:
        raise UsageError(f"{directory} holds a split model" if not profile else "--profile is for a split model",
                         "give --local, or --cluster FILE.yaml")
    else:
        with load(directory, trust_code) as model:
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
    write_json(json_to, msgspec.json.encode({"schema_version": 1, "outputs": summary, **where}) + b"\n")


def _run_split(screen: Screen, directory: Path, x: Any, profile: bool,
               **where: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """(outputs by name, what else goes into the JSON: "devices", and with profile "profile")."""
    from gkp.edge import Cluster
    from gkp.edge import trace as tracing
    from gkp.edge.words import predicted_words

    if isinstance(x, dict):
        if len(x) != 1:
            raise UsageError(f"a split model has one input, the file holds {len(x)} arrays", "write one with numpy.save")
        x = next(iter(x.values()))
    said: dict[str, Any] = {}
    with Cluster(directory, **where) as opened:
        if profile:
            opened.run(x)  # the first request also connects the devices and warms them up
            y, trace = opened.trace(x)
            for table in tracing.tables(trace, every_step=screen.verbose):
                screen.show(table)
            if opened.plan.predicted is not None:
                screen.say(predicted_words(opened.plan))
            said["profile"] = trace
        else:
            y = opened.run(x)
        said["devices"] = {name: state.reason or "ready" for name, state in opened.states().items()}
        for name, state in opened.states().items():
            if not state.alive:
                screen.say(f"note: device {name} is not used: {state.reason}")
    return {opened.output_name: y}, said


def _read_arrays(path: Path) -> Any:
    try:
        loaded = np.load(path, allow_pickle=False)
        return np.asarray(loaded) if isinstance(loaded, np.ndarray) else {k: loaded[k] for k in loaded.files}
    except FileNotFoundError:
        raise FileError(f"no such file: {path}", "check the path") from None
    except (OSError, ValueError, EOFError, MemoryError, zipfile.BadZipFile, zlib.error) as e:
        raise FileError(f"{path} is not a readable array file: {e}", "write it with numpy.save") from e


def _write_arrays(path: Path, outputs: dict[str, Any]) -> None:
    buffer = io.BytesIO()
    if len(outputs) == 1:
        np.save(buffer, next(iter(outputs.values())))
    else:
        np.savez(buffer, **outputs)
    write_file(path, buffer.getvalue())


def bench(screen: Screen, *, directories: tuple[Path, ...], suite: str | None, calibrate: str | None,
          checkpoints: Path | None, batches: tuple[int, ...], seconds: float, json_to: str | None, trust_code: bool,
          devices: tuple[int, ...]) -> None:
    from gkp.benchmarks import bench as benchmarks
    from gkp.benchmarks.results import Bench
    from gkp.benchmarks.suite_tables import suite_tables
    from gkp.runtime.environment import fingerprint

    if bool(directories) + bool(suite) + bool(calibrate) != 1:
        raise UsageError("give artefact directories, or --suite cpu|gpu|edge, or --calibrate trt",
                         "e.g. gkp bench model.ort model.openvino")
    if suite == "gpu" or calibrate:
        from gkp.benchmarks.gpu.command import gpu_bench

        gpu_bench(screen, bool(calibrate), json_to)
        return
    if suite == "edge":
        from gkp.benchmarks.edge.command import edge_bench

        edge_bench(screen, devices, checkpoints, seconds, json_to)
        return
    if devices:
        raise UsageError("--devices is of --suite edge", "leave it out")
    before = fingerprint()
    with screen.progress() as progress:
        if suite:
            from gkp.benchmarks.suites import run_cpu

            found = run_cpu(checkpoints, progress)
        else:
            found = Bench(rows=benchmarks.bench(directories, batches, seconds, progress, trust_code), environment=before)
    screen.show(benchmarks.table(found.rows))
    screen.show(suite_tables(found))
    screen.say(f"{before['cpu']}, {before['cores']} cores, load {before['load_average']} at the start; medians, "
               "interleaved in one process", style="dim")
    write_json(json_to, found.json())


def prune(screen: Screen, *, baseline: Path, output: Path, json_to: str | None, **options: Any) -> None:
    from gkp.converter.sources._torchfile import read_pickle_file
    from gkp.converter.sources.dense import open_dense

    opened = open_dense(baseline)
    from gkp.pruning import command  # needs PyTorch, which open_dense asks for in words

    dense = command.Baseline(baseline, opened.arch, opened.module, opened.meta)
    say = screen.say if screen.verbose else None
    try:
        with screen.progress() as progress:
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
    write_json(json_to, msgspec.json.format(msgspec.json.encode(setting), indent=2) + b"\n")


def split(screen: Screen, *, model: Path, output: Path | None, devices: str, link: str, profiles: tuple[str, ...],
          input_shape: tuple[str, ...], arch: str | None, trust_code: bool, json_to: str | None, **options: Any) -> None:
    from gkp.converter.sources import OpenOptions
    from gkp.edge.devices import parse_devices, parse_link
    from gkp.edge.planner import SplitOptions
    from gkp.edge.planner import split as run
    from gkp.edge.profile import parse_profiles
    from gkp.edge.report import FILE_NAME, modes_table
    from gkp.edge.words import reasons

    asked = SplitOptions(parse_devices(devices), parse_link(link), profiles=parse_profiles(profiles),
                         opening=OpenOptions(parse_shapes(input_shape), arch, trust_code), **options)
    out = output or Path(f"{model.stem or model.name}.split")
    with screen.progress() as progress:
        plan = run(model, out, asked, progress)
    screen.show(modes_table(plan))
    for text in reasons(plan) if screen.verbose else ():
        screen.say(text)
    for note in plan.notes:
        screen.say(note, style="bold yellow" if note.startswith("warning: ") else "")
    trust = " --trust-code" if any(s.file.endswith(".so") for s in plan.segments) else ""
    screen.say(f"\nwritten: {out}   (picture: {out / FILE_NAME})")
    screen.say(f"try: gkp run {out} --local{trust} --input FILE.npy", wrap=False)
    write_json(json_to, msgspec.json.format(msgspec.json.encode(plan, order="deterministic"), indent=1) + b"\n")


def edge_profile(screen: Screen, *, source: Path, devices: str | None, link: str, seconds: float, output: Path | None,
                 input_shape: tuple[str, ...], arch: str | None, trust_code: bool, json_to: str | None, target: str,
                 cpu: str) -> None:
    from gkp.edge import profile as profiling

    out = output or (source / profiling.FILE_NAME if source.is_dir() else Path(profiling.FILE_NAME))
    check_writable(out)
    with screen.progress() as progress:
        if source.is_dir():
            if devices is not None or target != "ort":
                raise UsageError("--devices and --target are for a model; a split folder has its own", "leave them out")
            found = profiling.measure(profiling.folder_jobs(source, trust_code), seconds, progress)
        else:
            from gkp.converter.sources import OpenOptions
            from gkp.edge.devices import parse_devices, parse_link
            from gkp.edge.planner import SplitOptions, measure_modes

            if devices is None:
                raise UsageError(f"{source} is a model: for which devices?", "e.g. --devices 4, or a folder of gkp split")
            asked = SplitOptions(parse_devices(devices), parse_link(link), target=target, cpu=cpu,
                                 opening=OpenOptions(parse_shapes(input_shape), arch, trust_code))
            found = measure_modes(source, asked, seconds, progress)
    write_file(out, profiling.encode(found))
    steal = "" if not found.steal else f", {found.steal:.1%} of the time stolen"
    screen.say(f"written: {out} ({len(found.entries)} segments, one thread"
               + (f" on core {found.cpu}" if found.cpu is not None else ", not pinned")
               + f"; load {found.load_average[0]} to {found.load_average[1]}{steal})")
    if found.waited > 0.25:
        screen.say(f"warning: half of the segments waited for the processor {found.waited:.0%} of their time or more: "
                   "measure again when the machine is quiet", style="bold yellow")
    write_json(json_to, profiling.encode(found))


def serve(screen: Screen, *, folders: tuple[Path, ...], keys: Path | None, insecure: bool, peers: tuple[str, ...],
          json_to: str | None, **options: Any) -> None:
    from gkp.edge.identity import require_grpc

    require_grpc()
    from gkp.edge import serve as serving

    serving.check_keys_given(keys, insecure)

    def ready(worker: serving.Serving) -> None:
        devices = ", ".join(f"device {k} of plan {digest[:12]}" for digest, k in worker.plans.items())
        screen.say(f"{worker.name} is ready on {worker.address}: {devices}")
        write_json(json_to, msgspec.json.encode({"schema_version": 1, "name": worker.name, "address": worker.address,
                                                 "plans": worker.plans}) + b"\n")

    drained = serving.serve(serving.ServeOptions(folders=folders, keys=keys, peers=serving.parse_peers(peers), **options),
                            ready)
    screen.say("stopped; every open request was answered" if drained else "stopped; open requests were dropped")


def edge_keys(screen: Screen, *, directories: tuple[Path, ...], output: Path, days: int) -> None:
    from gkp.edge.keys import make_keys
    from gkp.edge.plan import read_plan

    for folder in make_keys([read_plan(directory) for directory in directories], output, days):
        screen.say(f"written: {folder}")
    screen.say(f"copy each to its device; {output / 'ca.key'} stays here")


def edge_up(screen: Screen, *, directories: tuple[Path, ...], address: str, keys: Path, output: Path,
            threads: int | None) -> None:
    from gkp.edge.identity import require_grpc

    require_grpc()
    from gkp.edge import ray_cluster

    check_writable(output)
    ray_cluster.up(ray_cluster.UpOptions(directories, address, keys, output, threads), screen.say)
    screen.say("stopped; the workers have ended")


def parse_shapes(values: tuple[str, ...]) -> dict[str, tuple[int, ...]]:
    """["[NAME:]N,C,H,W", ...] -> {name or "": shape}. UsageError when malformed, or an axis is below 1."""
    shapes: dict[str, tuple[int, ...]] = {}
    for text in values:
        name, _, numbers = text.rpartition(":")
        try:
            shape = tuple(int(n) for n in numbers.split(","))
        except ValueError:
            raise UsageError(f"--input-shape {text!r} is not a shape", "e.g. --input-shape 1,3,224,224") from None
        if min(shape) < 1:
            raise UsageError(f"--input-shape {text!r}: every axis must be at least 1",
                             "a batch of 0 holds no sample; e.g. --input-shape 1,3,224,224")
        if len(shape) < 2 or prod(shape) > 2**31:
            raise UsageError(f"--input-shape {text!r} is not an image batch", "e.g. --input-shape 1,3,224,224")
        shapes[name] = shape
    return shapes


def parse_layers(values: tuple[str, ...]) -> dict[str, str]:
    """["NAME=FORM", ...] -> {name: form}."""
    layers: dict[str, str] = {}
    for text in values:
        name, equals, form = text.rpartition("=")
        if not equals or not name or not form:
            raise UsageError(f"--layer {text!r} is not NAME=FORM", "e.g. --layer layer1.0.conv1=dense")
        layers[name] = form
    return layers


COMMANDS: dict[str, Callable[..., int | None]] = {
    "convert": convert, "inspect": inspect, "verify": verify, "eval": evaluate, "run": run, "bench": bench,
    "prune": prune, "split": split, "edge profile": edge_profile, "serve": serve, "edge keys": edge_keys, "edge up": edge_up}
