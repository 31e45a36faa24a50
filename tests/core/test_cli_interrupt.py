"""Ctrl-C and SIGTERM: exit code 130, one line, nothing left behind, an earlier artefact kept."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from cli_kit import FAST, GROUPED, Outcome, gkp, listing, save, small_net

import gkp as package
from gkp.console import Screen, guarded
from gkp.interrupt import Interruption

STAGES = ("opening", "finding the branches", "measuring", "verifying against the checkpoint")


ONE_LINE = ["interrupted: nothing was left half-written"]
STARTED = """
import sys
def tell(event, arguments):
    if event == "import" and arguments[0] == "gkp.cli":
        print("started", file=sys.stderr, flush=True)
sys.addaudithook(tell)
from gkp.entry import main
main()
"""
DELAYS = (0.0, 0.05, 0.2, 0.4, 0.8, 1.5, 3.0)
"""Seconds after the program began: imports, opening, measuring, depending on how busy the machine is."""


def interrupted(folder: Path, number: int, after: float, *options: str) -> Outcome:
    """Convert the example with measurements, and send a signal `after` seconds. Its first line on stderr is left out."""
    command = [sys.executable, "-c", STARTED, "convert", str(GROUPED), "-o", str(folder / "out"), "--threads", "1", *options]
    (folder / "cache").mkdir()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                               env={**os.environ, "XDG_CACHE_HOME": str(folder / "cache"), "TMPDIR": str(folder / "cache")})
    assert process.stderr is not None
    try:
        assert process.stderr.readline() == "started\n"
        time.sleep(after)
        process.send_signal(number)
        out, err = process.communicate(timeout=120)
    finally:
        process.kill()
    return Outcome(process.returncode, out, err)


def left(folder: Path) -> list[str]:
    """What lies in the folder; the cache, which ONNX Runtime writes to as well, does not count."""
    return [name for name in listing(folder) if not name.startswith("cache")]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("after", DELAYS)
def test_a_signal_at_any_moment_leaves_nothing(number: int, after: float, tmp_path: Path) -> None:
    outcome = interrupted(tmp_path, number, after)
    assert (outcome.code, outcome.out, outcome.err.splitlines()) == (130, "", ONE_LINE)
    assert left(tmp_path) == []


IN_AN_IMPORT = """
import os, signal, sys
number, when, how = int(sys.argv[1]), sys.argv[2], sys.argv[3]
class Press:
    def find_spec(self, name, path=None, target=None):
        if name == when:
            sys.meta_path.remove(self)
            try:
                os.kill(os.getpid(), number)
                for _ in range(1000): pass  # a handler that raises does so here
            except BaseException:
                if how == "converted": raise ImportError("what an extension module makes of it")
                if how == "raised": raise
sys.meta_path.insert(0, Press())
del sys.argv[1:4]
from gkp.entry import main
main()
"""


@pytest.mark.parametrize("how", ["raised", "converted", "swallowed"])
@pytest.mark.parametrize("module", ["gkp.cli", "rich_click", "numpy.random", "onnx", "torch", "torch.nn", "onnxruntime"])
def test_a_signal_in_an_import_is_not_lost_there_nor_made_another_error(module: str, how: str, tmp_path: Path) -> None:
    model = save(small_net(), tmp_path / "m.onnx") if module == "onnxruntime" else GROUPED
    done = subprocess.run([sys.executable, "-c", IN_AN_IMPORT, str(int(signal.SIGINT)), module, how, "convert", str(model), "-o",
                           str(tmp_path / "out"), *FAST], capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stdout, done.stderr.splitlines()) == (130, "", ONE_LINE)
    assert left(tmp_path) in ([], ["m.onnx"])


AT_THE_END = """
import atexit, sys, threading, time
threading.Thread(target=time.sleep, args=(600,)).start()  # the interpreter would wait for it
if sys.argv.pop(1) == "atexit":
    @atexit.register
    def wait():
        print("leaving", file=sys.stderr, flush=True)
        time.sleep(600)
