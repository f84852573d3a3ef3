"""Faults are tried a few times in `make test` and many times in `make test-faults`; how often is printed at the end."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import pytest

Tried = Callable[..., None]
_TRIED: Counter[str] = Counter()
_FAULT = "fault"


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test marked `tries(quick, full)` gets both numbers, one after the other, as `tries`; the second is slow."""
    mark = metafunc.definition.get_closest_marker("tries")
    if mark is not None:
        quick, full = mark.args
        metafunc.parametrize(
            "tries", [pytest.param(quick, id="quick"), pytest.param(full, id="full", marks=pytest.mark.slow_faults)]
        )


@pytest.fixture
def tried(record_property: Callable[[str, object], None]) -> Tried:
    """Call it with a fault's name, and a number, once the fault has been met as promised."""

    def add(fault: str, count: int = 1) -> None:
        record_property(_FAULT, (fault, count))  # with the test's report it reaches the process that prints the summary

    return add


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Count what a test has tried, on whichever process it ran."""
    if report.when == "teardown":
        for name, value in report.user_properties:
            if name == _FAULT:
                fault, count = value  # type: ignore[misc]
                _TRIED[fault] += count


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """One line for each kind of fault."""
    if _TRIED:
        terminalreporter.section("faults tried, all met as promised")
        for fault, count in sorted(_TRIED.items()):
            terminalreporter.write_line(f"{count:>7,}  {fault}")
