"""Which batch comes next: epochs by name, breaks, and a resume at any of them."""

from __future__ import annotations

import numpy as np
import pytest
from loader_cases import kwargs, same, write

from fastretina.errors import LoaderError, UsageError
from fastretina.loading.augment import Augment
from fastretina.loading.batches import Batch
from fastretina.loading.loader import Loader
from fastretina.loading.pipeline import Pipeline


@pytest.mark.parametrize("point", range(20))
def test_a_resume_goes_on_with_the_very_next_batch(path, point):
    done = int(np.random.default_rng(point).integers(0, 25))
    with Loader(path, **kwargs(augment=Augment.full())) as loader:
        batches, state = [], loader.state_dict()
        for _ in range(3):
            for batch in loader:
                batches.append(batch)
                if len(batches) == done:
                    state = loader.state_dict()
    with Loader(path, **kwargs(augment=Augment.full(), workers=1 + point % 4)) as loader:
        loader.load_state_dict(state)
        resumed: list[Batch] = []
        while loader.epoch < 3:
            resumed += list(loader)
    assert len(resumed) == len(batches) - done
    assert all(same(a, b) for a, b in zip(resumed, batches[done:], strict=True))


@pytest.mark.parametrize("world_size", [1, 3])
def test_an_epoch_that_is_named_begins_at_its_beginning_on_every_rank(path, world_size):
    for rank in range(world_size):
        with Loader(path, **kwargs(rank=rank, world_size=world_size)) as plain:
            epochs = [list(plain) for _ in range(4)]

        def as_in(number: int, found: list[Batch], epochs: list[list[Batch]] = epochs) -> bool:
            return len(found) == len(epochs[number]) and all(same(a, b) for a, b in zip(found, epochs[number], strict=True))

        with Loader(path, **kwargs(rank=rank, world_size=world_size)) as loader:
            for number in (0, 1, 3, 3, 0):
                loader.set_epoch(number)
                assert loader.epoch == number
                assert as_in(number, list(loader))
            for _, _ in zip(range(4), loader, strict=False):
                pass
            loader.set_epoch(1)  # the one that was left in the middle
            assert as_in(1, list(loader))
            assert as_in(2, list(loader))


def test_a_loop_that_names_its_epochs_starts_no_work_anew(path, monkeypatch):
    begun = []
    real = Pipeline.start
    monkeypatch.setattr(Pipeline, "start", lambda self, jobs: begun.append(jobs) or real(self, jobs))
    with Loader(path, **kwargs()) as loader:
        for number in range(3):
            loader.set_epoch(number)
            assert len(list(loader)) == 10
    assert len(begun) == 1


@pytest.mark.parametrize("world_size", [1, 3])
@pytest.mark.parametrize("done", [0, 4, 10, 13])
def test_a_resumed_loop_that_names_its_epochs_goes_on_with_the_very_next_batch(path, world_size, done):
    for rank in range(world_size):
        settings = kwargs(rank=rank, world_size=world_size)
        with Loader(path, **settings) as loader:
            batches, state = [], loader.state_dict()
            for number in (5, 6):
                loader.set_epoch(number)
                state = loader.state_dict() if len(batches) == done else state
                for batch in loader:
                    batches.append(batch)
                    state = loader.state_dict() if len(batches) == done else state
        with Loader(path, **settings) as loader:
            loader.set_epoch(9)  # forgotten when a state is loaded
            loader.load_state_dict(state)
            resumed = []
            for number in range(state["epoch"], 7):
                loader.set_epoch(number)
                resumed += list(loader)
            assert len(resumed) == len(batches) - done
            assert all(same(a, b) for a, b in zip(resumed, batches[done:], strict=True))
            loader.load_state_dict(state)
            loader.set_epoch(6 if state["epoch"] == 5 else 5)  # another one than the state's
            loader.set_epoch(6)
            assert all(same(a, b) for a, b in zip(list(loader), batches[10:], strict=True))


def test_an_epoch_before_the_first_is_refused(path):
    with Loader(path, **kwargs()) as loader, pytest.raises(UsageError, match="-1"):
        loader.set_epoch(-1)


@pytest.mark.parametrize("change", [{"seed": 6}, {"batch_size": 8}, {"drop_last": True}, {"sampling": "sqrt"}])
def test_a_resume_that_would_change_the_order_is_refused(path, change):
    with (
        Loader(path, **kwargs()) as one,
        Loader(path, **kwargs(**change)) as other,
        pytest.raises(LoaderError, match=next(iter(change))),
    ):
        other.load_state_dict(one.state_dict())


@pytest.mark.parametrize(
    "change",
    [{"batch": 10}, {"batch": -1}, {"batch": 10**9}, {"batch": 3.0}, {"batch": "3"}, {"batch": None}, {"epoch": -1}, {"epoch": 1.5},
     {"epoch": "0"}],
    ids=str,
)  # fmt: skip
def test_a_state_that_names_no_batch_is_refused(path, change):
    with Loader(path, **kwargs()) as loader:
        with pytest.raises(LoaderError, match=r"cannot resume: epoch .*, batch .* in the state; epochs count from 0, and have 10"):
            loader.load_state_dict(loader.state_dict() | change)
        assert len(list(loader)) == 10


def test_an_epoch_of_no_batch_ends(tmp_path):
    with Loader(write(tmp_path / "few.beton", 3), **kwargs(drop_last=True)) as loader:
        loader.load_state_dict(loader.state_dict())
        assert [list(loader), list(loader)] == [[], []]


def test_a_state_of_an_older_version_is_taken_with_a_warning(path):
    with Loader(path, **kwargs()) as loader:
        state = loader.state_dict() | {"batch": 7}
        del state["data"]
        with pytest.warns(UserWarning, match="the state is of an older fastretina: whether it is of these data is unknown"):
            loader.load_state_dict(state)
        assert len(list(loader)) == 3


def test_a_break_goes_on_with_the_next_epoch(path):
    with Loader(path, **kwargs()) as loader:
        for _ in loader:
            break
        assert loader.epoch == 1
        second = list(loader)
    with Loader(path, **kwargs()) as loader:
        list(loader)
        assert all(same(a, b) for a, b in zip(second, loader, strict=True))


def test_an_older_iteration_cannot_go_on_beside_a_newer_one(path):
    with Loader(path, **kwargs()) as loader:
        older = iter(loader)
        next(older)
        next(iter(loader))
        with pytest.raises(LoaderError, match="later iteration"):
            next(older)


@pytest.mark.parametrize("turn", [lambda loader: loader.set_epoch(0), lambda loader: loader.load_state_dict(loader.state_dict())])
def test_an_iteration_cannot_go_on_when_the_loader_was_set_elsewhere(path, turn):
    with Loader(path, **kwargs()) as loader:
        iterator = iter(loader)
        next(iterator)
        turn(loader)
        with pytest.raises(LoaderError, match="set to another epoch"):
            next(iterator)
