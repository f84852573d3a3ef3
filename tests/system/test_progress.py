"""Progress elsewhere than on a terminal: lines for who asks for them, silence for all others."""

from __future__ import annotations

import pytest

from fastretina.system.progress import progress_bar


def test_lines_are_printed_only_where_they_are_wanted_and_shown(capsys: pytest.CaptureFixture[str]) -> None:
    for shown, lines in ((True, False), (False, True)):
        with progress_bar("packing", 3, unit="image", shown=shown, lines=lines) as bar:
            bar.update(3)
        assert capsys.readouterr().err == ""
    with progress_bar("packing", 3000, unit="image", lines=True) as bar:
        bar.update()
        bar.update(1999)
    assert capsys.readouterr().err.startswith("packing: 2,000 of 3,000 images, ")


def test_an_error_prints_no_last_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(KeyboardInterrupt), progress_bar("packing", None, unit="image", lines=True):
        raise KeyboardInterrupt
    assert capsys.readouterr().err == ""
