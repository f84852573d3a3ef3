"""The thread pipeline: order, bounds, errors, and that nothing is left behind."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator

import pytest
from loader_cases import settled, threads

from fastretina.errors import LoaderError
from fastretina.loading.pipeline import Pipeline

TIMEOUT = 30  # seconds; only reached when something hangs


class Squares:
    """A job that squares its numbers; row `fails` raises."""

    def __init__(self, start: int, rows: int = 8, fails: int | None = None) -> None:
        self.pieces, self.start, self.fails = rows, start, fails
        self.out = [0] * rows

    def run(self, row: int) -> None:
        if row == self.fails:
            raise ValueError(f"row {row} of job {self.start}")
        self.out[row] = (self.start + row) ** 2


def within_time(function):
    """Run on a thread of its own, so that a hang is a failure and not a stuck test run."""
    box: list = []

    def call() -> None:
        try:
            box.append((function(), None))
        except BaseException as error:
            box.append((None, error))

    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    thread.join(TIMEOUT)
    assert box, "still waiting"
    value, error = box[0]
    if error:
        raise error
    return value


def drain(pipeline: Pipeline) -> list[int]:
    out: list[int] = []
    while (job := pipeline.get()) is not None:
        assert isinstance(job, Squares)
        out += job.out
    return out


@pytest.fixture(params=[1, 2, 5])
def pipeline(request) -> Iterator[Pipeline]:
    pipeline = Pipeline(workers=request.param, ahead=3)
    yield pipeline
    within_time(pipeline.close)


def test_jobs_come_in_order_whatever_the_number_of_threads(pipeline):
    pipeline.start(Squares(8 * k) for k in range(200))
    assert within_time(lambda: drain(pipeline)) == [n * n for n in range(1600)]


def test_a_stream_can_end_and_another_begin(pipeline):
    for _ in range(20):
        pipeline.start(Squares(8 * k) for k in range(3))
        assert within_time(lambda: drain(pipeline)) == [n * n for n in range(24)]


def test_an_empty_stream_ends_at_once(pipeline):
    pipeline.start(iter(()))
    assert within_time(pipeline.get) is None


def test_no_more_jobs_are_begun_than_allowed(pipeline):
    begun = itertools.count()
    reached = threading.Event()

    def jobs() -> Iterator[Squares]:
        while True:
            if next(begun) >= 2:
                reached.set()
            yield Squares(0)

    pipeline.start(jobs())
    assert reached.wait(TIMEOUT)
    for _ in range(5):
        within_time(pipeline.get)
    threading.Event().wait(0.05)
    assert next(begun) <= 3 + 5


@pytest.mark.parametrize("number", range(20))
def test_an_error_takes_the_place_of_its_job(pipeline, number):
    pipeline.start(Squares(8 * k, fails=k % 8 if k == number else None) for k in range(40))
    for _ in range(number):
        within_time(pipeline.get)
    with pytest.raises(ValueError, match=f"row {number % 8} of job {8 * number}"):
        within_time(pipeline.get)
    assert within_time(pipeline.get) is None
    pipeline.start(Squares(8 * k) for k in range(3))
    assert within_time(lambda: drain(pipeline)) == [n * n for n in range(24)]


def test_an_error_in_making_a_job_reaches_the_consumer(pipeline):
    def jobs() -> Iterator[Squares]:
        yield Squares(0)
        raise OSError("no order today")

    pipeline.start(jobs())
    within_time(pipeline.get)
    with pytest.raises(OSError, match="no order today"):
        within_time(pipeline.get)


def test_a_new_stream_replaces_one_that_was_left_in_the_middle(pipeline):
    for start in range(0, 500, 5):
        pipeline.start(Squares(8 * (start + k)) for k in range(50))
        job = within_time(pipeline.get)
        assert job.out == [n * n for n in range(8 * start, 8 * start + 8)]


def test_close_ends_the_threads_and_wakes_a_waiting_consumer():
    before = threads()
    for _ in range(10):
        pipeline = Pipeline(workers=3, ahead=2)
        stuck = threading.Event()

        class Slow(Squares):
            def run(self, row: int, stuck: threading.Event = stuck) -> None:
                stuck.wait(TIMEOUT)

        pipeline.start(iter([Slow(0)]))
        waiting: list = []

        def consume(pipeline: Pipeline = pipeline, waiting: list = waiting) -> None:
            with pytest.raises(LoaderError) as caught:
                pipeline.get()
            waiting.append(caught)

        consumer = threading.Thread(target=consume)
        consumer.start()
        closer = threading.Thread(target=pipeline.close)
        closer.start()
        consumer.join(TIMEOUT)
        assert waiting, "the consumer still waits"
        stuck.set()
        closer.join(TIMEOUT)
    assert settled(before)


def test_a_closed_pipeline_says_so():
    pipeline = Pipeline(workers=1, ahead=1)
    pipeline.close()
    pipeline.close()
    with pytest.raises(LoaderError, match="closed"):
        pipeline.start(iter(()))
    with pytest.raises(LoaderError, match="closed"):
        pipeline.get()
