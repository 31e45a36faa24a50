"""Where the programs `gkp` and `gkp-convert` start. Nothing is imported here before signals are dealt with."""

from __future__ import annotations

from collections.abc import Callable

from gkp import interrupt


def main() -> None:
    """`gkp`."""
    interrupt.end_at_once()
    from gkp import cli

    _run(cli.main)


def convert_main() -> None:
    """`gkp-convert`: `gkp convert` as a program of its own."""
    interrupt.end_at_once()
    from gkp import cli

    _run(cli.convert_main)


def _run(program: Callable[[], object]) -> None:
    code: object = 0
    try:
        program()
    except SystemExit as e:
        code = e.code
    interrupt.leave(code if isinstance(code, int) else 0 if code is None else 1)


if __name__ == "__main__":
    main()
