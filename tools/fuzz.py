"""Mutate checkpoints and open them: nothing may run, every failure is a GkpError, time and memory stay bounded.

usage: fuzz.py [--runs N] [--seed N] [--first N] [--workers N] [--keep DIR]

Run number N of a seed is always the same file, so `--first N --runs 1` repeats one, and a long run can be made in parts;
--keep saves the files that failed.
Most runs read a file as far as its source does before it builds a network; ONNX files, and some others, go through
recognition and simplification. Workers are processes of their own, so that a crash of native code is a failure of that
run and not the end.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import resource
import select
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

SECONDS = 10.0  # of processor time for one run
HANG_SECONDS = 120.0  # of a worker without a word: of processor time, or asleep; not of waiting for the processor
MEMORY_BYTES = 1536 << 20  # beyond what the worker holds after the unchanged files
CHUNK = 500  # runs of one worker process
DEEP = 6  # one in so many runs builds and exports the network
FORBIDDEN = ("os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork", "subprocess.Popen", "socket.",
             "pickle.find_class", "ctypes.dlopen", "os.kill", "pty.spawn", "webbrowser.open", "urllib.Request", "ftplib.",
             "smtplib.", "code.__new__", "marshal.loads", "exec")
END_SECONDS = 60.0  # for a worker that has nothing left to do; then it is killed
# Events that change files: where in their arguments the path is, and the descriptor of the folder it is relative to.
WRITING = {"os.remove": ((0, 1),), "os.rename": ((0, 2), (1, 3)), "os.mkdir": ((0, 2),), "os.rmdir": ((0, 1),),
           "os.link": ((1, 3),), "os.symlink": ((1, 2),), "os.chmod": ((0, 2),), "os.truncate": ((0, None),),
           "shutil.rmtree": ((0, 1),)}


class Violation(BaseException):
    """Not an Exception: no handler in the code under test may swallow it."""


# ---- worker ----------------------------------------------------------------------------------------------------------
@dataclass
class Guard:
    """An audit hook that refuses, while armed, to run anything and to write outside `folder`."""

    folder: str
    armed: bool = False
    seen: list[str] = field(default_factory=list)

    def __call__(self, event: str, args: tuple[Any, ...]) -> None:
        if self.armed and (what := self._wrong(event, args)):
            self.seen.append(what)
            raise Violation(what)

    def _wrong(self, event: str, args: tuple[Any, ...]) -> str:
        if event.startswith(FORBIDDEN):
            return "" if _imports() or (event == "exec" and _makes_a_class()) else f"{event} {args!r}"[:300]
        if event == "open":
            path, mode, flags = args
            writes = isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND)
            return f"open {path!r} {mode}" if writes and not self._inside(path) else ""
        outside = [args[k] for k, fd in WRITING.get(event, ()) if not self._inside(args[k], -1 if fd is None else args[fd])]
        return f"{event} {outside[0]!r}" if outside else ""

    def _inside(self, path: Any, folder: int | None = -1) -> bool:
        if isinstance(path, int):
            return True  # a descriptor: opening it was looked at
        at = os.getcwd() if folder in (-1, None) else f"/proc/self/fd/{folder}"
        return os.path.realpath(os.path.join(at, os.fsdecode(path))).startswith((self.folder, "/dev/null"))


def _callers() -> Iterator[str]:
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        yield str(frame.f_globals.get("__name__", ""))
        frame = frame.f_back


def _imports() -> bool:
    """Is a module of an installed package being imported for the first time?"""
    return any(name.startswith("importlib._bootstrap") for name in _callers())


def _makes_a_class() -> bool:
    """The standard library makes dataclasses and named tuples by exec."""
    return any(name in ("dataclasses", "collections") for name in list(_callers())[:5])


def work(corpus_folder: Path, seed: int, first: int, last: int) -> None:
    """Do the runs first..last - 1, one line of text on stdout before and after each."""
    import fuzz_mutate

    report = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # nothing that native code prints gets between the lines
    corpus = {path.name: path.read_bytes() for path in sorted(corpus_folder.iterdir())}
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TMPDIR"] = tempfile.tempdir = folder
        guard = Guard(os.path.realpath(folder))
        sys.addaudithook(guard)
        for name, data in corpus.items():  # loads every module that will be needed
            outcome = attempt(Path(folder), name, data, guard, deep=True, armed=False)
            if outcome[0] == "FAIL":
                raise SystemExit(f"the unchanged {name} fails: {outcome[1]}")
        limit = _virtual_bytes() + MEMORY_BYTES
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        for number in range(first, last):
            rng, name = draw(seed, number, corpus)
            print("start", number, file=report)
            data = fuzz_mutate.mutate(rng, name, corpus)
            outcome = attempt(Path(folder), name, data, guard, deep=rng.randrange(DEEP) == 0)
            print("done", number, *outcome, file=report)


def draw(seed: int, number: int, corpus: dict[str, bytes]) -> tuple[random.Random, str]:
    """The generator of a run, and the file it starts from: half of the time one of the fast, small ones."""
    rng = random.Random(f"{seed}:{number}")
    names = sorted(corpus)
    small = [name for name in names if len(corpus[name]) < 100_000]
    return rng, rng.choice(small if rng.random() < 0.5 else names)


def attempt(folder: Path, name: str, data: bytes, guard: Guard, *, deep: bool, armed: bool = True) -> tuple[str, str]:
    """(kind of outcome, one line): "opened", the name of a GkpError, or FAIL."""
    from gkp.errors import GkpError

    path = folder / name
    path.write_bytes(data)
    guard.seen.clear()
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
    signal.signal(signal.SIGPROF, _too_long)
    signal.setitimer(signal.ITIMER_PROF, SECONDS if armed else 0)
    guard.armed = armed
    try:
        open_like_gkp(path, deep)
        kind, text = "opened", ""
    except GkpError as e:
        kind, text = type(e).__name__, ""
        if "\n" in e.message or not e.message.isprintable() or len(e.message) > 2000:
            kind, text = "FAIL", f"the message is not one plain line: {e.message[:200]!r}"
    except BaseException as e:
        where = traceback.extract_tb(e.__traceback__)[-1]
        kind, text = "FAIL", f"{type(e).__name__}: {e} ({Path(where.filename).name}:{where.lineno})"
    finally:
        guard.armed = False
        signal.setitimer(signal.ITIMER_PROF, 0)
    if guard.seen:
        kind, text = "FAIL", guard.seen[0]
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) << 10
    if armed and grown > MEMORY_BYTES // 2:
        kind, text = "FAIL", f"took {grown >> 20} MiB"
    for left in folder.iterdir():
        with contextlib.suppress(OSError):
            left.unlink()
    return kind, f"{time.monotonic() - start:.2f}s {' '.join(text.split())}"[:400].encode("ascii", "replace").decode()


def _too_long(signum: int, frame: FrameType | None) -> None:
    raise Violation(f"still running after {SECONDS:g} s")


def open_like_gkp(path: Path, deep: bool) -> None:
    """Read the file as gkp would. TorchScript that passes the check is loaded and run."""
    from gkp import manifest
    from gkp.converter.graph import Graph
    from gkp.converter.recognise import recognise, simplify
    from gkp.converter.sources import SOURCES, OpenOptions, SourceFile, _torchfile, open_model
    from gkp.converter.sources.script.check import check_torchscript
    from gkp.pruning.models.group_config import read_group_config

    if path.name == "manifest.json":
        manifest.read(path.parent)
        return
    if path.suffix == ".json":
        read_group_config(path)
        return
    if path.suffix == ".npy":
        _torchfile.read_object_npy(path)
        return
    file = SourceFile(path)
    if file.kind == "torchscript":
        check_torchscript(path, file.budget)
        _load_and_run(path)
    elif deep or file.kind == "onnx":
        opened = open_model(path, OpenOptions())
        simplify(recognise(Graph(opened.model, opened.budget))).to_model()
    else:
        for source in SOURCES:
            if source.matches(file):
                break
        if file.kind in _torchfile.CHECKPOINTS:
            _ = file.payload


def _load_and_run(path: Path) -> None:
    """What gkp does with TorchScript before it exports it, on two sizes of input. Torch's own refusals are no failures."""
    import torch

    with contextlib.suppress(RuntimeError, ValueError, IndexError, OverflowError, NotImplementedError, TypeError):
        module = torch.jit.load(str(path), map_location="cpu").eval()
        for shape in ((1, 4, 8, 8), (1, 3, 32, 32)):
            with torch.no_grad(), contextlib.suppress(RuntimeError, ValueError, IndexError, OverflowError,
                                                      NotImplementedError, TypeError):
                module(torch.ones(shape))


