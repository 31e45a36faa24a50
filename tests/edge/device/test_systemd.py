"""examples/edge/gkp-worker.service: systemd accepts it, it is locked down, and the command in it serves."""

from __future__ import annotations

import configparser
import shlex
import shutil
import subprocess
from pathlib import Path

import cluster_kit as kit
import pytest
from cli_kit import entry_point

from gkp.edge.wire.keys import make_keys

UNIT = Path(__file__).resolve().parents[3] / "examples" / "edge" / "gkp-worker.service"
PROGRAM = "/opt/gkp/bin/gkp"


@pytest.fixture(scope="module")
def unit() -> configparser.ConfigParser:
    parser = configparser.ConfigParser(interpolation=None)
    parser.optionxform = str  # type: ignore[assignment,method-assign]
    parser.read(UNIT)
    return parser


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="no systemd-analyze here")
def test_systemd_finds_nothing_wrong(tmp_path: Path) -> None:
    file = tmp_path / UNIT.name
    file.write_text(UNIT.read_text().replace(PROGRAM, shutil.which("true") or ""))
    done = subprocess.run(["systemd-analyze", "verify", str(file)], capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


def test_it_runs_as_a_user_without_rights_and_comes_back(unit: configparser.ConfigParser) -> None:
    service = unit["Service"]
    assert service["User"] not in ("", "root")
    assert service["CapabilityBoundingSet"] == ""
    assert {service[k] for k in ("NoNewPrivileges", "ProtectHome", "PrivateTmp", "RestrictNamespaces")} == {"yes"}
    assert (service["ProtectSystem"], service["SystemCallFilter"]) == ("strict", "@system-service")
    assert (service["Restart"], unit["Unit"]["StartLimitIntervalSec"]) == ("always", "0")
    assert "--insecure" not in service["ExecStart"]


def test_its_time_to_stop_is_longer_than_the_workers_grace(unit: configparser.ConfigParser) -> None:
    words = shlex.split(unit["Service"]["ExecStart"])
    assert float(words[words.index("--grace") + 1]) < float(unit["Service"]["TimeoutStopSec"])


def test_its_command_serves_a_device(unit: configparser.ConfigParser, tmp_path: Path) -> None:
    made = kit.split(tmp_path / "split", "replicas", 1)
    make_keys([made.plan], tmp_path / "keys")
    here = {PROGRAM: entry_point("gkp")[0], "/etc/gkp/device_0": str(tmp_path / "split" / "device_0"),
            "/etc/gkp/kitchen": str(tmp_path / "keys" / "d0"), "0.0.0.0:7000": "127.0.0.1:0"}
    words = shlex.split(unit["Service"]["ExecStart"])
    assert set(here) <= set(words)
    process = subprocess.Popen([*(here.get(word, word) for word in words), "--json", "-"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    try:
        assert process.stdout is not None
        assert b'"name":"d0"' in process.stdout.readline()
        process.terminate()
        assert process.wait(30) == 0
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
