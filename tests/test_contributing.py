"""CONTRIBUTING.md says which files a new part touches: those exist, they are all, and the map knows every folder."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import pytest
from layout import packages

ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
OUTSIDE = ("docs", "examples", "tests", "tools")


@dataclass(frozen=True)
class Kind:
    """A kind of part. example: one there is; word: what only the files that know it contain; most: files that may."""

    example: str
    word: str
    most: int


KINDS = {
    "source": Kind("structure_lth", r"^    structure_lth,$|sources\.structure_lth\b", 3),
    "pass": Kind("fold_batchnorm", r"^    fold_batchnorm,$|passes\.fold_batchnorm\b|passes import fold_batchnorm\b", 2),
    "target": Kind("onnx", r"targets\.onnx\b", 4),
    "kernel family": Kind("winograd", r"kernels\.winograd\b|kernels import (.*, )?winograd\b", 2),
    "architecture": Kind("densenet", r"models import (.*, )?densenet\b|models\.densenet\b", 2),
    "pruning method": Kind("gsparsity", r"methods\.gsparsity\b", 3),
    "edge mode": Kind("pipeline", r"[\"']pipeline[\"']", 5),
}


def _listed(kind: str) -> list[str]:
    """The files in the list below "## Adding a KIND"; NAME stands for the new part's."""
    section = re.search(rf"^## Adding an? {kind}\n(.*?)(?=^## |\Z)", TEXT, re.MULTILINE | re.DOTALL)
    assert section is not None, f"no section about adding a {kind}"
    return re.findall(r"^- `([^`\s]+)`", section[1], re.MULTILINE)


def _product() -> list[str]:
    """Every Python file of the packages, as a path from the root, but for benchmarks/: what is measured is chosen there."""
    return sorted(str(file.relative_to(ROOT)) for name, folder in packages().items() for file in folder.glob("*.py")
                  if not name.startswith("gkp.benchmarks"))


@pytest.mark.parametrize("kind", KINDS)
def test_every_listed_file_exists(kind: str) -> None:
    """With NAME replaced by a part that there is."""
    files = [name.replace("NAME", KINDS[kind].example) for name in _listed(kind)]
    assert [name for name in files if not (ROOT / name).is_file()] == []
    assert 0 < len(files) == len(set(files)) <= KINDS[kind].most


@pytest.mark.parametrize("kind", KINDS)
def test_no_other_file_of_the_product_names_the_part(kind: str) -> None:
    """So a new one needs no other file either."""
    listed = {name.replace("NAME", KINDS[kind].example) for name in _listed(kind)}
    naming = {name for name in _product() if re.search(KINDS[kind].word, (ROOT / name).read_text(encoding="utf-8"), re.MULTILINE)}
    assert naming, "the word finds nothing: the example is gone"
    assert naming - listed == set()


def test_the_map_shows_every_folder_and_no_other() -> None:
    section = re.search(r"^## Where things are\n+```\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL)
    assert section is not None
    shown: set[str] = set()
    path: list[str] = []
    for indent, name in re.findall(r"^( *)(\w+)/ ", section[1], re.MULTILINE):
        path = [*path[:len(indent) // 2], name]
        shown.add("/".join(path))
    assert shown == {str(folder.relative_to(ROOT)) for folder in packages().values()} | set(OUTSIDE)
