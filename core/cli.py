"""The command line: one click group, `gkp`; `gkp-convert` is `gkp convert` as its own entry point."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import rich_click as click

from gkp import _version
from gkp.cli_options import PATH, declared, devices, opening, pixels, segments, trust, verbosity
from gkp.console import Screen, guarded
from gkp.errors import UsageError
from gkp.files import check_writable
from gkp.options.convert import every_option
from gkp.options.targets import EVERY, TARGETS
from gkp.pruning.methods import METHODS

click.rich_click.SHOW_ARGUMENTS = True
click.rich_click.TEXT_MARKUP = "ansi"
_CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 100}


def _groups(first: Iterable[str], named: Iterable[tuple[str, str]]) -> list[Any]:
    """Headings of a help text with the options below them: the usual ones, then by (heading, option)."""
    headings: dict[str, list[str]] = {"Usual options": [*first, *_ALWAYS]}
    for heading, flag in named:
        headings.setdefault(heading, []).append(flag)
    return [{"name": heading, "options": flags} for heading, flags in headings.items()]


def _convert_groups() -> list[Any]:
    """Options that no heading claims are usual."""
    declared = [(found.option.group, found.flags[-1]) for found in every_option()]
    return _groups(["--target", *(flag for group, flag in declared if not group), "--report", "--json"],
                   [*((_OPENING, flag) for flag in ("--input-shape", "--arch", "--trust-code")),
                    *((group, flag) for group, flag in declared if group)])


_ALWAYS, _OPENING = ("--verbose", "--quiet", "--help"), "Opening the model"
_SUITES = ("--suite", "--checkpoints", "--data", "--calibration", "--devices", "--link", "--device-speed", "--models",
           "--only", "--variants", "--calibrate")
click.rich_click.OPTION_GROUPS = {
    **dict.fromkeys(("gkp convert", "gkp-convert"), _convert_groups()),
    "gkp bench": _groups(("--batch", "--seconds", "--trust-code", "--json"),
                         [("Standard suites", flag) for flag in _SUITES])}


@click.group(context_settings=_CONTEXT)
@click.version_option(_version.__version__, prog_name="gkp")
def main() -> None:
    """Makes grouped-pruned CNNs fast: convert, verify and measure.

    Start with `gkp inspect MODEL` to see what is in a checkpoint, then `gkp convert MODEL --target ort`.
    """


@main.command("convert", context_settings=_CONTEXT)
@click.argument("model", type=PATH)
@click.option("--target", type=click.Choice([struct.name for struct in EVERY]), default="ort", show_default=True,
              metavar="NAME", help=f"What to produce: {'; '.join(f'{struct.name}: {struct.summary}' for struct in EVERY)}.")
@opening
@declared
@click.option("--json", "json_to", metavar="FILE|-", help="Write the report as JSON to a file or to stdout.")
@click.option("--report", type=PATH, metavar="FILE.html", help="Write the report as a self-contained page.")
@verbosity
def convert(**options: Any) -> None:
    """Convert MODEL (ONNX, TorchScript, a checkpoint of a pruning method) into what is fastest on the target, verify it and
    measure the speedup over dense. If nothing beats dense, dense comes out, and the report says so.

    Example: gkp-convert grouped.pt --target native --baseline dense.pt
    """
    _run("convert", options)


@main.command("inspect", context_settings=_CONTEXT)
@click.argument("model", type=PATH)
@opening
@click.option("--target", type=click.Choice([struct.name for struct in TARGETS]), default="onnx", show_default=True,
              help="Whose forms to show. Nothing is measured or compiled; estimates are called estimates.")
@click.option("--json", "json_to", metavar="FILE|-", help="Write it as JSON to a file or to stdout.")
@verbosity
def inspect(**options: Any) -> None:
    """Show the layers of MODEL: branches, channels per branch, overlap, multiply-accumulates, forms.

    MODEL may also be an artefact directory: then its manifest is shown.
    """
    _run("inspect", options)


@main.command("verify", context_settings=_CONTEXT)
@click.argument("a", type=PATH)
@click.argument("b", type=PATH)
@opening
@click.option("--precision", type=click.Choice(["fp32", "bf16", "fp16"]),
              help="Whose tolerance to apply. [default: that of the artefacts]")
@click.option("--calibration", metavar="cifar10:DIR|folder:DIR|FILE",
              help="Of an artefact in int8: the images that it was calibrated with, to compare on them.")
@click.option("--json", "json_to", metavar="FILE|-", help="Write the result as JSON to a file or to stdout.")
@verbosity
def verify(**options: Any) -> None:
    """Do A and B (models or artefact directories) compute the same? Exit code 1 if not."""
    _run("verify", options)


@main.command("eval", context_settings=_CONTEXT)
@click.argument("model", type=PATH)
@click.option("--data", required=True, metavar="cifar10:DIR|folder:DIR|FILE.npz",
              help="Test set: CIFAR-10; a folder for each class (in DIR/val where there is one); x and y of an .npz.")
@click.option("--mean", metavar="R,G,B", help="Normalisation. [default: the usual one of system and data set]")
@click.option("--std", metavar="R,G,B", help="Normalisation. [default: the usual one of system and data set]")
@click.option("--batch", type=click.IntRange(1, 4096), default=100, show_default=True)
@opening
@click.option("--json", "json_to", metavar="FILE|-", help="Write the result as JSON to a file or to stdout.")
@verbosity
def evaluate(**options: Any) -> None:
    """Accuracy of MODEL (an artefact directory or a model file) on a data set."""
    _run("eval", options)


@main.command("run", context_settings=_CONTEXT)
@click.argument("directory", type=PATH)
@click.option("--input", "input_file", type=PATH, required=True, metavar="FILE.npy",
              help="Input array, normalised, [N, C, H, W]; .npz for several inputs by name.")
@click.option("--output", "output_file", type=PATH, metavar="FILE.npy",
              help="Where to write the output. [default: print a summary]")
@click.option("--local", is_flag=True, help="A split model: start a worker per device on this machine, and run it there.")
@click.option("--cluster", type=PATH, metavar="FILE.yaml", help="A split model: run it on the workers that FILE lists.")
@click.option("--profile", is_flag=True, help="A split model: show what every device computed and sent, and when.")
@trust
@click.option("--json", "json_to", metavar="FILE|-", help="Write shape, dtype and top-1 classes as JSON.")
@verbosity
def run(**options: Any) -> None:
    """Run the artefact in DIRECTORY on one input file.

    DIRECTORY may hold a split model (gkp split): then say where it runs, with --local or --cluster.
    """
    _run("run", options)


@main.command("bench", context_settings=_CONTEXT)
@click.argument("directories", type=PATH, nargs=-1)
@click.option("--suite", type=click.Choice(["cpu", "gpu", "edge", "zoo"]), help="A standard suite instead of artefacts. "
              "cpu: the published checkpoints and ResNet-50 with grouped 3x3 convolutions, on every engine of the CPU; "
              "gpu: a ResNet-50 and a ResNet-20 on PyTorch, ONNX Runtime and TensorRT, under 8 minutes; edge: what "
              "splitting them over devices buys, with worker processes on this machine, about half an hour; zoo: the ONNX "
              "files of --models, dense and masked, in the native kernels beside the dense network on every stock engine.")
@click.option("--devices", type=click.IntRange(2, 16), multiple=True, metavar="N",
              help="Of --suite edge: over how many devices; may be repeated. [default: 2]")
@click.option("--models", type=PATH, metavar="DIR", help="Of --suite zoo: the folder with the ONNX files.")
@click.option("--link", "links", multiple=True, metavar="NAME|BANDWIDTH,RTT", help="Of --suite edge: between the devices, "
              "as of gkp split; may be repeated. [default: loopback and 1gbe]")
@click.option("--device-speed", type=float, metavar="S", help="Of --suite edge: each device gets this share of a core, by "
              "a processor quota, and so does what is computed on one device; links stay as they are. [default: 1]")
@click.option("--only", metavar="NAME,...", help="Of --suite cpu: words in the names of networks; of --suite zoo: "
              "names of files, without .onnx; of --suite edge: rows (branch, spatial, spatial-dense, ...), or words in the "
              "names of networks. [default: all]")
@click.option("--variants", metavar="NAME,...", help="Of --suite zoo: dense, block, tmi. [default: all]")
@click.option("--calibrate", type=click.Choice(["trt"]), help="Measure convolutions on the GPU here, and write them into "
              "your own cost table, by which --target trt chooses forms.")
@click.option("--checkpoints", type=PATH, metavar="DIR", help="Published checkpoints for --suite cpu and edge.")
@click.option("--data", metavar="cifar10:DIR|FILE.npz", help="Of --suite cpu: labelled images, to measure the accuracy of "
              "the published checkpoints on.")
@click.option("--calibration", metavar="cifar10:DIR|FILE", help="Of --suite cpu: images to calibrate their int8 with. "
              "[default: random numbers]")
@click.option("--batch", "batches", type=click.IntRange(1, 4096), multiple=True,
              help="Batch sizes. [default: those the artefact was measured at]")
@click.option("--seconds", type=click.FloatRange(0.1, 600), default=3.0, show_default=True,
              help="Time to spend on each batch size; of --suite edge, on each row; of --suite zoo, on each form of an "
              "engine.")
@trust
@click.option("--json", "json_to", metavar="FILE|-", help="Write the table as JSON to a file or to stdout.")
@verbosity
def bench(**options: Any) -> None:
    """Measure artefacts again, here: each turn by turn with its dense baseline, in one process.

    Example: gkp bench grouped.ort grouped.openvino
    """
    _run("bench", options)


@main.command("prune", context_settings=_CONTEXT, epilog="\n\n".join(f"{m.name}: {m.summary}" for m in METHODS))
@click.argument("method", type=click.Choice([method.name for method in METHODS]))
@click.option("--baseline", type=PATH, required=True, metavar="FILE",
              help="The trained dense network: a checkpoint of gkp, a state dict, or the baseline of TMI-GKP.")
@click.option("-o", "--output", type=PATH, required=True, help="Directory to write, or to go on with.")
@click.option("--model", metavar="NAME", help="What the baseline must be, such as resnet20. [default: as recognised]")
@click.option("--data", metavar="cifar10:DIR|folder:DIR", help="Images to train and test on; optional with --epochs 0.")
@click.option("--snapshots", type=PATH, metavar="DIR", help="tmi-gkp: epoch_N.pt files of the baseline's training.")
@click.option("--settings", type=PATH, metavar="FILE.json", help="Settings of the method. [default: the published ones]")
@click.option("--epochs", type=click.IntRange(0, 100_000), help="Epochs of every training phase, whose schedule is scaled "
              "to it; 0 trains nothing. [default: as published]")
@click.option("--seed", type=click.IntRange(0, 2**63 - 1), default=0, show_default=True)
@click.option("--multi", is_flag=True, help="tmi-gkp: prune all convolutions of a bottleneck, not its 3x3 only.")
@click.option("--mixed-precision", type=click.Choice(["no", "fp16", "bf16"]), default="no", show_default=True)
@click.option("--public", is_flag=True, help="Write the last network also as the method's own program publishes it, in the "
              f"directory's folder public. For {', '.join(method.name for method in METHODS if method.public)}.")
@click.option("--force", is_flag=True, help="Begin again in a directory that gkp prune wrote before.")
@click.option("--json", "json_to", metavar="FILE|-", help="Write settings and results as JSON to a file or to stdout.")
@verbosity
def prune(**options: Any) -> None:
    """Prune a trained network into grouped convolutions and fine-tune it.

    An interrupted run goes on after its last finished epoch when the same command is given again.

    Example: gkp prune tmi-gkp --baseline baseline --snapshots snapshots --data cifar10:data -o pruned
    """
    _run("prune", options)


@main.command("split", context_settings=_CONTEXT)
@click.argument("model", type=PATH)
@devices
@click.option("--objective", type=click.Choice(["latency", "throughput", "memory"]), default="latency", show_default=True,
              help="What to make small: the time of one request, the time between requests, or the memory of the fullest "
                   "device.")
@click.option("--mode", type=click.Choice(["auto", "local", "replicas", "branch", "spatial", "pipeline", "hybrid"]),
              default="auto", show_default=True, help="How to divide the work. auto: the best of them by prediction, which "
              "may be local: do not split. Any other is obeyed, with a warning when it loses.")
@click.option("--profile", "profiles", multiple=True, metavar="[DEVICE=]FILE", help="Measured times, of gkp edge profile; "
              "with DEVICE=, measured on that device. [default: estimates]")
@click.option("--wire", type=click.Choice(["float32", "float16", "int8"]), default="float32", show_default=True,
              help="How arrays travel between devices; float16 halves the bytes and rounds; int8: what is quantised travels "
                   "as its integers, a quarter of the bytes, and is the same to the bit.")
@pixels
@segments
@click.option("-o", "--output", type=PATH, help="Directory to write. [default: MODEL-stem.split]")
@click.option("--force", is_flag=True, help="Overwrite a directory that gkp split wrote before.")
@opening
@click.option("--json", "json_to", metavar="FILE|-", help="Write the plan as JSON to a file or to stdout.")
@verbosity
def split(**options: Any) -> None:
    """Split MODEL over several devices: predict every mode, choose, write one folder per device, verify.

    DIR/plan.json says what every mode would cost, DIR/plan.html shows it. Times of segments are measured ones where
    --profile has them, else estimates, and called so.

    Examples: gkp split grouped.pt --devices 4 --link 1gbe -o split;
    gkp split grouped.pt --devices devices.yaml --link 100mbit,2ms --objective throughput --profile profile.json
    """
    _run("split", options)


@main.command("serve", context_settings=_CONTEXT)
@click.argument("folders", type=PATH, nargs=-1, required=True)
@click.option("--listen", required=True, metavar="HOST:PORT", help="Where to listen; unix:PATH for a socket here.")
@click.option("--keys", type=PATH, metavar="DIR", help="This device's folder of those that gkp edge keys wrote.")
@click.option("--insecure", is_flag=True, help="No certificates and no encryption: loopback addresses and sockets only.")
@click.option("--peer", "peers", multiple=True, metavar="NAME=HOST:PORT",
              help="Where another device listens, if not where the plan says.")
@click.option("--threads", type=click.IntRange(1, 1024), help="Threads of every segment. [default: physical cores]")
@click.option("--queue", type=click.IntRange(1, 1024), default=16, show_default=True,
              help="Requests that may be open at once; more are refused (RESOURCE_EXHAUSTED).")
@click.option("--grace", type=click.FloatRange(0, 600), default=10.0, show_default=True, metavar="SECONDS",
              help="After SIGTERM: time for the requests that are open.")
@click.option("--json", "json_to", metavar="FILE|-", help="When ready, write address and plans as JSON.")
@verbosity
def serve(**options: Any) -> None:
    """Serve this device's part of a split model (DIR/device_0, ...) to the coordinator and the other devices.

    Everybody has a certificate (mutual TLS). It speaks the Open Inference Protocol besides, and ends after SIGTERM once the
    open requests are answered.

    Example: gkp serve split/device_0 --listen 0.0.0.0:7000 --keys keys/kitchen
    """
    _run("serve", options)


@main.group("edge", context_settings=_CONTEXT)
def edge() -> None:
    """A model on several devices: what is done once for a cluster."""


@edge.command("keys", context_settings=_CONTEXT)
@click.argument("directories", type=PATH, nargs=-1, required=True)
@click.option("-o", "--output", type=PATH, default=Path("keys"), show_default=True, metavar="DIR",
              help="Where the authority is, or is made, and the certificates are written.")
@click.option("--days", type=click.IntRange(1, 3650), default=365, show_default=True, help="How long they are valid.")
@verbosity
def edge_keys(**options: Any) -> None:
    """Make certificates for the coordinator and every device of the split models in DIRECTORIES.

    They name the plans: a worker takes requests for those only. Run it again after splitting again. Copy DIR/NAME to the
    device NAME; DIR/ca.key stays here.

    Example: gkp edge keys split -o keys
    """
    _run("edge keys", options)


@edge.command("profile", context_settings=_CONTEXT)
@click.argument("source", type=PATH)
@click.option("--devices", metavar="N|FILE.yaml", help="SOURCE is a model: the devices to split it for.")
@click.option("--link", default="1gbe", show_default=True, metavar="NAME|BANDWIDTH,RTT", help="SOURCE is a model: the link.")
@click.option("--seconds", type=click.FloatRange(0.1, 3600), default=20.0, show_default=True, help="Time to spend, about.")
@pixels
@segments
@click.option("-o", "--output", type=PATH, metavar="FILE", help="[default: profile.json in the folder SOURCE, or here]")
@opening
@click.option("--json", "json_to", metavar="FILE|-", help="Write the profile as JSON to a file or to stdout as well.")
@verbosity
def edge_profile(**options: Any) -> None:
    """Measure segments, each alone on one core with one thread, turn by turn; for gkp split --profile.

    SOURCE is a folder of gkp split (or one device's folder in it, on that device), or a model: then the segments of every
    mode are measured, so that all modes can be compared by measured times.

    Example: gkp edge profile grouped.pt --devices 4 -o profile.json
    """
    _run("edge profile", options)


@edge.command("up", context_settings=_CONTEXT)
@click.argument("directories", type=PATH, nargs=-1, required=True)
@click.option("--ray", "address", required=True, metavar="HOST:PORT", help="The Ray cluster, as ray start --head says it. "
              "It must ask for a token (RAY_AUTH_MODE=token).")
@click.option("--keys", type=PATH, default=Path("keys"), show_default=True, metavar="DIR",
              help="What gkp edge keys wrote. Every device gets its own keys only.")
@click.option("-o", "--output", type=PATH, default=Path("cluster.yaml"), show_default=True, metavar="FILE",
              help="The cluster file for gkp run --cluster; it is there as long as the workers are.")
@click.option("--threads", type=click.IntRange(1, 1024), help="Threads of every worker. [default: its physical cores]")
@verbosity
def edge_up(**options: Any) -> None:
    """Start a worker for every device of a split model on a Ray cluster, and keep them running.

    DIRECTORIES: of the split model, then of the same one split for fewer of the devices, for when one is lost.

    A node is the device NAME when it was started with ray start --resources='{"gkp:NAME": 1}'. Folders and keys travel to
    the nodes through Ray, requests do not. Ctrl-C ends the workers.

    Example: gkp edge up split --ray 192.0.2.20:6379 --keys keys
    """
    _run("edge up", options)


def _run(name: str, options: dict[str, Any]) -> None:
    screen = Screen(options.pop("verbose"), options.pop("quiet"))

    def work() -> int | None:
        if screen.verbose and screen.quiet:
            raise UsageError("-v and -q exclude each other", "leave one out")
        for written in ("json_to", "report", "output_file"):
            if options.get(written) not in (None, "-"):
                check_writable(Path(options[written]))
        from gkp import commands  # imported here: --help stays fast, and missing extras are errors of the command

        return commands.COMMANDS[name](screen, **options)

    sys.exit(guarded(screen, work))


def convert_main() -> None:
    """`gkp-convert`."""
    convert(prog_name="gkp-convert")
