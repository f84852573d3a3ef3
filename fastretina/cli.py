"""The program `fastretina`, and what all commands share: flags from a dataclass, one-line errors, exit codes, orderly signals."""

from __future__ import annotations

import argparse
import atexit
import gc
import inspect
import signal
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from types import FrameType
from typing import NoReturn, TypeVar

import tyro

from fastretina.errors import EXIT_SIGINT, FastretinaError, Terminated
from fastretina.version import __version__

Config = TypeVar("Config")

COMMANDS = {  # modules of this package, each with a `run_command`
    "pack": "pack photographs and their grades into a .beton file",
    "verify": "check every sample of a .beton file",
    "train": "train a network to grade photographs, and report",
    "evaluate": "grade a .beton file with a trained network and compare with its grades",
    "predict": "grade photographs with a trained network",
    "compare": "train architectures and initial weights side by side",
}


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """The console script `fastretina COMMAND ...`; exits with 2 where there is no such command."""
    words = sys.argv[1:] if argv is None else list(argv)
    lines = "\n".join(f"  {name:<10}{title}" for name, title in COMMANDS.items())
    parser = argparse.ArgumentParser(
        "fastretina",
        usage="fastretina COMMAND ...   (fastretina COMMAND --help: its flags)",
        description=f"commands:\n{lines}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"fastretina {__version__}")
    parser.add_argument("command", choices=COMMANDS, help=argparse.SUPPRESS)
    command = parser.parse_args(words[:1]).command
    import_module(f"fastretina.{command}").run_command(words[1:], prog=f"fastretina {command}")
    raise AssertionError("run_command exits")


def _program() -> str:
    """What the user typed to get here: `python -m fastretina.train` or `python tools/write_beton.py`."""
    specification = getattr(sys.modules["__main__"], "__spec__", None)
    return f"python -m {specification.name.removesuffix('.__main__')}" if specification else f"python {sys.argv[0]}"


def _terminate(signum: int, frame: FrameType | None) -> NoReturn:
    raise Terminated(signum)


def run(
    config: type[Config],
    main: Callable[[Config], int | None],
    argv: Sequence[str] | None = None,
    prog: str | None = None,
    flags_from: Callable[[Path], list[str]] | None = None,
) -> NoReturn:
    """Parse the command line into `config` (unknown flags: exit 2), call `main(config)` and exit.

    prog: how messages call the program; None: as it was called. flags_from: reads the file of `--config` into flags, which those
    of the command line override.

    Exit codes: what `main` returns (None is 0); a FastretinaError's own (1, or 2 for UsageError) after one line on
    standard error; 130 on SIGINT; 143 on SIGTERM, 129 on SIGHUP, 152 on SIGXCPU.
    """
    signal.signal(signal.SIGTERM, _terminate)
    # A closed terminal and a batch system's limit of CPU time; where nohup has one ignored it stays so.
    for number in (signal.SIGHUP, signal.SIGXCPU):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _terminate)
    # As it exits Python looks for garbage among all that torch, numba and matplotlib hold: 5.3 s on a busy machine, and 0.8 s so.
    atexit.register(gc.freeze)
    words = sys.argv[1:] if argv is None else list(argv)
    try:
        if flags_from is not None:
            file = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
            file.add_argument("--config", type=Path)
            if (given := file.parse_known_args(words)[0].config) is not None:
                words = [*flags_from(given), *words]
        description = inspect.getdoc(main) or inspect.getdoc(config)
        code = main(tyro.cli(config, description=description, args=words, prog=prog or _program()))
    except FastretinaError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(EXIT_SIGINT)
    sys.exit(code or 0)
