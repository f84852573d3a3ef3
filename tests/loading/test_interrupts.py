"""Ctrl-C, or a signal's handler, at each place of the loader's own code where the interpreter lets one in."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path

import ahead_cases
import pytest
import torch
from interrupting import At, interrupt
from loader_cases import kwargs, same, settled, threads, write

from fastretina.errors import LoaderError
from fastretina.loading.augment import Augment
from fastretina.loading.batches import Batch
from fastretina.loading.loader import Loader

SETTINGS = kwargs(batch_size=8, resolution=16)


@pytest.fixture(scope="module")
def file(tmp_path_factory) -> Path:
    return write(tmp_path_factory.mktemp("interrupts") / "data.beton", 20, 16)


# Of a loader that decodes ahead, every seventh place in `make test`, and in `make test-faults` each.
AHEAD = ahead_cases.needs_no_gpu
KINDS = [
    pytest.param(("cpu", 1), id="cpu"),
    pytest.param(("ahead", 7), id="decodes ahead", marks=AHEAD),
    pytest.param(("ahead", 1), id="decodes ahead, all", marks=(AHEAD, pytest.mark.slow_faults)),
]


@pytest.fixture(scope="module", params=KINDS)
def kind(request) -> tuple[str, int]:
    return request.param


@pytest.fixture(scope="module")
def make(kind, file) -> Iterator[Callable[[], Loader]]:
    """A loader of three batches an epoch, of either kind."""
    with pytest.MonkeyPatch.context() as patch:
        ahead_cases.provide(patch)
        settings = SETTINGS | {"augment": Augment.none(), "dtype": torch.uint8}
        yield partial(Loader, file, **SETTINGS) if kind[0] == "cpu" else partial(ahead_cases.make, file, **settings)


@pytest.fixture
def places(kind) -> Iterator[int]:
    """Those to interrupt it at, from the first, without an end."""
    return itertools.count(1, kind[1])


@pytest.fixture(scope="module")
def epochs(make) -> list[list[Batch]]:
    with make() as loader:
        return [list(loader) for _ in range(3)]


def check(found: list[Batch], expected: list[Batch]) -> None:
    assert len(found) == len(expected)
    assert all(same(a, b) for a, b in zip(found, expected, strict=True))


def interrupted(loader: Iterable[Batch], place: int, action: Callable[[], None]) -> tuple[list[Batch], bool]:
    """What the consumer had of an epoch until it was interrupted, and whether it was."""
    had: list[Batch] = []
    with suppress(KeyboardInterrupt), At(place, action) as at:
        for batch in loader:
            had.append(batch)  # noqa: PERF402  # as far as it comes
    return had, at.came


@pytest.mark.parametrize("resume", ["state", "next"])
def test_after_an_interrupt_anywhere_comes_the_batch_that_the_consumer_has_not_had(make, epochs, places, resume):
    with make() as loader:
        for place in places:
            loader.set_epoch(0)
            batches = iter(loader) if resume == "next" else loader
            had, came = interrupted(batches, place, interrupt)
            state = loader.state_dict()
            assert (state["epoch"], state["batch"]) == ((0, len(had)) if len(had) < 3 else (1, 0))
            if not came:
                break
            if resume == "state":
                loader.load_state_dict(state)
                if len(had) < 3:
                    had += loader
            else:
                had += batches
            check(had, epochs[0])
        check(list(loader), epochs[1])
    assert place > 50


def test_an_iteration_after_an_interrupt_begins_an_epoch_as_after_a_break(make, epochs, places):
    with make() as loader:
        for place in places:
            loader.set_epoch(0)
            had, came = interrupted(loader, place, interrupt)
            if not came:
                break
            assert loader.epoch == (1 if had else 0)
            check(list(loader), epochs[1 if had else 0])


HANDLERS = {
    "close": lambda loader: loader.close(),
    "set_epoch": lambda loader: loader.set_epoch(1),
    "load_state_dict": lambda loader: loader.load_state_dict(loader.state_dict()),
    "iterate": lambda loader: next(iter(loader)),
}


@pytest.mark.parametrize("handler", HANDLERS)
def test_a_signal_handler_may_call_anything_in_the_midst_of_anything(file, make, epochs, places, handler):
    messages, before = set(), threads()
    for place in places:
        with make() as loader:
            try:
                had, came = interrupted(loader, place, lambda loader=loader: HANDLERS[handler](loader))
            except LoaderError as error:
                messages.add(str(error).removeprefix(f"{file}: "))
            else:  # it came before the iteration began, or after its last batch
                assert len(had) == 3
                check(had, epochs[0] if same(had[0], epochs[0][0]) else epochs[1])
                if not came:
                    break
            if handler != "close":
                loader.set_epoch(2)
                check(list(loader), epochs[2])
    elsewhere = {
        "the loader was set to another epoch, or a later iteration has begun; this one cannot go on",
        "the loader was set to other batches while it was waited for",
    }
    assert messages
    assert messages <= ({"the loader is closed"} if handler == "close" else elsewhere)
    assert settled(before)
