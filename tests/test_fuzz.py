"""A short run of the fuzzer, and proof that it would see what it looks for."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

TOOLS = Path(__file__).resolve().parents[1] / "tools"
sys.path.insert(0, str(TOOLS))


def fuzz(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(TOOLS / "fuzz.py"), "--workers", "1", *arguments], capture_output=True,
                          text=True, check=False, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"})


@pytest.mark.slow
def test_three_hundred_mutated_files_are_opened_or_refused(tmp_path: Path) -> None:
    done = fuzz("--runs", "300", "--seed", "7", "--keep", str(tmp_path / "keep"))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "300 runs in" in done.stdout
    assert "FAIL" not in done.stdout
    assert not (tmp_path / "keep").exists()
    for kind in ("FileError", "UnsafeFileError", "opened"):
        assert kind in done.stdout


def test_a_run_is_the_same_file_every_time() -> None:
    from random import Random

    import fuzz
    import fuzz_mutate

    corpus = {"a.onnx": b"\x08\x01" * 50, "b.pt": b"\x80\x02}q\x00." * 9, "c.json": b'{"a": [1, 2]}' * 5}
    for number in range(50):
        files = set()
        for _ in range(2):
            rng, name = fuzz.draw(3, number, corpus)
            files.add(fuzz_mutate.mutate(rng, name, corpus))
        assert len(files) == 1
    assert fuzz_mutate.mutate(Random(1), "b.pt", corpus) != fuzz_mutate.mutate(Random(2), "b.pt", corpus)


BODY = """
import os, pickle, socket, subprocess, sys, tempfile
sys.path.insert(0, {tools!r})
import fuzz
from pathlib import Path
folder = Path({folder!r})
guard = fuzz.Guard(str(folder))
sys.addaudithook(guard)
def act(path, deep):
    {action}
fuzz.open_like_gkp = act
fuzz.SECONDS = 0.5
print(*fuzz.attempt(folder, "x.pt", b"data", guard, deep=False))
"""
ACTIONS = {
    "os.system": "os.system('true')",
    "subprocess": "subprocess.run(['true'])",
    "exec": "exec('1')",
    "pickle": "pickle.loads(pickle.dumps(Path))",
    "socket": "socket.socket()",
    "open for writing": "open({outside!r}, 'w')",
    "remove": "os.remove({outside!r})",
    "rename": "os.rename(path, {outside!r})",
    "another error": "raise KeyError('x')",
    "swallowed": "\n    try: os.system('true')\n    except BaseException: pass",
    "endless": "\n    while True: pass",
    "memory": "bytearray(2 << 30)",
    "message of two lines": "from gkp.errors import FileError; raise FileError('a\\nb')",
}


@pytest.mark.parametrize("name", ACTIONS)
def test_the_fuzzer_sees_what_it_looks_for(name: str, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    outside = tmp_path / "outside"
    outside.write_text("mine")
    action = ACTIONS[name].format(outside=str(outside))
    body = BODY.format(tools=str(TOOLS), folder=str(tmp_path / "in"), action=action)
    done = subprocess.run([sys.executable, "-c", body], capture_output=True, text=True, check=False, timeout=60)
    assert done.stdout.startswith("FAIL"), done.stdout + done.stderr
    assert outside.read_text() == "mine"


@pytest.mark.parametrize("action", ["path.read_bytes()", "(path.parent / 'f').write_text('x')", "import colorsys",
                                    "from collections import namedtuple; namedtuple('A', 'b')",
                                    "from gkp.errors import FileError; raise FileError('corrupt')"])
def test_the_fuzzer_lets_pass_what_is_harmless(action: str, tmp_path: Path) -> None:
    body = BODY.format(tools=str(TOOLS), folder=str(tmp_path), action=action)
    done = subprocess.run([sys.executable, "-c", body], capture_output=True, text=True, check=False, timeout=60)
    assert done.stdout.startswith(("opened", "FileError")), done.stdout + done.stderr


@pytest.mark.parametrize("death", ["os.kill(os.getpid(), 11)", "os._exit(3)"])
def test_a_worker_that_dies_is_a_failure_of_its_run_and_the_rest_goes_on(death: str, tmp_path: Path) -> None:
    """A copy of the fuzzer whose run number 2 ends the process."""
    for file in TOOLS.glob("fuzz*.py"):
        text = file.read_text()
        if file.name == "fuzz.py":
            marker = 'print("start", number, file=report)\n'
            assert marker in text
            text = text.replace(marker, marker + f"            if number == 2:\n                {death}\n")
        if file.name == "fuzz_corpus.py":
            text = text[: text.index("def write")] + ("def write(folder):\n    (folder / 'a.json').write_text('{}')\n"
                                                      "    return ['a.json']\n")
        (tmp_path / file.name).write_text(text)
    done = subprocess.run([sys.executable, str(tmp_path / "fuzz.py"), "--runs", "5", "--workers", "1", "--keep",
                           str(tmp_path / "keep")], capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 1
    assert "FAIL run 2 (a.json): the process ended with" in done.stdout
    assert "5 runs in" in done.stdout
    assert [p.name for p in (tmp_path / "keep").iterdir()] == ["0-2-a.json"]


