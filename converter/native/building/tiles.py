"""AMX's registers, called tiles: Linux gives them to a process that asks, for all its threads and whatever it forks.

Libraries ask for themselves (gkp_create); this is for kernels that run in the process of the conversion, to be timed.
"""

from __future__ import annotations

import ctypes
import errno
import os
from functools import cache

_ARCH_PRCTL = 158
"""Number of the system call on x86-64."""
_REQUEST, _TILE_DATA = 0x1023, 18
"""ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA."""
_WORDS = {errno.ENOSPC: "the signal stack of a thread is too small for them"}


@cache
def refusal() -> str | None:
    """Asks for the tiles: why the kernel denies them, or None. Only for x86-64 processors that have them."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.syscall(ctypes.c_long(_ARCH_PRCTL), ctypes.c_long(_REQUEST), ctypes.c_long(_TILE_DATA)) == 0:
        return None
    number = ctypes.get_errno()
    return _WORDS.get(number, os.strerror(number))
