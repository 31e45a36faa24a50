"""Options that several commands have, and those that gkp.options declares, as click's decorators."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import rich_click as click

from gkp.images.normalisation import INPUTS
from gkp.options.base import Declared
from gkp.options.convert import every_option
from gkp.options.targets import CPU_NAMES

PATH = click.Path(path_type=Path, readable=False)  # gkp says itself, with its own exit codes, what it cannot read


def verbosity(command: Callable[..., Any]) -> Callable[..., Any]:
    command = click.option("-q", "--quiet", is_flag=True, help="Print errors only.")(command)
    return click.option("-v", "--verbose", is_flag=True, help="Print everything, and tracebacks of errors.")(command)


def trust(command: Callable[..., Any]) -> Callable[..., Any]:
    return click.option("--trust-code", is_flag=True, help="Open files that run code when loaded: .pt2, and native "
                        "libraries and TensorRT engines that somebody else built.")(command)


def opening(command: Callable[..., Any]) -> Callable[..., Any]:
    command = click.option("--arch", metavar="PKG:CALLABLE", help="A function that builds the module for a state dict whose "
                           "architecture is not recognised: your own, torchvision's or timm's.")(command)
    command = trust(command)
    return click.option("--input-shape", "input_shape", multiple=True, metavar="[NAME:]N,C,H,W",
                        help="Input shape, where the file does not say it.")(command)


def declared(command: Callable[..., Any]) -> Callable[..., Any]:
    """The options that gkp.options declares."""
    for found in reversed(list(every_option())):
        command = _click_option(found)(command)
    return command


def _click_option(found: Declared) -> Callable[..., Any]:
    """Texts are parsed by the struct, which Python callers meet, too."""
    about, flags = found.option, (*found.flags, found.name)
    if isinstance(found.default, bool):
        return click.option(*flags, is_flag=True, flag_value=not found.default, default=found.default, help=about.help)
    kind = click.Choice(about.choices) if about.choices else click.IntRange(*about.between) if about.between \
        else PATH if about.path else str
    default = None if about.many or not isinstance(found.default, str) else found.default
    return click.option(*flags, type=kind, multiple=about.many, default=default, show_default=default is not None,
                        metavar=about.metavar, help=about.help)


def segments(command: Callable[..., Any]) -> Callable[..., Any]:
    command = click.option("--cpu", type=click.Choice(CPU_NAMES), default="host", show_default=True,
                           help="native: the processor of the devices.")(command)
    return click.option("--target", type=click.Choice(["ort", "native"]), default="ort", show_default=True,
                        help="What runs the segments: ONNX Runtime, or native kernels compiled for --cpu, with ONNX Runtime "
                             "for segments that have an operator without a kernel.")(command)


def devices(command: Callable[..., Any]) -> Callable[..., Any]:
    command = click.option("--link", default="1gbe", show_default=True, metavar="NAME|BANDWIDTH,RTT", help="Between the "
                           "devices: 1gbe, wifi, loopback, or numbers such as 100mbit,2ms.")(command)
    return click.option("--devices", required=True, metavar="N|FILE.yaml", help="How many equal devices, or a devices.yaml "
                        "with their names, speeds, memory and addresses.")(command)


def pixels(command: Callable[..., Any]) -> Callable[..., Any]:
    for name in ("--std", "--mean"):
        command = click.option(name, metavar="R,G,B", help="Of --input-type uint8: normalisation, per channel.")(command)
    return click.option("--input-type", type=click.Choice(INPUTS), default="float32", show_default=True,
                        help="uint8: requests bring pixels, [N, C, H, W]; devices normalise them by --mean "
                        "and --std.")(command)
