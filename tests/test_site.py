"""The documentation site: it builds without a warning, has every page and every public name, and its links lead somewhere."""

from __future__ import annotations

import re
import subprocess
import sys
from html import unescape
from pathlib import Path
from urllib.parse import unquote

import docs_kit
import pytest
from docs_kit import ROOT
from sphinx.util.inventory import InventoryFile

import gkp

_LINKED = re.compile(r'(?:href|src)="([^"]+)"')


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `make docs` builds."""
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(["make", "--old-file", ".venv/installed", "docs", f"BIN={Path(sys.executable).parent}", f"SITE={folder}"],
                          cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_every_page_is_there(site: Path) -> None:
    pages = [*docs_kit.pages(), ROOT / "CHANGELOG.md", ROOT / "CONTRIBUTING.md", ROOT / "docs" / "api.rst"]
    assert [str(p) for p in pages if not (site / p.relative_to(ROOT)).with_suffix(".html").is_file()] == []


def test_the_api_reference_has_every_public_name(site: Path) -> None:
    with (site / "objects.inv").open("rb") as file:
        found = InventoryFile.load(file, "", lambda base, path: path)
    named = {name for kind in found if kind.startswith("py:") for name in found[kind]}
    assert {f"gkp.{name}" for name in gkp.__all__ if name != "__version__"} <= named
    assert {"gkp.edge.Cluster.run", "gkp.errors.UsageError"} <= named


def test_its_links_and_pictures_lead_somewhere(site: Path) -> None:
    """Those within it: files, and on pages of its own headings too."""
    found = []
    ids = {page: set(re.findall(r'\bid="([^"]+)"', page.read_text(encoding="utf-8"))) for page in site.rglob("*.html")}
    for page in ids:
        for link in map(unescape, _LINKED.findall(page.read_text(encoding="utf-8"))):
            name, _, anchor = link.partition("#")
            target = (page.parent / unquote(name.partition("?")[0])).resolve() if name else page
            if ":" in name or (target.is_file() and (not anchor or target not in ids or anchor in ids[target])):
                continue
            found.append(f"{page.relative_to(site)}: {link}")
    assert found == []


def test_it_begins_at_the_index(site: Path) -> None:
    url = re.search(r"url=([^\"]+)", (site / "index.html").read_text(encoding="utf-8"))
    assert url is not None
    assert "From a paper" in (site / url[1]).read_text(encoding="utf-8")
