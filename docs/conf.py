"""The documentation site (`make docs`): the repository's own Markdown where it lies, and an API reference of the docstrings.

The source folder is the repository's root, so links between pages and to files lead to the same places as in the checkout.
What stands in the tables of the pages in NAVIGATION is the site's navigation; a page that is in none fails the build.
"""

from __future__ import annotations

import re
from pathlib import Path

from sphinx.application import Sphinx

from gkp import __version__

project, release, version = "gkp", __version__, __version__
root_doc = "docs/README"
include_patterns = ["*.md", "docs/**", "examples/**/*.md"]
exclude_patterns = [".*", "build", "data", "demo", "dist", "shared"]
extensions = ["myst_parser", "sphinx.ext.autodoc"]
myst_heading_anchors = 4
maximum_signature_line_length = 90
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
html_theme = "furo"
html_title = f"gkp {release}"
html_copy_source = False
html_static_path = html_css_files = ["site.css"]
smartquotes = False

NAVIGATION = ("docs/README", "docs/adr/README")
_TABLE = re.compile(r"^\| ([^|\n]*?) ?\|[^\n]*\n\|[-| :]+\|\n((?:\|.*\n)+)", re.MULTILINE)
_LINK = re.compile(r"\[([^\]]+)\]\(([^)#\s]+\.(?:md|rst))\)")


def _navigate(app: Sphinx, page: str, source: list[str]) -> None:
    """Add what the page's tables link to, in their first column, as hidden toctrees: below the table's heading by the links'
    words, else by the pages' titles."""
    if page not in NAVIGATION:
        return
    for heading, rows in _TABLE.findall(source[0]):
        links = [found for row in rows.splitlines() for found in _LINK.findall(row.split("|")[1])]
        caption = f":caption: {heading}\n" if heading else ""
        entries = [f"{words} <{target}>" if heading else target for words, target in links]
        source[0] += f"\n```{{toctree}}\n:hidden:\n{caption}\n" + "\n".join(entries) + "\n```\n"


def _as_rst(app: Sphinx, what: str, name: str, thing: object, options: object, lines: list[str]) -> None:
    """Docstrings are plain text with `code` and indented examples."""
    found: list[str] = []
    for line in lines:
        if line.startswith("    "):
            if found and not found[-1] and not (len(found) > 1 and found[-2].startswith(" ")):
                found += ["::", ""]
            found.append(line)
        else:
            parts = line.split("`")
            parts[::2] = [re.sub(r"([\\*|_])", r"\\\1", part) for part in parts[::2]]
            found.append("``".join(parts))
    lines[:] = found


def _begin(app: Sphinx, failure: Exception | None) -> None:
    """An index.html in the site's root."""
    if failure is None and app.builder.format == "html":
        Path(app.outdir, "index.html").write_text(
            '<!doctype html><meta charset="utf-8"><title>gkp</title>'
            f'<meta http-equiv="refresh" content="0; url={root_doc}.html"><a href="{root_doc}.html">gkp</a>\n', "utf-8")


def setup(app: Sphinx) -> None:
    app.connect("source-read", _navigate)
    app.connect("autodoc-process-docstring", _as_rst)
    app.connect("build-finished", _begin)
