"""The command line: one click group, `gkp`; `gkp-convert` is `gkp convert` as its own entry point."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import rich_click as click

from gkp import _version
from gkp.console import Screen, guarded
from gkp.errors import UsageError
from gkp.files import check_writable
from gkp.runtime.load import RUNNERS

click.rich_click.SHOW_ARGUMENTS = True
click.rich_click.TEXT_MARKUP = "ansi"
_CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 100}
CPUS = ("host", "x86-64-v3", "x86-64-v4", "aarch64")
"""gkp.converter.targets.native.CPU_NAMES, which --help does not import."""
_PATH = click.Path(path_type=Path, readable=False)  # gkp says itself, with its own exit codes, what it cannot read


def _verbosity(command: Callable[..., Any]) -> Callable[..., Any]:
    command = click.option("-q", "--quiet", is_flag=True, help="Print errors only.")(command)
    return click.option("-v", "--verbose", is_flag=True, help="Print more, and tracebacks of errors.")(command)


def _trust(command: Callable[..., Any]) -> Callable[..., Any]:
    return click.option("--trust-code", is_flag=True, help="Open files that run code when loaded: .pt2, and native "
                        "libraries that somebody else built.")(command)


def _opening(command: Callable[..., Any]) -> Callable[..., Any]:
    command = click.option("--arch", metavar="PKG:CALLABLE", help="Your own code that builds the module for a state dict "
                           "whose architecture is not recognised.")(command)
    command = _trust(command)
    return click.option("--input-shape", "input_shape", multiple=True, metavar="[NAME:]N,C,H,W",
                        help="Input shape, where the file does not say it.")(command)


@click.group(context_settings=_CONTEXT)
@click.version_option(_version.__version__, prog_name="gkp")
def main() -> None:
    """Makes grouped-pruned CNNs fast: convert, verify and measure.

    Start with `gkp inspect MODEL` to see what is in a checkpoint, then `gkp convert MODEL --target ort`.
    """


@main.command("convert", context_settings=_CONTEXT)
@click.argument("model", type=_PATH)
@click.option("--target", type=click.Choice([*RUNNERS, "cpu"]), default="ort", show_default=True,
              help="What to produce: stock ONNX (onnx), what is fastest on ONNX Runtime (ort) or OpenVINO (openvino) here, "
                   "the network compiled with kernels of its own into a library that needs no runtime (native), or "
                   "whichever of these three is fastest here (cpu).")
@click.option("-o", "--output", type=_PATH, help="Directory to write. [default: MODEL-stem.TARGET]")
@click.option("--force", is_flag=True, help="Overwrite a directory that gkp wrote before.")
@_opening
@click.option("--dynamic-batch", is_flag=True, help="Any batch size at run time; measured at 1 and 64.")
@click.option("--opset", type=click.IntRange(13, 30), help="Opset of the ONNX file. [default: as opened]")
@click.option("--precision", type=click.Choice(["fp32", "fp16"]), default="fp32", show_default=True)
@click.option("--baseline", type=_PATH, metavar="DENSE_MODEL",
              help="The dense model that this one was pruned from. [default: a dense twin for pruned models]")
@click.option("--threads", type=click.IntRange(1, 1024), help="Threads at run time. [default: physical cores]")
@click.option("--strategy", type=click.Choice(["auto", "dense", "fuse", "split"]), default="auto", show_default=True,
              help="auto: the fastest form of every layer, measured; dense: zeros filled in; fuse: one grouped "
                   "convolution per layer; split: groups=n as n parallel convolutions.")
@click.option("--layer", "layers", multiple=True, metavar="NAME=FORM",
              help="Choose a layer's form yourself (names and forms: gkp inspect -v).")
@click.option("--provider", help="ONNX Runtime execution provider: cpu, cuda, tensorrt, nv-tensorrt-rtx.")
@click.option("--cpu", type=click.Choice(CPUS), help="native: the processor to compile for. x86-64-v3 has AVX2, x86-64-v4 "
              "AVX-512; aarch64 is 64-bit ARM. Only host uses everything that this machine can do. [default: host]")
@click.option("--keep-source", is_flag=True, help="native: keep the generated C++ in DIR/source, with a build.sh.")
@click.option("--hybrid", is_flag=True, help="native: let ONNX Runtime run the operators that have no kernel, between "
              "native segments. Without it such a model is refused (exit code 3).")
@click.option("--no-benchmark", is_flag=True, help="Measure nothing; forms and kernels are chosen by estimates.")
@click.option("--dry-run", is_flag=True, help="Do everything but write.")
@click.option("--json", "json_to", metavar="FILE|-", help="Write the report as JSON to a file or to stdout.")
@click.option("--report", type=_PATH, metavar="FILE.html", help="Write the report as a self-contained page.")
@_verbosity
def convert(**options: Any) -> None:
    """Convert MODEL into what is fastest on the target; verify it and measure the speedup.

    MODEL is an ONNX file, a TorchScript archive, or a checkpoint of TMI-GKP, GConv-Prune, Structure-LTH, GSparsity
    or DSP. A form is kept only if it was measured faster than the dense form of the model: if nothing beats dense, dense
    comes out and the report says so.

    Example: gkp-convert grouped.pt --target native --baseline dense.pt --report report.html
    """
    _run("convert", options)


@main.command("inspect", context_settings=_CONTEXT)
@click.argument("model", type=_PATH)
@_opening
@click.option("--target", type=click.Choice(list(RUNNERS)), default="onnx", show_default=True,
              help="Whose forms to show. Nothing is measured or compiled; estimates are called estimates.")
@click.option("--json", "json_to", metavar="FILE|-", help="Write it as JSON to a file or to stdout.")
@_verbosity
def inspect(**options: Any) -> None:
    """Show the layers of MODEL: branches, channels per branch, overlap, multiply-accumulates, forms.

    MODEL may also be an artefact directory: then its manifest is shown.
    """
    _run("inspect", options)


@main.command("verify", context_settings=_CONTEXT)
@click.argument("a", type=_PATH)
@click.argument("b", type=_PATH)
@_opening
@click.option("--precision", type=click.Choice(["fp32", "fp16"]), default="fp32", show_default=True,
              help="Whose tolerance to apply.")
@click.option("--json", "json_to", metavar="FILE|-", help="Write the result as JSON to a file or to stdout.")
@_verbosity
def verify(**options: Any) -> None:
    """Do A and B (models or artefact directories) compute the same? Exit code 1 if not."""
    _run("verify", options)


@main.command("eval", context_settings=_CONTEXT)
@click.argument("model", type=_PATH)
@click.option("--data", required=True, metavar="cifar10:DIR",
              help="Test set: cifar10_test.npz (x uint8 [N,32,32,3], y), or the standard python batches, in DIR.")
@click.option("--mean", metavar="R,G,B", help="Normalisation. [default: the one the system was trained with]")
@click.option("--std", metavar="R,G,B", help="Normalisation. [default: the one the system was trained with]")
@click.option("--batch", type=click.IntRange(1, 4096), default=100, show_default=True)
@_opening
@click.option("--json", "json_to", metavar="FILE|-", help="Write the result as JSON to a file or to stdout.")
@_verbosity
def evaluate(**options: Any) -> None:
    """Accuracy of MODEL (an artefact directory or a model file) on a data set."""
    _run("eval", options)


@main.command("run", context_settings=_CONTEXT)
@click.argument("directory", type=_PATH)
@click.option("--input", "input_file", type=_PATH, required=True, metavar="FILE.npy",
              help="Input array, normalised, [N, C, H, W]; .npz for several inputs by name.")
@click.option("--output", "output_file", type=_PATH, metavar="FILE.npy",
              help="Where to write the output. [default: print a summary]")
@_trust
@click.option("--json", "json_to", metavar="FILE|-", help="Write shape, dtype and top-1 classes as JSON.")
@_verbosity
def run(**options: Any) -> None:
    """Run the artefact in DIRECTORY on one input file."""
    _run("run", options)


@main.command("bench", context_settings=_CONTEXT)
@click.argument("directories", type=_PATH, nargs=-1)
@click.option("--suite", type=click.Choice(["cpu"]), help="The standard suite instead of artefacts: the published "
              "checkpoints and ResNet-50 with grouped 3x3 convolutions, on ONNX Runtime and OpenVINO.")
@click.option("--checkpoints", type=_PATH, metavar="DIR", help="Published checkpoints for --suite.")
@click.option("--batch", "batches", type=click.IntRange(1, 4096), multiple=True,
              help="Batch sizes. [default: those the artefact was measured at]")
@click.option("--seconds", type=click.FloatRange(0.1, 600), default=3.0, show_default=True,
              help="Time to spend on each batch size.")
@_trust
@click.option("--json", "json_to", metavar="FILE|-", help="Write the table as JSON to a file or to stdout.")
@_verbosity
def bench(**options: Any) -> None:
    """Measure artefacts again, here: each turn by turn with its dense baseline, in one process.

    Example: gkp bench grouped.ort grouped.openvino
    """
    _run("bench", options)


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
    """Entry point of gkp-convert."""
    convert(prog_name="gkp-convert")


if __name__ == "__main__":
    main()
