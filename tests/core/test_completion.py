"""Shell completion, as docs/tasks/README.md tells a shell to load it."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from cli_kit import ROOT, program

PAGE = (ROOT / "docs" / "tasks" / "README.md").read_text(encoding="utf-8")


def documented(shell: str) -> str:
    """The line for the shell's start file."""
    found = re.search(rf"^\| {shell} \| `[^`]+` \| `([^`]+)` \|$", PAGE, re.MULTILINE)
    assert found is not None
    return found[1].replace("\\|", "|")


@pytest.mark.parametrize(("typed", "offered"), [
    ("gkp ins", ["inspect"]),
    ("gkp edge k", ["keys"]),
    ("gkp convert --target open", ["openvino"]),
    ("gkp inspect --trust", ["--trust-code"]),
    ("gkp-convert --dynamic", ["--dynamic-batch"])])
def test_bash_completes_what_was_begun(typed: str, offered: list[str], tmp_path: Path) -> None:
    """By the documented line, in a bash that then does what Tab does."""
    words = typed.split()
    function = f"_{words[0].replace('-', '_')}_completion"
    script = (f"{documented('bash')}\ncomplete -p {words[0]} >&2\nCOMP_WORDS=({typed})\nCOMP_CWORD={len(words) - 1}\n"
              f'{function} {words[0]}\nprintf "%s\\n" "${{COMPREPLY[@]}}"\n')
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run([shutil.which("bash") or "bash", "--norc", "-c", script], capture_output=True, text=True, check=False,
                          cwd=tmp_path, env={**os.environ, "PATH": path})
    assert (done.returncode, done.stdout.split()) == (0, offered), done.stderr
    assert function in done.stderr


@pytest.mark.parametrize("shell", ["zsh", "fish"])
@pytest.mark.parametrize("name", ["gkp", "gkp-convert"])
def test_the_other_shells_get_a_script_of_theirs(shell: str, name: str) -> None:
    variable = f"_{name.upper().replace('-', '_')}_COMPLETE"
    assert f"{variable}={shell}_source {name}" in documented(shell)
    if name == "gkp":
        script = program(env={variable: f"{shell}_source"}, cwd=ROOT)
        assert script.code == 0
        assert f"{variable}={shell}_complete" in script.out
