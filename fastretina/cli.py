"""What all commands share: flags from a frozen dataclass, one-line errors, exit codes, orderly signals."""

from __future__ import annotations

import atexit
import gc
import inspect
import signal
import sys
from collections.abc import Callable, Sequence
from types import FrameType
from typing import NoReturn, TypeVar

import tyro

from fastretina.errors import EXIT_SIGINT, FastretinaError, Terminated

Config = TypeVar("Config")


def _program() -> str:
    """What the user typed to get here: `python -m fastretina.train` or `python tools/write_beton.py`."""
    specification = getattr(sys.modules["__main__"], "__spec__", None)
    return f"python -m {specification.name}" if specification else f"python {sys.argv[0]}"


def _terminate(signum: int, frame: FrameType | None) -> NoReturn:
    raise Terminated


def run(config: type[Config], main: Callable[[Config], int | None], argv: Sequence[str] | None = None) -> NoReturn:
    """Parse the command line into `config` (unknown flags: exit 2), call `main(config)` and exit.

    Exit codes: what `main` returns (None is 0); a FastretinaError's own (1, or 2 for UsageError) after one line on
    standard error; 130 on SIGINT; 143 on SIGTERM.
    """
    signal.signal(signal.SIGTERM, _terminate)
    # As it exits Python looks for garbage among all that torch, numba and matplotlib hold: 5.3 s on a busy machine, and 0.8 s so.
    atexit.register(gc.freeze)
    parsed = tyro.cli(config, description=inspect.getdoc(main) or config.__doc__, args=argv, prog=_program())
    try:
        code = main(parsed)
    except FastretinaError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(EXIT_SIGINT)
    sys.exit(code or 0)
