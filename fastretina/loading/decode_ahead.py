"""Decoding on the device one batch ahead of the consumer, in a thread of its own.

A device decoder keeps the host busy: nvImageCodec takes it 17 to 27 ms for 128 images of 512 px, of the 35 ms that a step of a
ResNet18 takes an H200, and the device has little to do meanwhile. In the consumer's thread that adds to the launches of forward and
backward, and the device runs dry.

The thread is a pipeline of one: all that a Loader promises of interrupts, signal handlers, forks, ended threads and close() it
promises for this one too. It alone takes jobs from the pipeline that checks them, and its own job is to decode one of those.
"""

from __future__ import annotations

from collections.abc import Iterator

from fastretina.loading.batches import Batch, DeviceJob
from fastretina.loading.device_stage import DeviceStage, Sourced
from fastretina.loading.pipeline import Job, Pipeline


class _Decoding:
    """A job whose images are decoded as its only piece."""

    pieces = 1
    sourced: Sourced

    def __init__(self, stage: DeviceStage, job: DeviceJob) -> None:
        self._stage, self._job = stage, job

    def run(self, piece: int) -> None:
        self.sourced = self._stage.source(self._job)


class _Checked(Iterator[_Decoding]):
    """Jobs as they come out of a pipeline, which is started with the first, in the thread that asks for it. No generator: to drop
    one in its midst is Python, which would swallow a KeyboardInterrupt."""

    def __init__(self, stage: DeviceStage, checking: Pipeline, jobs: Iterator[Job]) -> None:
        self._stage, self._checking = stage, checking
        self._jobs: Iterator[Job] | None = jobs

    def __next__(self) -> _Decoding:
        jobs, self._jobs = self._jobs, None
        if jobs is not None:
            self._checking.start(jobs)
        job = self._checking.get()
        if job is None:
            raise StopIteration
        assert isinstance(job, DeviceJob)
        return _Decoding(self._stage, job)


class DecodeAhead:
    """Batches of a stage whose device decodes. The next one is decoded as soon as the last has been launched.

    Attributes:
        pipeline: of the thread, to be closed together with that which checks.
    """

    def __init__(self, stage: DeviceStage, checking: Pipeline) -> None:
        """checking: what runs the jobs; nobody else may start it, nor get from it. LoaderError: no more threads to be had."""
        self._stage, self._checking = stage, checking
        self.pipeline = Pipeline(workers=1, ahead=1)

    def start(self, jobs: Iterator[Job]) -> None:
        """Make batches of these from now on. What was decoded ahead is dropped; what the thread is at, it finishes first."""
        self.pipeline.start(_Checked(self._stage, self._checking, jobs))

    def get(self) -> tuple[DeviceJob, Batch]:
        """The next job and its batch. Raises what running, sourcing or finishing the job raised; `start` anew then."""
        decoding = self.pipeline.get(hold=True)
        assert isinstance(decoding, _Decoding)
        batch = self._stage.finish(decoding.sourced)
        # Not before: a decoder's memory is released in the order in which it was taken, by the event behind what reads it.
        self.pipeline.proceed()
        return decoding.sourced.job, batch
