"""Programs that start with what takes longest to import already there: each in a process of its own, forked from one that has
imported packages of others and nothing of gkp."""

from __future__ import annotations

import atexit
import contextlib
import gc
import json
import os
import re
import runpy
import select
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

PACKAGES = ("numpy", "scipy.optimize", "sklearn.cluster", "onnx", "onnx.reference", "onnx_graphsurgeon", "torch", "torch.onnx")
"""Those that start no thread when they are imported: a process with threads cannot be forked safely."""


def run(words: Sequence[str], folder: Path, environment: Mapping[str, str], timeout: float, first: str = ""
        ) -> subprocess.CompletedProcess[str]:
    """`words` in the folder, as subprocess.run does with captured output: `python -c CODE`, `python FILE`, or a script of
    Python's with its arguments. subprocess.TimeoutExpired after `timeout` seconds. What Python reads when it starts cannot be
    given to one that has: with other variables PYTHON... the program is started afresh. first: code that runs before the
    program, in its process, unless that is started afresh."""
    if _of_python(environment) != _of_python(os.environ):
        return subprocess.run(words, cwd=folder, env=dict(environment), timeout=timeout, capture_output=True, text=True,
                              check=False)
    with tempfile.TemporaryDirectory() as name:
        files = [str(Path(name) / n) for n in ("out", "err")]
        job = {"words": list(words), "folder": str(folder), "environment": dict(environment), "files": files, "timeout": timeout,
               "first": first}
        server = _server()
        assert server.stdin is not None
        assert server.stdout is not None
        server.stdin.write(json.dumps(job) + "\n")
        server.stdin.flush()
        code = json.loads(server.stdout.readline())
        out, err = (Path(file).read_bytes().decode("utf-8", "replace") for file in files)
    if code is None:
        raise subprocess.TimeoutExpired(list(words), timeout, out, err)
    return subprocess.CompletedProcess(list(words), code, out, err)


def _of_python(environment: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in environment.items() if name.startswith("PYTHON")}


@cache
def _server() -> subprocess.Popen[str]:
    """Of this process; it ends when its stdin does."""
    return subprocess.Popen([sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                            env={**os.environ, "OMP_NUM_THREADS": "1"})


# ---- in the process that forks --------------------------------------------------------------------------------------
def _serve() -> dict[str, Any] | None:
    """Answers jobs with exit codes. Returns in each child, with its job, and (None) at the end of stdin."""
    while line := sys.stdin.readline():
        job: dict[str, Any] = json.loads(line)
        child = os.fork()
        if child == 0:
            return job
        print(json.dumps(_wait(child, job["timeout"])), flush=True)
    return None


def _wait(child: int, timeout: float) -> int | None:
    """The child's exit code (negative: the signal that ended it), or None when it was killed after `timeout` seconds."""
    watched = os.pidfd_open(child)
    ended = bool(select.select([watched], [], [], timeout)[0])
    os.close(watched)
    with contextlib.suppress(ProcessLookupError):
        if not ended:
            os.killpg(child, signal.SIGKILL)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return status if ended else None


def _become(job: dict[str, Any]) -> None:
    """What a process is when the program starts."""
    os.setsid()
    os.chdir(job["folder"])
    os.environ.clear()
    os.environ.update(job["environment"])
    for number, (file, flags) in enumerate([(os.devnull, os.O_RDONLY), *((f, os.O_WRONLY | os.O_CREAT) for f in job["files"])]):
        opened = os.open(file, flags, 0o600)
        os.dup2(opened, number)
        os.close(opened)


def _end(code: object) -> None:
    """As Python ends with sys.exit(code), but for taking down the imported packages one by one, which takes longer than many
    a command."""
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    if isinstance(code, str):
        print(code, file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code if isinstance(code, int) else 1 if code else 0)


def _run(words: list[str]) -> None:
    """The program, as the module __main__."""
    if re.fullmatch(r"python[\d.]*", Path(words[0]).name):
        words = words[1:]
    if words[0] == "-c":
        sys.argv, sys.path[0] = ["-c", *words[2:]], ""
        exec(compile(words[1], "<string>", "exec"), {"__name__": "__main__", "__builtins__": __builtins__})  # noqa: S102 - as Python does
        return
    sys.argv, sys.path[0] = words, str(Path(words[0]).resolve().parent)
    runpy.run_path(words[0], run_name="__main__")


if __name__ == "__main__":
    for package in PACKAGES:
        __import__(package)
    gc.freeze()  # a collection in a child would write to all of its memory
    assert len(os.listdir("/proc/self/task")) == 1, "a package has started a thread"
    wanted = _serve()
    if wanted is not None:
        _become(wanted)
        try:
            exec(wanted["first"], {})  # noqa: S102 - of the tests
            _run(wanted["words"])
        except SystemExit as ended:
            _end(ended.code)
        except BaseException:
            sys.excepthook(*sys.exc_info())
            _end(1)
        _end(0)
