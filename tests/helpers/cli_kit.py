"""Calling the command line, in this process or as the installed programs, and what must hold when it refuses."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import onnx
import prepared_kit
from click.testing import CliRunner
from onnx_kit import Net

from gkp.cli import main

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples" / "resnet20_cifar10"
GROUPED, DENSE = EXAMPLES / "grouped.pt", EXAMPLES / "dense.pt"
FAST = ("--no-benchmark", "--threads", "1")


@dataclass(frozen=True)
class Outcome:
    """What a call left behind."""

    code: int
    out: str
    err: str


def commands(group: click.Group = main, before: tuple[str, ...] = ()) -> dict[tuple[str, ...], click.Command]:
    """Every command by the words it is called with, groups and what is in them too: ("convert",), ("edge", "keys")."""
    found: dict[tuple[str, ...], click.Command] = {}
    for name, command in sorted(group.commands.items()):
        words = (*before, name)
        found[words] = command
        if isinstance(command, click.Group):
            found |= commands(command, words)
    return found


def gkp(*args: object, expect: int | None = None) -> Outcome:
    """`gkp ARGS` in this process; `expect` is the exit code it must have."""
    result = CliRunner().invoke(main, [str(a) for a in args], prog_name="gkp")
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    outcome = Outcome(result.exit_code, result.stdout, result.stderr)
    assert expect is None or outcome.code == expect, outcome.err
    return outcome


def program(*args: object, env: Mapping[str, str] | None = None, before: Sequence[str] = (), timeout: float = 120,
            **options: Any) -> Outcome:
    """`gkp ARGS` as a process of its own, from the installed entry point. before, options: what starts it in another way."""
    words, variables = [*before, *entry_point("gkp"), *map(str, args)], {**os.environ, "OMP_NUM_THREADS": "1", **(env or {})}
    if before or options:
        done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=timeout, env=variables, **options)
    else:
        done = prepared_kit.run(words, Path.cwd(), variables, timeout)
    return Outcome(done.returncode, done.stdout, done.stderr)


def entry_point(name: str) -> list[str]:
    """The installed console script."""
    return [str(Path(sys.executable).with_name(name))]


def blocked(modules: Sequence[str], body: str, timeout: float = 120) -> Outcome:
    """Run Python code in a process in which importing any of these packages fails, as if they were not installed."""
    code = ("import sys\n"
            "class Block:\n"
            "    def find_spec(self, name, path=None, target=None):\n"
            f"        if name.partition('.')[0] in {tuple(modules)!r}:\n"
            "            raise ModuleNotFoundError(f'No module named {name!r}', name=name)\n"
            "sys.meta_path.insert(0, Block())\n" + body)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=timeout,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})
    return Outcome(done.returncode, done.stdout, done.stderr)


def blocked_gkp(modules: Sequence[str], *args: object) -> Outcome:
    """`gkp ARGS` without these packages."""
    return blocked(modules, f"sys.argv = {['gkp', *map(str, args)]!r}\nfrom gkp.cli import main\nmain()\n")


def assert_refused(outcome: Outcome, code: int, *words: str) -> None:
    """One error line with these words, at most one hint, the right code, nothing on stdout, no traceback. (Before it there may
    be lines of progress, one every ten seconds.)"""
    lines = [line for line in outcome.err.splitlines() if " so far" not in line]
    assert outcome.code == code, outcome.err
    assert [line for line in lines if line.startswith("error: ")] == lines[:1], outcome.err
    assert all(line.startswith("  try: ") for line in lines[1:]), outcome.err
    assert len(lines) <= 2, outcome.err
    for word in words:
        assert word.lower() in outcome.err.lower(), outcome.err
    assert outcome.out == ""


def refuse(folder: Path, model: Path, code: int, *words: str, options: Sequence[object] = ()) -> None:
    """`gkp convert MODEL` is refused and leaves `folder` as it was; so is it with `gkp inspect`."""
    before = listing(folder)
    assert_refused(gkp("convert", model, "-o", folder / "out.onnx", "--target", "onnx", *FAST, *options), code, *words)
    assert listing(folder) == before


def listing(folder: Path) -> list[str]:
    """Everything below a folder, hidden files too."""
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*"))


def small_net(groups: int = 4, batch: Any = 1, size: Any = 8, seed: int = 0, channels: int = 8) -> onnx.ModelProto:
    """Convolution, a grouped convolution between two permutations, classifier."""
    net = Net(batch, 3, size, size, seed=seed)
    x = net.relu(net.conv3("x", 3, channels))
    x = net.take(x, net.rng.permutation(channels))
    x = net.relu(net.bn(net.conv3(x, channels, channels, group=groups), channels))
    x = net.take(x, net.rng.permutation(channels))
    x = net.op("Flatten", net.op("GlobalAveragePool", net.conv1(x, channels, channels)))
    return net.model(net.op("Gemm", x, net.const(net.normal(5, channels)), net.const(net.normal(5)), transB=1))


def save(model: onnx.ModelProto, path: Path) -> Path:
    """Write without checking: bad models are written here too."""
    path.write_bytes(model.SerializeToString())
    return path