def _virtual_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


# ---- parent ----------------------------------------------------------------------------------------------------------
@dataclass
class Fuzz:
    """All runs of one seed, shared out to workers in chunks."""

    corpus_folder: Path
    seed: int
    keep: Path | None
    counts: Counter[str] = field(default_factory=Counter)
    failures: list[tuple[int, str]] = field(default_factory=list)

    def run(self, first: int, runs: int, workers: int) -> None:
        waiting = [(a, min(a + CHUNK, first + runs)) for a in range(first, first + runs, CHUNK)][::-1]
        active: dict[int, Worker] = {}
        shown = time.monotonic()
        while waiting or active:
            while waiting and len(active) < workers:
                worker = Worker.start(self.corpus_folder, self.seed, *waiting.pop())
                active[worker.stdout] = worker
            ready, _, _ = select.select(list(active), [], [], 1.0)
            for stdout, worker in list(active.items()):
                if stdout in ready and (lines := worker.lines()) is not None:
                    for line in lines:
                        self._take(worker, line)
                elif stdout in ready or worker.hangs():
                    del active[stdout]
                    waiting += self._ended(worker, hanging=stdout not in ready)
            if time.monotonic() - shown > 5:
                shown = time.monotonic()
                print(f"{sum(self.counts.values())} of {runs} runs, {len(self.failures)} failures", flush=True)

    def _take(self, worker: Worker, line: str) -> None:
        word, number, *rest = line.split(" ", 2)
        if word == "start":
            worker.current = int(number)
            return
        worker.current, worker.next = None, int(number) + 1
        kind, _, text = rest[0].partition(" ")
        self.counts[kind] += 1
        if kind == "FAIL":
            self._fail(int(number), text)

    def _ended(self, worker: Worker, hanging: bool) -> list[tuple[int, int]]:
        """What is left of the worker's chunk. One that died in a run failed in it, one that died by itself between two runs
        in the one before. That a worker is slow to end once its runs are done says nothing about them."""
        code, tail = worker.end(0.0 if hanging else END_SECONDS)
        if worker.current is None and worker.next == worker.last and code in (0, None):
            return []
        failed = worker.current if worker.current is not None else worker.next - 1
        if failed < worker.first:
            raise SystemExit(f"a worker ended with {code} before its first run:\n{tail}")
        if worker.current is not None:
            self.counts["FAIL"] += 1
        how = "the process hung" if code is None else f"the process ended with {code}"
        self._fail(failed, f"{how}: {' '.join(tail.split())[-300:]}")
        return [(failed + 1, worker.last)] if failed + 1 < worker.last else []

    def _fail(self, number: int, text: str) -> None:
        import fuzz_mutate

        corpus = {path.name: path.read_bytes() for path in sorted(self.corpus_folder.iterdir())}
        rng, name = draw(self.seed, number, corpus)
        self.failures.append((number, f"{name}: {text}"))
        print(f"FAIL run {number} ({name}): {text}", flush=True)
        if self.keep is not None:
            self.keep.mkdir(parents=True, exist_ok=True)
            (self.keep / f"{self.seed}-{number}-{name}").write_bytes(fuzz_mutate.mutate(rng, name, corpus))


