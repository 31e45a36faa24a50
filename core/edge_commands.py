"""What the subcommands for several devices do (see gkp.commands)."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import msgspec

from gkp.arguments import parse_shapes
from gkp.console import Screen
from gkp.errors import UsageError
from gkp.files import check_writable, write_file
from gkp.images.normalisation import Normalisation, numbers, of_input
from gkp.text import plural

_FIRST = ("warning: ", "do not split", "does not fit", "idle: ", "verified")
"""How the notes of a plan begin that are shown without -v."""


def run_split(screen: Screen, directory: Path, x: Any, profile: bool,
               **where: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """(outputs by name, what else goes into the JSON: "devices", and with profile "profile")."""
    from gkp.edge import Cluster
    from gkp.edge.coordinate import trace as tracing
    from gkp.edge.plan.describe import predicted_text

    if isinstance(x, dict):
        if len(x) != 1:
            raise UsageError(f"a split model has one input, the file holds {len(x)} arrays", "write one with numpy.save")
        x = next(iter(x.values()))
    said: dict[str, Any] = {}
    with ExitStack() as stack:
        with screen.progress() as progress:
            progress("starting the workers" if where.get("local") else "connecting to the workers", None)
            opened = stack.enter_context(Cluster(directory, **where))
            progress("running it", None)
            y = opened.run(x)  # the first request also connects the devices and warms them up
        if profile:
            y, trace = opened.trace(x)
            for table in tracing.tables(trace, every_step=screen.verbose):
                screen.show(table)
            if opened.plan.predicted is not None:
                screen.say(predicted_text(opened.plan))
            said["profile"] = trace
        said["devices"] = {name: state.reason or "ready" for name, state in opened.states().items()}
        for name, state in opened.states().items():
            if not state.alive:
                screen.say(f"note: device {name} is not used: {state.reason}")
    return {opened.output_name: y}, said


def split(screen: Screen, *, model: Path, output: Path | None, devices: str, link: str, profiles: tuple[str, ...],
          input_shape: tuple[str, ...], arch: str | None, trust_code: bool, json_to: str | None, input_type: str,
          mean: str | None, std: str | None, **options: Any) -> None:
    from gkp.converter.sources import OpenOptions
    from gkp.edge.divide.planner import SplitOptions
    from gkp.edge.divide.planner import split as run
    from gkp.edge.forecast.profile import parse_profiles
    from gkp.edge.forecast.report import FILE_NAME, modes_table
    from gkp.edge.plan.describe import reasons
    from gkp.edge.plan.devices import parse_devices, parse_link

    asked = SplitOptions(parse_devices(devices), parse_link(link), profiles=parse_profiles(profiles),
                         opening=OpenOptions(parse_shapes(input_shape), arch, trust_code),
                         normalisation=_normalisation(input_type, mean, std), **options)
    out = output or Path(f"{model.stem or model.name}.split")
    with screen.progress() as progress:
        plan = run(model, out, asked, progress)
    screen.show(modes_table(plan))
    for text in reasons(plan) if screen.verbose else ():
        screen.say(text)
    shown = [note for note in plan.notes if screen.verbose or note.startswith(_FIRST)]
    for note in shown:
        screen.say(note, style="bold yellow" if note.startswith("warning: ") else "")
    if len(shown) < len(plan.notes):
        screen.say(f"({plural(len(plan.notes) - len(shown), 'more note')} with -v)", style="dim")
    trust = " --trust-code" if any(s.file.endswith(".so") for s in plan.segments) else ""
    screen.say(f"\nwritten: {out}   (picture: {out / FILE_NAME})")
    screen.say(f"try: gkp run {shlex.quote(str(out))} --local{trust} --input FILE.npy", wrap=False)
    screen.json(json_to, plan.encode() + b"\n")


def _normalisation(input_type: str, mean: str | None, std: str | None) -> Normalisation | None:
    given = numbers(mean, "--mean"), numbers(std, "--std")
    if input_type != "uint8" and any(given):
        raise UsageError("--mean and --std are for --input-type uint8", "leave them out: requests bring normalised images")
    return of_input(input_type, *given)


def edge_profile(screen: Screen, *, source: Path, devices: str | None, link: str, seconds: float, output: Path | None,
                 input_shape: tuple[str, ...], arch: str | None, trust_code: bool, json_to: str | None, target: str,
                 cpu: str, input_type: str, mean: str | None, std: str | None) -> None:
    from gkp.edge.forecast import profile as profiling

    normalisation = _normalisation(input_type, mean, std)
    out = output or (source / profiling.FILE_NAME if source.is_dir() else Path(profiling.FILE_NAME))
    check_writable(out)
    with screen.progress() as progress:
        if source.is_dir():
            if devices is not None or target != "ort" or normalisation is not None:
                raise UsageError("--devices, --target and --input-type are for a model; a split folder has its own",
                                 "leave them out")
            found = profiling.measure(profiling.folder_jobs(source, trust_code), seconds, progress)
        else:
            from gkp.converter.sources import OpenOptions
            from gkp.edge.divide.planner import SplitOptions, measure_modes
            from gkp.edge.plan.devices import parse_devices, parse_link

            if devices is None:
                raise UsageError(f"{source} is a model: for which devices?", "e.g. --devices 4, or a folder of gkp split")
            asked = SplitOptions(parse_devices(devices), parse_link(link), target=target, cpu=cpu,
                                 normalisation=normalisation,
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
    screen.json(json_to, profiling.encode(found))


def serve(screen: Screen, *, folders: tuple[Path, ...], keys: Path | None, insecure: bool, peers: tuple[str, ...],
          json_to: str | None, **options: Any) -> None:
    from gkp.edge.wire.identity import require_grpc

    require_grpc()
    from gkp.edge.device import serve as serving

    serving.check_keys_given(keys, insecure)

    def ready(worker: serving.Serving) -> None:
        screen.interruption.check()  # one that came meanwhile, and that something swallowed
        devices = ", ".join(f"device {k} of plan {digest[:12]}" for digest, k in worker.plans.items())
        screen.say(f"{worker.name} is ready on {worker.address}: {devices}")
        screen.json(json_to, msgspec.json.encode({"schema_version": 1, "name": worker.name, "address": worker.address,
                                                 "plans": worker.plans}) + b"\n")

    drained = serving.serve(serving.ServeOptions(folders=folders, keys=keys, peers=serving.parse_peers(peers), **options),
                            ready)
    screen.say("stopped; every open request was answered" if drained else "stopped; open requests were dropped")


def edge_keys(screen: Screen, *, directories: tuple[Path, ...], output: Path, days: int) -> None:
    from gkp.edge.plan.schema import read_plan
    from gkp.edge.wire.keys import make_keys

    for folder in make_keys([read_plan(directory) for directory in directories], output, days):
        screen.say(f"written: {folder}")
    screen.say(f"copy each to its device; {output / 'ca.key'} stays here")


def edge_up(screen: Screen, *, directories: tuple[Path, ...], address: str, keys: Path, output: Path,
            threads: int | None) -> None:
    from gkp.edge.wire.identity import require_grpc

    require_grpc()
    from gkp.edge.ray import cluster as ray_cluster

    check_writable(output)
    ray_cluster.up(ray_cluster.UpOptions(directories, address, keys, output, threads), screen.say)
    screen.say("stopped; the workers have ended")


EDGE_COMMANDS: dict[str, Callable[..., int | None]] = {
    "split": split, "edge profile": edge_profile, "serve": serve, "edge keys": edge_keys, "edge up": edge_up}
