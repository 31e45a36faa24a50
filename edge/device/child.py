"""`python -m gkp.edge.device.child ARGUMENTS`: gkp with these arguments, as a child of a process that holds its stdin open.
When that process ends, in whatever way, stdin reaches its end and so does the child: a killed coordinator leaves no worker
behind."""

from __future__ import annotations

import os
import runpy
import signal
import threading


def _end_with_parent() -> None:
    while os.read(0, 4096):
        pass
    os.kill(os.getpid(), signal.SIGTERM)


def main() -> None:
    """See the module."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    runpy.run_module("gkp.entry", run_name="__main__", alter_sys=True)  # by name: nothing here imports what is above it


if __name__ == "__main__":
    main()