@dataclass
class Worker:
    """A process on its way from run `next` to run `last`; `current` is the one it is in."""

    process: subprocess.Popen[bytes]
    errors: Any
    first: int
    next: int
    last: int
    current: int | None = None
    buffer: bytes = b""
    heard: float = 0.0  # seconds of its processor time at its last word
    seen: float = 0.0  # and when it was looked at
    awake: float = field(default_factory=time.monotonic)  # when it last had something to do

    @classmethod
    def start(cls, corpus_folder: Path, seed: int, first: int, last: int) -> Worker:
        errors = tempfile.TemporaryFile()  # noqa: SIM115 (closed in end)
        command = [sys.executable, __file__, "--seed", str(seed), "--first", str(first), "--runs", str(last - first),
                   "--corpus", str(corpus_folder)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, stdin=subprocess.DEVNULL,
                                   env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "0"})
        return cls(process, errors, first, first, last)

    @property
    def stdout(self) -> int:
        assert self.process.stdout is not None
        return self.process.stdout.fileno()

    def lines(self) -> list[str] | None:
        """What it has said since; None when it has closed its end."""
        data = os.read(self.stdout, 1 << 16)
        if not data:
            return None
        self.heard, self.awake = self._activity()[0], time.monotonic()
        *whole, self.buffer = (self.buffer + data).split(b"\n")
        return [line.decode("ascii", "replace") for line in whole]

    def hangs(self) -> bool:
        """Has it computed, or slept, for too long since its last word? To be asked about once a second."""
        seconds, waits = self._activity()
        if waits or seconds - self.seen > 0.05:
            self.awake = time.monotonic()
        self.seen = seconds
        return seconds - self.heard > HANG_SECONDS or time.monotonic() - self.awake > HANG_SECONDS

    def _activity(self) -> tuple[float, bool]:
        """(seconds of processor time so far, does a thread of it run or wait for the processor or a disk?)"""
        about = Path(f"/proc/{self.process.pid}")
        try:
            whole, *threads = (path.read_text().rpartition(")")[2].split()
                               for path in (about / "stat", *about.glob("task/*/stat")))
        except OSError:  # a thread has just ended
            return self.seen, True
        return (int(whole[11]) + int(whole[12])) / os.sysconf("SC_CLK_TCK"), any(thread[0] in "RD" for thread in threads)

    def end(self, patience: float) -> tuple[int | None, str]:
        """(exit status, the end of what it printed). One that has not ended after so many seconds is killed: None."""
        code: int | None
        try:
            code = self.process.wait(timeout=patience)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            code = None
        if self.process.stdout is not None:
            self.process.stdout.close()
        self.errors.seek(0)
        tail = self.errors.read()[-2000:].decode("utf-8", "replace")
        self.errors.close()
        return code, tail


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="number of the first run")
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--keep", type=Path, metavar="DIR", help="save files that failed")
    parser.add_argument("--corpus", type=Path, help=argparse.SUPPRESS)  # given to workers
    options = parser.parse_args()
    if options.corpus is not None:
        work(options.corpus, options.seed, options.first, options.first + options.runs)
        return 0
    if os.environ.get("PYTHONHASHSEED") != "0":  # it decides the order of what PyTorch writes: the corpus, and so every run
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, "PYTHONHASHSEED": "0"})
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        import fuzz_corpus

        names = fuzz_corpus.write(Path(folder))
        print(f"{options.runs} runs with seed {options.seed} from {len(names)} files: {', '.join(names)}", flush=True)
        fuzz = Fuzz(Path(folder), options.seed, options.keep)
        fuzz.run(options.first, options.runs, options.workers)
    shown = ", ".join(f"{kind} {count}" for kind, count in fuzz.counts.most_common())
    print(f"{sum(fuzz.counts.values())} runs in {time.monotonic() - start:.0f} s: {shown}")
    return 1 if fuzz.failures else 0


if __name__ == "__main__":
    sys.exit(main())
