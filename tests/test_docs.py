"""The documentation says what is so: its commands run, its links lead somewhere, its tables are complete."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import docs_kit
import prepared_kit
import pytest
from cli_kit import commands
from docs_kit import ROOT, Block

from gkp import console, interrupt, manifest
from gkp.converter.sources import SOURCES
from gkp.errors import GkpError
from gkp.options.targets import TARGETS

README = ROOT / "README.md"
DOCS = ROOT / "docs"
PAGES = docs_kit.pages()
# The part of its page that describes a command inside a group.
PARTS: dict[tuple[str, ...], str] = {
    ("edge", "keys"): "Keys", ("edge", "profile"): "Profile", ("edge", "up"): "Ray"}
# In two pieces, so that this file does not hold them.
MACHINE_PATH = re.compile(r"(?<![\w.~-])/(?:" + "|".join(("wo" "rk", "ro" "ot", "tm" "p")) + r")(?:/|\b)")
REGISTRIES = ("pypi" ".org", "python" "hosted", "npm" "js", "ana" "conda", "download." "pytorch", "docker" ".io")


def _read(page: Path) -> str:
    return page.read_text(encoding="utf-8")


# ---- commands and snippets ------------------------------------------------------------------------------------------
def _groups() -> list[Any]:
    """(page, blocks) of one page that have the same needs; each runs in a folder of its own."""
    params = []
    for page in PAGES:
        found = docs_kit.blocks(page)
        for needs, slow in sorted({(tuple(sorted(b.needs)), b.slow) for b in found if b.runs and not b.file}):
            chosen = [b for b in found if b.file or (b.runs and (tuple(sorted(b.needs)), b.slow) == (needs, slow))]
            label = "-".join([str(page.relative_to(ROOT)), *needs, *(["slow"] if slow else [])])
            params.append(pytest.param(frozenset(needs), chosen, id=label, marks=[pytest.mark.slow] if slow else []))
    return params


@pytest.mark.parametrize(("needs", "chosen"), _groups())
def test_documented_commands_and_snippets_run(needs: frozenset[str], chosen: list[Block], tmp_path: Path) -> None:
    if reason := docs_kit.missing(needs):
        pytest.skip(reason)
    docs_kit.prepare(tmp_path)
    for call in docs_kit.run(chosen, tmp_path):
        assert call.code == call.expected, f"{call.what}\nexit {call.code}, documented {call.expected}\n{call.output}"


@pytest.mark.parametrize("page", [p for p in PAGES if any(b.exit_code and b.shown for b in docs_kit.blocks(p))],
                         ids=lambda page: str(page.relative_to(ROOT)))
def test_documented_errors_are_the_ones_printed(page: Path, tmp_path: Path) -> None:
    docs_kit.prepare(tmp_path)
    for block in docs_kit.blocks(page):
        if block.exit_code and block.shown:
            output = "".join(call.output for call in docs_kit.run([block], tmp_path))
            assert [line for line in block.shown if line not in output] == []


CODES = {
    "an exit code": "import sys; print('out'); print('err', file=sys.stderr); sys.exit(3)",
    "a text": "raise SystemExit('why')",
    "an error": "print('out'); raise ValueError('why')",
    "a signal": "import os; os.kill(os.getpid(), 9)",
    "what is left to do": "import atexit, threading, time; atexit.register(print, 'exit')\n"
                          "threading.Thread(target=lambda: (time.sleep(0.1), print('thread'))).start(); print('main')",
    "where it is": "import os, sys; print(os.getcwd(), dict(os.environ), sys.argv, sys.path[0], __name__, sys.stdin.read())",
}


@pytest.mark.parametrize("what", CODES)
def test_the_processes_that_commands_run_in_end_like_any_other(what: str, tmp_path: Path) -> None:
    words, environment = [sys.executable, "-c", CODES[what], "more"], {"PATH": "there", "OMP_NUM_THREADS": "1", "LC_CTYPE": "C.UTF-8"}
    want = subprocess.run(words, cwd=tmp_path, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    got = prepared_kit.run(words, tmp_path, environment, 60)
    assert (got.returncode, got.stdout) == (want.returncode, want.stdout)
    assert got.stderr.splitlines()[-1:] == want.stderr.splitlines()[-1:]


def test_a_command_that_does_not_end_is_killed(tmp_path: Path) -> None:
    with pytest.raises(subprocess.TimeoutExpired):
        prepared_kit.run(["python", "-c", "import time; time.sleep(300)"], tmp_path, os.environ, 0.5)


# ---- links ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("page", [*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"],
                         ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for link in docs_kit.links(page):
        if link.startswith("https://"):
            continue
        name, _, anchor = link.partition("#")
        target = page if not name else page.parent / name
        assert target.exists(), f"{link} leads nowhere"
        assert target.resolve().is_relative_to(ROOT), f"{link} leads out of the repository"
        assert not anchor or anchor in docs_kit.anchors(target), f"{link}: no such heading"


def test_every_page_can_be_reached_from_the_readme() -> None:
    seen: set[Path] = set()
    queue = [README]
    while queue:
        page = queue.pop()
        if page.suffix == ".md" and page not in seen and page.exists():
            seen.add(page)
            queue += [(page.parent / link.partition("#")[0]).resolve() for link in docs_kit.links(page)]
    assert [str(p.relative_to(ROOT)) for p in PAGES if p not in seen] == []


# ---- completeness ---------------------------------------------------------------------------------------------------
def _part(page: str, title: str) -> str:
    """What stands below a heading of the second level, up to the next one."""
    return page.split(f"\n## {title}\n")[1].split("\n## ")[0]


@pytest.mark.parametrize("words", commands(), ids=" ".join)
def test_every_option_is_on_the_page_of_its_command(words: tuple[str, ...]) -> None:
    """Those of a command inside a group, in the part that describes it."""
    page = _read(DOCS / "tasks" / f"{words[0]}.md")
    if len(words) > 1:
        page = _part(page, PARTS[words])
    options = {option for parameter in commands()[words].params for option in parameter.opts if option.startswith("-")}
    assert sorted(o for o in {*options, "--help"} if not re.search(rf"`{o}\b", page)) == []


def test_the_options_page_lists_every_exit_code() -> None:
    codes = {cls.exit_code for cls in GkpError.__subclasses__()} | {0, console.INTERNAL, interrupt.INTERRUPTED}
    assert sorted(codes - {int(code) for code in re.findall(r"^\| (\d+) \|", _read(DOCS / "tasks" / "README.md"), re.MULTILINE)}) == []


@pytest.mark.parametrize("struct", [manifest.Manifest, manifest.Layer, manifest.CandidateTime, manifest.Verification,
                                    manifest.Roofline, manifest.LayerSpeed, manifest.Rival, manifest.Load, manifest.Measurement])
def test_the_report_page_names_every_field(struct: Any) -> None:
    page = _read(DOCS / "report.md")
    assert [name for name in struct.__struct_fields__ if f"`{name}`" not in page] == []


def test_every_source_and_target_is_documented() -> None:
    sources = _read(DOCS / "sources.md")
    assert [s.__name__ for s in SOURCES if f"`{s.__name__.rpartition('.')[2]}`" not in sources] == []
    assert [t.name for t in TARGETS if not (DOCS / "targets" / f"{t.name}.md").is_file()] == []
    assert [t.name for t in TARGETS if f"docs/targets/{t.name}.md" not in _read(README)] == []


# ---- the README's table ---------------------------------------------------------------------------------------------
def _tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("update_readme", ROOT / "tools" / "update_readme.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_the_table_is_what_the_tool_writes() -> None:
    tool, readme = _tool(), _read(README)
    results, details = tool.read(), _read(tool.DETAILS)
    assert readme == tool.updated(readme, tool.section(results, tool.others()))
    assert details == tool.updated(details, tool.details(results, tool.others()))


def test_the_tool_writes_one_row_per_measurement_and_keeps_the_rest() -> None:
    tool = _tool()
    results = tool.read()
    before, after = tool.updated(f"above\n{tool.START}\nold\n{tool.END}\nbelow\n", tool.section(results)).split(tool.section(results))
    assert (before, after) == (f"above\n{tool.START}\n", f"\n{tool.END}\nbelow\n")
    assert sum(row.name in tool.section(results) for row in results.rows) == len(results.rows) > 0
    assert f"\n{tool.section(results)}".count("\n| ") == len(results.engines) + 2, "headings and the line under them"
    stock = [row for row in results.rows if row.target != "native"]
    assert f"\n{tool.details(results)}".count("\n| ") >= len(results.engines) + 2 + len(stock) + 2


def test_the_page_of_cpu_figures_begins_with_what_follows_from_them() -> None:
    tool = _tool()
    results = tool.read()
    first, _, rows = tool.details(results).partition("\n## Every row\n")
    assert "| model | batch |" in rows
    ratios = sorted(row.vs_fastest.value for found in results.engines for row in found.rows
                    if (row.engine, row.model, row.precision) == ("native", "pruned", "fp32"))
    assert f"in native kernels are {ratios[0]:.2f}x to {ratios[-1]:.2f}x as fast as the dense ones" in first
    ort = sorted(row.speedup.value for row in results.rows if row.target == "ort")
    assert f"On ONNX Runtime alone they reach {ort[0]:.2f}x to {ort[-1]:.2f}x of the dense speed there" in first
    assert all(line.startswith("- ") for line in first.splitlines()[:4])


def test_the_tool_refuses_a_readme_without_its_markers() -> None:
    tool = _tool()
    with pytest.raises(ValueError, match="lacks"):
        tool.updated("no markers here", "text")


# ---- what the repository never holds --------------------------------------------------------------------------------
def test_no_file_names_a_machine_path_or_a_package_registry() -> None:
    listed = subprocess.run(["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=ROOT,
                            capture_output=True, text=True, check=False)
    if listed.returncode != 0:
        pytest.skip("not a git checkout")
    found = []
    for name in filter(None, listed.stdout.split("\0")):
        try:
            text = (ROOT / name).read_text(encoding="utf-8")
        except (UnicodeDecodeError, FileNotFoundError, IsADirectoryError):
            continue
        words = [m[0] for m in MACHINE_PATH.finditer(text)] + [host for host in REGISTRIES if host in text.lower()]
        found += [f"{name}: {word}" for word in words]
    assert found == []


def test_the_readme_stays_short() -> None:
    assert len(_read(README).splitlines()) <= 220
