"""The clock of a side: which images it counts, and from which batch to which it runs."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace

import pytest


class FakeSide:
    """A loader in simulated time: a batch takes a second to make, its thread is at most three ahead of the consumer, who takes what
    is there at once.

    runs_on: the thread makes the next epoch's batches in the pause and over the seam; else each epoch takes it `start` s to begin.
    taken: ((epoch, batch), when), both from 1. Batch n of epoch e holds 100 e + n images.
    """

    def __init__(self, batches: int, runs_on: bool, start: float = 5.0) -> None:
        self.batches, self.runs_on, self.start = batches, runs_on, start
        self.now, self.epochs = 0.0, 0
        self.ready = [-1.0] * 3 if runs_on else []  # when the batches that are made ahead were there: before the question
        self.taken: list[tuple[tuple[int, int], float]] = []
        self.extra = {"wait": 0.0}

    def __call__(self) -> Iterator[int]:
        self.epochs += 1
        epoch, last = self.epochs, self.now if self.runs_on else self.now + self.start
        for batch in range(1, self.batches + 1):
            if self.ready:
                self.ready.pop()
            else:
                arrives = max(self.now, last) + 1
                self.extra["wait"] += arrives - self.now
                self.now = last = arrives
            self.taken.append(((epoch, batch), self.now))
            yield 100 * epoch + batch


@pytest.mark.parametrize("runs_on", [True, False])
@pytest.mark.parametrize("batches", [20, 3])
def test_the_clock_runs_over_exactly_one_epoch_from_a_seam_to_the_next(monkeypatch, batches, runs_on):
    import side_process

    side = FakeSide(batches, runs_on)
    monkeypatch.setattr(side_process, "time", SimpleNamespace(perf_counter=lambda: side.now))
    monkeypatch.setattr(side_process, "cpu_seconds", lambda: 10 * side.now)
    found = side_process.measure_epoch(side, "cpu")
    assert [batch for batch, _ in side.taken] == [(e, b) for e in (1, 2) for b in range(1, batches + 1)]
    assert found["images"] == sum(200 + batch for batch in range(1, batches + 1))
    when = dict(side.taken)
    assert found["wall"] == when[2, batches] - when[1, batches]
    # Nothing that was made in the pause is in it, and all that an epoch takes is.
    assert found["wall"] == batches + (0 if runs_on else side.start)
    assert found["cpu"] == 10 * found["wall"]
    assert found["wait"] == found["wall"]  # this consumer does nothing else
    assert found["interval"] == 1
