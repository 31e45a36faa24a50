"""examples/edge/Dockerfile: what it copies is what is built, what it installs exists, and the command in it serves."""

from __future__ import annotations

import configparser
import fnmatch
import json
import re
import subprocess
from pathlib import Path

import cluster_kit as kit
import pytest
from cli_kit import ROOT, entry_point

from gkp import __version__
from gkp.edge.wire.keys import make_keys

FILE = ROOT / "examples" / "edge" / "Dockerfile"


@pytest.fixture(scope="module")
def instructions() -> dict[str, str]:
    """By name; none is there twice but RUN, of which the last counts."""
    lines = FILE.read_text(encoding="utf-8").replace("\\\n", " ").splitlines()
    return dict(line.split(" ", 1) for line in lines if line and not line.startswith("#"))


def test_hadolint_finds_nothing_wrong() -> None:
    done = subprocess.run([*entry_point("hadolint"), str(FILE)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


def test_it_copies_the_wheel_and_installs_the_worker(instructions: dict[str, str]) -> None:
    pattern = instructions["COPY"].split()[0]
    assert fnmatch.fnmatch(f"gkp-{__version__}-py3-none-any.whl", pattern)
    assert not fnmatch.fnmatch(f"gkp-{__version__}.tar.gz", pattern), "the sdist lies beside it"
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    extra = re.search(r"\$\{wheel\}\[(\w+)\]", instructions["RUN"])
    assert extra is not None
    assert extra[1] in config["options.extras_require"]


def test_it_runs_as_a_user_without_rights(instructions: dict[str, str]) -> None:
    assert int(instructions["USER"]) > 0
    assert f" --uid {instructions['USER']} " in FILE.read_text(encoding="utf-8").partition("RUN useradd")[2].partition("\n")[0]
    assert "--insecure" not in instructions["CMD"]
    assert f":{instructions['EXPOSE']}" in instructions["CMD"]


def test_its_command_serves_a_device(instructions: dict[str, str], tmp_path: Path) -> None:
    made = kit.split(tmp_path / "split", "replicas", 1)
    make_keys([made.plan], tmp_path / "keys")
    here = {"gkp": entry_point("gkp")[0], "/device": str(tmp_path / "split" / "device_0"), "/keys": str(tmp_path / "keys" / "d0"),
            "0.0.0.0:7000": "127.0.0.1:0"}
    words = [*json.loads(instructions["ENTRYPOINT"]), *json.loads(instructions["CMD"])]
    assert set(here) <= set(words)
    process = subprocess.Popen([*(here.get(word, word) for word in words), "--json", "-"], stdout=subprocess.PIPE,
                               stderr=subprocess.DEVNULL)
    try:
        assert process.stdout is not None
        assert b'"name":"d0"' in process.stdout.readline()
        process.terminate()
        assert process.wait(30) == 0
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
