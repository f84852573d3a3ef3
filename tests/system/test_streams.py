"""Standard output and error: what may be printed there, and what they may be."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fastretina.errors import printable
from fastretina.system.streams import Printed, coloured, standard_streams

MOVING = [
    "\x1b[2J",
    "\x07",
    "\r",
    "\b",
    "\x9b2J",
    "\x7f",
    "\u202e",
    "\u2066",
    "\u200b",
    "\ufeff",
    "\udc9b",
    "\ue000",
    "\u2028",
    "\0",
]


@pytest.mark.parametrize("letters", MOVING, ids=ascii)
def test_what_moves_a_cursor_or_reorders_text_is_shown_as_an_escape(letters: str) -> None:
    found = printable(f"a{letters}b")
    assert found.isascii()
    assert found.isprintable()
    assert found == f"a{letters[0].encode('unicode_escape').decode()}{letters[1:]}b"
    stream = io.StringIO()
    print(f"a{letters}b\n\tc", file=Printed(stream))
    assert stream.getvalue() == f"{found}\n\tc\n"


@pytest.mark.parametrize("name", ["10_left", "Müller é", "图像 1", "a\xa0b", "あ\u3000い", "שלום", "\\x1b", "👁"])
def test_a_name_that_can_be_read_stays_as_it_is(name: str) -> None:
    assert printable(name) == name


def test_a_message_of_a_name_with_line_ends_is_one_line() -> None:
    assert printable("a\nerror: b\tc") == "a\\nerror: b\\tc"
    assert printable("a\tb\n", keep="\t") == "a\tb\\n"


def test_colours_come_through_only_while_they_are_wanted() -> None:
    stream = io.StringIO()
    printed = Printed(stream)
    with coloured((printed, printed)):
        printed.write("\x1b[1;31mred\x1b[0m \x1b[2J")
    printed.write("\x1b[0m")
    assert stream.getvalue() == "\x1b[1;31mred\x1b[0m \\x1b[2J\\x1b[0m"


def test_letters_that_an_encoding_lacks_are_escapes() -> None:
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    Printed(stream).write("é – \udcff")
    stream.flush()
    assert stream.buffer.getvalue() == b"\\xe9 \\u2013 \\udcff"


def test_output_that_cannot_be_written_is_an_error_that_says_so_once() -> None:
    with Path("/dev/full").open("w") as full:
        printed = Printed(full, "standard output")
        printed.write("a")
        with pytest.raises(OSError, match="No space left on device: 'standard output'"):
            printed.flush()
        printed.write("b")  # to nobody from now on
        printed.flush()


def test_messages_that_cannot_be_written_stop_nothing() -> None:
    end, other = os.pipe()
    os.close(end)
    with os.fdopen(other, "w") as broken:
        printed = Printed(broken)
        printed.write("a" * 100_000)
        printed.flush()
        assert printed.fileno() == other


CLOSED = """
import os, sys
from fastretina.system.streams import standard_streams
found = sys.stdout, sys.stderr
with standard_streams():
    print("out")
    print("error", file=sys.stderr)
    sys.stdout.flush()
    free = os.open(sys.argv[1], os.O_WRONLY | os.O_CREAT)
    child = os.spawnv(os.P_WAIT, sys.executable, [sys.executable, "-c", "import os; [os.fstat(n) for n in range(3)]"])
    os.write(free, f"{free > 2} {found.count(None)} {child}".encode())
"""


@pytest.mark.parametrize("closed", [(0,), (1,), (2,), (0, 2), (0, 1, 2)], ids=str)
def test_closed_streams_lead_nowhere_and_no_file_gets_their_numbers(closed: tuple[int, ...], tmp_path: Path) -> None:
    def close() -> None:
        for descriptor in closed:
            os.close(descriptor)

    line = [sys.executable, "-c", CLOSED, str(tmp_path / "file")]
    assert subprocess.run(line, preexec_fn=close, stdout=subprocess.PIPE, timeout=60, check=False).returncode == 0
    assert (tmp_path / "file").read_text() == f"True {len({1, 2} & set(closed))} 0"


def test_afterwards_the_streams_are_what_they_were() -> None:
    before = sys.stdout, sys.stderr
    with standard_streams():
        assert sys.stdout is not before[0]
    assert (sys.stdout, sys.stderr) == before
