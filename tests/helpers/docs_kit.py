"""Reads the documentation: its code blocks with the comments that steer them, its links and its headings."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import prepared_kit
from brief_kit import BRIEF

from gkp.converter.native.building.toolchain import host_cpu
from gkp.converter.native.kernels.cpu import AMX_BF16, BF16

ROOT = Path(__file__).resolve().parents[2]
SHARED = ROOT / ".." / "shared" / "checkpoints"
CIFAR10 = ROOT / "data"
EXAMPLES = ROOT / "examples"
PROGRAMS = ("gkp", "gkp-convert", "python")
_FENCE = re.compile(r"((?:<!--[^\n]*-->\n+)*)```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_COMMENT = re.compile(r"<!--\s*(\w+)(?::\s*(.*?))?\s*-->")
_LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")


@dataclass(frozen=True)
class Block:
    """A fenced block. needs: what must be at hand; exit_code: of its last command; file: the name it is written under."""

    language: str
    text: str
    needs: frozenset[str]
    slow: bool
    exit_code: int
    file: str | None

    @property
    def runs(self) -> bool:
        return self.language == "python" or bool(self.commands)

    @property
    def commands(self) -> list[str]:
        """The lines that call one of PROGRAMS: all of an `sh` block, those after `$ ` of a `console` block."""
        lines = self.text.replace("\\\n", " ").splitlines()
        if self.language == "console":
            lines = [line.removeprefix("$ ") for line in lines if line.startswith("$ ")]
        elif self.language != "sh":
            return []
        return [line for line in lines if line.split(" ")[0] in PROGRAMS]

    @property
    def shown(self) -> list[str]:
        """The output that a `console` block shows."""
        lines = self.text.splitlines() if self.language == "console" else []
        return [line for line in lines if not line.startswith("$ ")]


def pages() -> list[Path]:
    """The README and everything in docs/."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def blocks(page: Path) -> list[Block]:
    """The fenced blocks of a page, in order."""
    found = []
    for comments, language, text in _FENCE.findall(page.read_text(encoding="utf-8")):
        said = dict(_COMMENT.findall(comments))
        found.append(Block(language, text, frozenset(said.get("needs", "").split()), "slow" in said,
                           int(said.get("exit", 0)), said.get("file")))
    return found


def links(page: Path) -> list[str]:
    """Targets of the links and pictures of a page, those in code left out."""
    prose = re.sub(r"`[^`\n]*`", "", _FENCE.sub("", page.read_text(encoding="utf-8")))
    return _LINK.findall(prose)


def anchors(page: Path) -> set[str]:
    """What forges call the headings of a page."""
    prose = _FENCE.sub("", page.read_text(encoding="utf-8"))
    headings = re.findall(r"^#+ (.+)$", prose, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def missing(needs: frozenset[str]) -> str | None:
    """Why blocks with these needs cannot run here, or None."""
    if "shared" in needs and not SHARED.is_dir():
        return "no published checkpoints beside the checkout"
    if "cifar10" in needs and not (CIFAR10 / "cifar10_test.npz").is_file():
        return "no CIFAR-10 test images in data/"
    if "bf16" in needs and not {BF16, AMX_BF16} & set(host_cpu().instructions):
        return "this processor has no bf16"
    return None


def prepare(folder: Path) -> None:
    """The folder in which a page's blocks run, as docs/README.md describes it."""
    for name in ("grouped.pt", "dense.pt"):
        shutil.copy(EXAMPLES / "resnet20_cifar10" / name, folder / name)
    for name, target in (("examples", EXAMPLES), ("checkpoints", SHARED), ("data", CIFAR10)):
        if target.is_dir():
            (folder / name).symlink_to(target.resolve())


@dataclass(frozen=True)
class Call:
    """One finished command or snippet."""

    what: str
    code: int
    expected: int
    output: str


def run(page_blocks: list[Block], folder: Path) -> Iterator[Call]:
    """Run the commands and snippets of the blocks in order."""
    for number, block in enumerate(page_blocks):
        if block.file is not None:
            (folder / block.file).write_text(block.text, encoding="utf-8")
        elif block.language == "python":
            script = folder / f"snippet_{number}.py"
            script.write_text(block.text, encoding="utf-8")
            yield _call(f"python snippet:\n{block.text}", ["python", script.name], 0, folder)
        else:
            for command in block.commands:
                expected = block.exit_code if command == block.commands[-1] else 0
                yield _call(command, shlex.split(command), expected, folder)


def _call(what: str, words: list[str], expected: int, folder: Path) -> Call:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    env = {**os.environ, "PATH": path, "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    program = shutil.which(words[0], path=path)
    assert program is not None, f"{words[0]} is not installed"
    done = prepared_kit.run([program, *words[1:]], folder, env, timeout=400, first=BRIEF)
    return Call(what, done.returncode, expected, done.stdout + done.stderr)
