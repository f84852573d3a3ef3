"""The program `fastretina`: its commands, its exit codes, and a --help that waits for no library."""

from __future__ import annotations

import subprocess
import sys

import pytest

import fastretina
from fastretina import cli

HEAVY = ("cv2", "matplotlib", "numba", "scipy", "torch", "torchvision")
# Calls the program as its console script does, and says at the end which libraries that has imported.
SCRIPT = f"""
import sys
from fastretina.cli import main
try:
    main()
finally:
    print("imported:", sorted(set({HEAVY}) & sys.modules.keys()), file=sys.stderr)
"""


def call(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, timeout=60, check=False)


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_the_help_of_a_command_imports_no_torch_and_calls_it_as_the_user_did(command):
    done = call("-c", SCRIPT, command, "--help")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"usage: fastretina {command} ")
    assert done.stderr == "imported: []\n"


def test_a_module_that_is_called_says_so_in_its_usage():
    for module in ("fastretina.train", "fastretina.sample"):
        assert call("-m", module, "--help").stdout.startswith(f"usage: python -m {module} ")


def test_help_lists_every_command_with_a_line_of_its_own(capsys):
    with pytest.raises(SystemExit) as end:
        cli.main(["--help"])
    assert end.value.code == 0
    lines = capsys.readouterr().out.splitlines()
    for command, title in cli.COMMANDS.items():
        assert any(line.split() == [command, *title.split()] for line in lines)


def test_version(capsys):
    with pytest.raises(SystemExit) as end:
        cli.main(["--version"])
    assert end.value.code == 0
    assert capsys.readouterr().out == f"fastretina {fastretina.__version__}\n"


@pytest.mark.parametrize("words", [[], ["export-everything"], ["--unknown"], ["verify"], ["train", "--epoch-count", "3"]], ids=str)
def test_wrong_usage_exits_with_2(words, capsys):
    with pytest.raises(SystemExit) as end:
        cli.main(words)
    assert end.value.code == 2
    assert "fastretina" in capsys.readouterr().err


def test_an_error_is_one_line_and_its_exit_code(tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        cli.main(["verify", str(tmp_path / "absent.beton")])
    assert end.value.code == 1
    assert capsys.readouterr().err.startswith("error: ")