from gkp.entry import main
main()
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_the_process_leaves_changes_nothing_but_ends_it(number: int) -> None:
    process = subprocess.Popen([sys.executable, "-c", AT_THE_END, "atexit", "--version"], stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    try:
        assert process.stderr.readline() == "leaving\n"
        process.send_signal(number)
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert (process.returncode, err) == (0, "")
    assert out.startswith("gkp, version")


def test_a_thread_that_does_not_end_does_not_keep_the_process(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", AT_THE_END, "", "inspect", str(tmp_path / "nowhere")], capture_output=True, text=True,
                          timeout=120, check=False)
    assert done.returncode == 6
    assert "no such file" in done.stderr


def test_a_signal_is_raised_again_when_a_destructor_swallowed_it(capsys: pytest.CaptureFixture[str]) -> None:
    class Noisy:
        def __del__(self) -> None:
            os.kill(os.getpid(), signal.SIGINT)
            for _ in range(1000):
                pass

    noisy = [Noisy()]
    def work() -> None:
        noisy.clear()
        time.sleep(60)

    with pytest.raises(KeyboardInterrupt), Interruption().raised():
        work()
    assert capsys.readouterr().err == ""


def test_a_signal_that_another_thread_got_wakes_the_main_one() -> None:
    aside = threading.Event()
    got = threading.Thread(target=lambda: aside.wait(60), daemon=True)
    got.start()
    waiting = threading.Lock()
    waiting.acquire()
    threading.Timer(0.2, lambda: signal.pthread_kill(got.ident or 0, signal.SIGTERM)).start()
    with pytest.raises(KeyboardInterrupt), Interruption().raised():
        waiting.acquire(timeout=60)
    aside.set()


def test_a_swallowed_signal_is_raised_at_the_next_step() -> None:
    screen = Screen(quiet=True)

    def work() -> int:
        with screen.progress() as progress:
            with contextlib.suppress(BaseException):
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(60)
            progress("the next step", None)
        return 0

    assert guarded(screen, work) == 130


def test_ctrl_c_that_was_ignored_from_the_start_stays_ignored() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with Interruption().raised():
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.05)
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.slow
@pytest.mark.parametrize(("number", "after"), [(signal.SIGINT, 6.0), (signal.SIGTERM, 9.0)])
def test_a_signal_while_native_kernels_are_tried_ends_the_compilers(number: int, after: float, tmp_path: Path) -> None:
    outcome = interrupted(tmp_path, number, after, "--target", "native")
    assert (outcome.code, outcome.out, outcome.err.splitlines()) == (130, "", ONE_LINE)
    assert left(tmp_path) == []
    assert [name for name in os.listdir(tmp_path / "cache") if name.startswith("gkp-")] == []
    running = [p for p in Path("/proc").glob("[0-9]*") if str(tmp_path) in _environment(p)]
    assert running == []


def _environment(process: Path) -> str:
    try:
        return (process / "environ").read_bytes().decode(errors="replace")
    except OSError:  # it has ended, or is another user's
        return ""


@pytest.mark.parametrize("stage", STAGES)
def test_ctrl_c_at_every_stage_leaves_nothing(stage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from gkp import console

    model = save(small_net(), tmp_path / "m.onnx")
    gkp("convert", model, "-o", tmp_path / "out", *FAST, expect=0)
    before = {p: p.read_bytes() for p in (tmp_path / "out").iterdir()}
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    plain = console.Screen.progress

    def progress(self: console.Screen) -> object:
        with plain(self) as report:
            def press(text: str, share: float | None) -> None:
                report(text, share)
                if text.startswith(stage):
                    os.kill(os.getpid(), signal.SIGINT)
                    time.sleep(0.1)

            yield press

    monkeypatch.setattr(console.Screen, "progress", contextlib.contextmanager(progress))
    outcome = gkp("convert", model, "-o", tmp_path / "out", "--force", "--threads", "1")
    assert outcome.code == 130
    assert outcome.err.splitlines() == ONE_LINE
    assert {p: p.read_bytes() for p in (tmp_path / "out").iterdir()} == before
    assert left(tmp_path) == ["m.onnx", "out", "out/manifest.json", "out/model.onnx"]
    package.load(tmp_path / "out").close()


def test_the_handler_of_sigterm_is_put_back(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGTERM)
    gkp("inspect", tmp_path / "nowhere", expect=6)
    assert signal.getsignal(signal.SIGTERM) is before
