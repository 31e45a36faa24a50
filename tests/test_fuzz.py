"""A short run of the fuzzer, and proof that it would see what it looks for."""

from __future__ import annotations

import os
import subprocess
import sys
import time
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


def spoiled(folder: Path, *changes: tuple[str, str], runs: tuple[str, ...] = ("--runs", "5")) -> subprocess.CompletedProcess[str]:
    """Some runs, from one small file, of a copy of the fuzzer with other text in the places of these."""
    for file in TOOLS.glob("fuzz*.py"):
        text = file.read_text()
        if file.name == "fuzz.py":
            for old, new in changes:
                assert text.count(old) == 1
                text = text.replace(old, new)
        if file.name == "fuzz_corpus.py":
            text = "def write(folder):\n    (folder / 'a.json').write_text('{}')\n    return ['a.json']\n"
        (folder / file.name).write_text(text)
    return subprocess.run([sys.executable, str(folder / "fuzz.py"), *runs, "--workers", "1", "--keep", str(folder / "keep")],
                          capture_output=True, text=True, check=False, timeout=120)


STARTS = 'print("start", number, file=report)\n'
ENDS = 'print("done", number, *outcome, file=report)\n'
QUICK = ("        open_like_gkp(path, deep)\n", "        pass\n")  # where it is not asked what opening gives: nothing is imported
SOON = ("HANG_SECONDS = 120.0", "HANG_SECONDS = 3.0")


def in_run(number: int, code: str, after: str = STARTS) -> tuple[str, str]:
    return after, f"{after}            if number == {number}:\n                {code}\n"


def in_run_always(code: str) -> tuple[str, str]:
    return ENDS, f"{ENDS}            {code}\n"


@pytest.mark.parametrize(("death", "said"), [("os.kill(os.getpid(), 11)", "ended with -11"), ("os._exit(3)", "ended with 3"),
                                             ("time.sleep(600)", "hung"), ("\n                while True: pass", "hung")])
def test_a_worker_that_dies_or_hangs_is_a_failure_of_its_run_and_the_rest_goes_on(death: str, said: str, tmp_path: Path) -> None:
    done = spoiled(tmp_path, in_run(2, death), QUICK, SOON)
    assert done.returncode == 1
    assert f"FAIL run 2 (a.json): the process {said}" in done.stdout
    assert "5 runs in" in done.stdout
    assert [p.name for p in (tmp_path / "keep").iterdir()] == ["0-2-a.json"]


def test_a_worker_that_dies_between_two_runs_is_a_failure_of_the_first_and_the_rest_goes_on(tmp_path: Path) -> None:
    done = spoiled(tmp_path, in_run(2, "os._exit(3)", after=ENDS), QUICK)
    assert (done.returncode, "FAIL run 2 (a.json): the process ended with 3" in done.stdout) == (1, True), done.stdout + done.stderr
    assert "5 runs in" in done.stdout


def test_a_worker_that_is_slow_to_end_after_its_runs_is_killed_and_no_failure(tmp_path: Path) -> None:
    done = spoiled(tmp_path, in_run(4, "report.close(); time.sleep(600)", after=ENDS), QUICK,
                   ("END_SECONDS = 60.0", "END_SECONDS = 0.5"))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "5 runs in" in done.stdout


def test_waiting_for_the_processor_is_not_hanging(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Two processes on one core, the second of which hardly gets it."""
    import fuzz

    monkeypatch.setattr(fuzz, "HANG_SECONDS", 0.5)
    core = {min(os.sched_getaffinity(0))}

    def busy(niceness: int) -> subprocess.Popen[bytes]:
        code = f"import os; os.sched_setaffinity(0, {core}); os.nice({niceness})\nwhile True: pass"
        return subprocess.Popen([sys.executable, "-c", code])

    first, second = busy(0), busy(19)
    try:
        worker = fuzz.Worker(second, None, 0, 0, 1)
        end = time.monotonic() + 2
        while time.monotonic() < end:
            used = worker._activity()[0]
            assert worker.hangs() == (used > 0.5)
            time.sleep(0.1)
    finally:
        for process in (first, second):
            process.kill()
            process.wait()


def test_the_files_that_a_run_starts_from_are_the_same_every_time(tmp_path: Path) -> None:
    code = f"import sys; sys.path.insert(0, {str(TOOLS)!r}); import fuzz_corpus; from pathlib import Path; fuzz_corpus.write(Path(sys.argv[1]))"
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        subprocess.run([sys.executable, "-c", code, str(tmp_path / name)], check=True, timeout=120, env={**os.environ, "PYTHONHASHSEED": "0"})
    assert {p.name: p.read_bytes() for p in (tmp_path / "a").iterdir()} == {p.name: p.read_bytes() for p in (tmp_path / "b").iterdir()}


def test_parts_are_the_same_runs_as_the_whole(tmp_path: Path) -> None:
    """What each run was and gave, as the worker writes it down; without the seconds that it took."""
    log = in_run_always("open(Path(__file__).parent / 'log', 'a').write(f'{number} {name} {data!r} {outcome[0]}\\n')")
    found = []
    for folder, parts in ((tmp_path / "whole", [(700, 9)]), (tmp_path / "parts", [(700, 2), (702, 7)])):
        folder.mkdir()
        for first, runs in parts:
            assert spoiled(folder, log, runs=("--first", str(first), "--runs", str(runs))).returncode == 0
        found.append((folder / "log").read_text().splitlines())
    assert found[0] == found[1]
    assert len(found[0]) == 9
