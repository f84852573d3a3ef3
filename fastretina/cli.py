"""The program `fastretina`, and what all commands share: flags from a dataclass, one-line errors, exit codes, orderly signals."""

from __future__ import annotations

import argparse
import atexit
import gc
import inspect
import os
import shutil
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from types import FrameType
from typing import NoReturn, TypeVar

import tyro

from fastretina.errors import EXIT_SIGINT, FastretinaError, RunError, Terminated, UsageError, printable
from fastretina.system.streams import coloured, standard_streams
from fastretina.version import __version__

Config = TypeVar("Config")
LEAST_COLUMNS = 20  # tyro never comes to an end of its lines on a terminal of 5

COMMANDS = {  # modules of this package, each with a `run_command`
    "pack": "pack photographs and their grades into a .beton file",
    "verify": "check every sample of a .beton file",
    "train": "train a network to grade photographs, and report",
    "evaluate": "grade a .beton file with a trained network and compare with its grades",
    "predict": "grade photographs with a trained network",
    "export": "write a trained network to one ONNX or .pt2 file, checked against torch",
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
    flags_before: Callable[[Sequence[str]], list[str]] | None = None,
) -> NoReturn:
    """Parse the command line into `config` (unknown flags: exit 2), call `main(config)` and exit.

    prog: how messages call the program; None: as it was called. flags_before: makes of the words of the command line flags that are
    to stand before them, and that they override.

    Exit codes: what `main` returns (None is 0); a FastretinaError's own (1, or 2 for UsageError) after one line on
    standard error; 1 where the system refuses something (a line), or for a bug (its traceback); 130 on SIGINT; 143 on SIGTERM,
    129 on SIGHUP, 152 on SIGXCPU.
    """
    signal.signal(signal.SIGTERM, _terminate)
    # A closed terminal and a batch system's limit of CPU time; where nohup has one ignored it stays so.
    for number in (signal.SIGHUP, signal.SIGXCPU):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _terminate)
    # As it exits Python looks for garbage among all that torch, numba and matplotlib hold: 5.3 s on a busy machine, and 0.8 s so.
    atexit.register(gc.freeze)
    words = sys.argv[1:] if argv is None else list(argv)
    with standard_streams() as streams, _one_line_errors():
        if flags_before is not None:
            words = [*flags_before(words), *words]
        _check_current_folder()
        for word in words:
            if "\0" in word:  # out of a config.json; a command line cannot hold one
                raise UsageError(f"{word}: holds a NUL, which no path can")
        description = inspect.getdoc(main) or inspect.getdoc(config)
        columns = str(max(LEAST_COLUMNS, shutil.get_terminal_size().columns))
        with coloured(streams), _environment("COLUMNS", columns):
            settings = tyro.cli(config, description=description, args=words, prog=prog or _program())
        # The path is passed on to worker processes, but until they have it multiprocessing's look into the current folder.
        with _environment("PYTHONSAFEPATH", "1"):
            code = main(settings)
    sys.exit(code or 0)


@contextmanager
def _one_line_errors() -> Iterator[None]:
    """Whatever ends the block becomes a line on standard error and an exit code. What is a bug keeps its traceback."""
    try:
        try:
            yield
        finally:
            sys.stdout.flush()
    except FastretinaError as error:
        _exit(f"error: {error}", error.exit_code)
    except KeyboardInterrupt:
        _exit("interrupted", EXIT_SIGINT)
    except BrokenPipeError:
        sys.exit(FastretinaError.exit_code)  # whoever read has seen enough (`| head`)
    except OSError as error:
        place = "" if error.filename is None else f"{error.filename}: "
        _exit(f"error: {place}{error.strerror or error}", FastretinaError.exit_code)
    except (MemoryError, UnicodeError, RecursionError) as error:
        _exit(f"error: {error or 'not enough memory'}", FastretinaError.exit_code)
    except Exception:
        traceback.print_exc()
        sys.exit(FastretinaError.exit_code)


def _exit(message: str, code: int) -> NoReturn:
    print(printable(message), file=sys.stderr)
    sys.exit(code)


def _check_current_folder() -> None:
    try:
        Path.cwd()
    except OSError as error:  # MKL ends the process when it is loaded there
        raise RunError(f"the current folder has been removed ({error.strerror}); go to another") from None


@contextmanager
def _environment(name: str, value: str) -> Iterator[None]:
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        os.environ.pop(name)
        if before is not None:
            os.environ[name] = before
