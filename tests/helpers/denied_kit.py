"""Processes that the kernel denies AMX, as a sandbox would."""

from __future__ import annotations

import ctypes
import os
import struct
import subprocess
import sys
from pathlib import Path

_ARCH_PRCTL, _REQUEST, _EPERM = 158, 0x1023, 1
_NO_NEW_PRIVILEGES, _SECCOMP, _FILTER = 38, 22, 2
_LOAD, _UNLESS, _ANSWER = 0x20, 0x15, 0x06
"""Instructions of the filter: BPF_LD | BPF_W | BPF_ABS, BPF_JMP | BPF_JEQ | BPF_K, BPF_RET | BPF_K."""
_ERROR, _ALLOW = 0x50000, 0x7fff0000


def deny_tiles() -> None:
    """From now on arch_prctl(ARCH_REQ_XCOMP_PERM, ...) fails in this process and in what it starts."""
    rows = [(_LOAD, 0, 0, 0), (_UNLESS, 0, 3, _ARCH_PRCTL),  # the system call's number
            (_LOAD, 0, 0, 16), (_UNLESS, 0, 1, _REQUEST),  # its first argument
            (_ANSWER, 0, 0, _ERROR | _EPERM), (_ANSWER, 0, 0, _ALLOW)]
    code = ctypes.create_string_buffer(b"".join(struct.pack("<HBBI", *row) for row in rows))
    program = ctypes.create_string_buffer(struct.pack("<HxxxxxxQ", len(rows), ctypes.addressof(code)))
    _prctl(_NO_NEW_PRIVILEGES, 1, 0)
    _prctl(_SECCOMP, _FILTER, ctypes.addressof(program))


def _prctl(what: int, *arguments: int) -> None:
    system = ctypes.CDLL(None, use_errno=True)
    if system.prctl(what, *map(ctypes.c_ulong, (*arguments, 0, 0))) != 0:
        raise OSError(ctypes.get_errno(), f"prctl({what})")


def denied(code: str) -> str:
    """What Python code prints in a process that is denied AMX."""
    places = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run([sys.executable, "-c", f"import denied_kit\ndenied_kit.deny_tiles()\n{code}"], capture_output=True,
                          text=True, check=False, env={**os.environ, "PYTHONPATH": places}, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout
