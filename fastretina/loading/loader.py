"""The Loader: epochs of batches from a .beton file, the same ones every time."""

from __future__ import annotations

import itertools
import os
import warnings
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, NoReturn

import numpy as np
import torch
from numpy.typing import NDArray

from fastretina.beton.open import open_beton
from fastretina.beton.reader import Beton
from fastretina.beton.shards import ShardedBeton
from fastretina.errors import LoaderError, SampleError, UsageError
from fastretina.loading.batches import Batch, CpuJob, DeviceJob, Feed
from fastretina.loading.buffers import BufferPool
from fastretina.loading.config import LoaderConfig, options_of
from fastretina.loading.decode.choice import choose_decode, cpu_threads, default_workers
from fastretina.loading.decode.cpu import Sizes
from fastretina.loading.decode.gpu import DEVICE_BATCH
from fastretina.loading.pipeline import Pipeline
from fastretina.loading.resident import Store, make_store, plan_residence
from fastretina.system.progress import progress_bar

if TYPE_CHECKING:
    from fastretina.loading.decode_ahead import DecodeAhead
    from fastretina.loading.device_stage import DeviceStage

# Threads at most where a device decodes and they only read and check: more wait for each other (on two cores, 16: 18,000 images a
# second and 76 us of CPU each; 4: 42,000 and 39), fewer might wait for a disk.
CHECKING_THREADS = 4
_OWN_THREADS = (
    "it has threads of its own, which stay in the process that made it. Iterate it directly: it needs no DataLoader around it (one "
    "with num_workers=0 would do). Otherwise make it in the process that iterates it"
)


class _Position(NamedTuple):
    """The next batch to deliver. It changes by one assignment: an interrupt finds it before or after, never between."""

    epoch: int = 0
    batch: int = 0
    begins: bool = False  # whether the next iteration begins here, though this be in mid-epoch
    iteration: int = 0  # the one that may go on from here


class Loader:
    """Iterate it once for each epoch.

    Batches are a pure function of the file, the settings and the epoch: the number of workers, a resume or the machine's load
    never change them (but for decode="auto" on CUDA, where the number of workers has a part in who decodes). Each sample comes
    exactly once an epoch unless `sampling` says otherwise. A batch's memory stays as it is for as long as any of its tensors is
    referenced, and is recycled after that.

    A Loader has threads of its own, in the process that made it. It takes the place of torch's DataLoader, and goes into none that
    has workers: in a forked child, and where it is to be pickled, it raises LoaderError.

    Ctrl-C, at whatever moment, is a KeyboardInterrupt and does no harm: `state_dict()` then says the very batch that was not
    delivered, the same iterator's next() gives it, and a new iteration begins the next epoch, as after a `break`. Where a thread
    of the loader is ended by an exception from outside, iteration raises LoaderError; the next one starts another thread.

    Attributes:
        dataset: the open Beton. batch_size: images a step, over all ranks. device: that the batches are on.
        skipped: the bad samples that were left out. description: who decodes and what is kept in memory, in words.
    """

    @options_of(LoaderConfig)
    def __init__(self, path: str | os.PathLike[str] | Beton, config: LoaderConfig) -> None:
        """path: of a .beton file, or a pattern for shards (`train-*.beton`), or either by URL; or what is open already, or a
        selection of its samples, which stay the caller's to close. The options are LoaderConfig's, which says what they mean.

        Raises UsageError for options that cannot work and BetonError for a file that cannot be used; iteration raises SampleError
        for a bad sample, in place of its batch.
        """
        self.device = torch.device(config.device)
        if config.decode == "gpu" and not self._makes_on_device:
            raise UsageError(f"decode='gpu' needs device='cuda', not {self.device}: use decode='auto' or 'cpu'")
        self.dataset, self.batch_size = open_beton(path, config.cache), config.batch_size
        self._opened = not isinstance(path, Beton)
        self._config = config
        self.skipped: list[SampleError] = []
        workers = config.workers or default_workers(self.device)
        # Enough batches ahead that every thread has rows to take while the consumer holds one.
        ahead = 2 + -(-2 * workers // config.rows)
        residence = plan_residence(self.dataset, config)
        self._stage: DeviceStage | None = None
        store = None
        if self._makes_on_device:
            pixels = int(np.prod(Sizes(self.dataset, config.resolution).largest))
            pool = BufferPool(config.rows * pixels * 3, keep=ahead + 2, pinned=self.device.type == "cuda")
            self._feed = Feed(self.dataset, config, pool, DeviceJob)
            # Of a resident data set the decoder sees nothing but the filling.
            batch = max(config.rows, DEVICE_BATCH) if residence.size else config.rows
            decoder, where = choose_decode(self._feed, self.device, workers, batch)
            store, kept = make_store(len(self.dataset), residence, config)
            self._feed.on_device, self._feed.device_decodes = store.held if store else None, decoder is not None
            from fastretina.loading.device_stage import DeviceStage  # here, because the CPU path needs no Triton

            self._stage = DeviceStage(self._feed, self.device, store, decoder)
        else:
            nbytes = config.rows * config.resolution**2 * 3 * config.dtype.itemsize
            self._feed = Feed(self.dataset, config, BufferPool(nbytes, keep=ahead + 2), CpuJob)
            self._feed.store = Store(len(self.dataset), *residence.size, residence.memory) if residence.size else None
            kept = residence.note
            where = cpu_threads(workers)
        self._filled = self._feed.on_device is None
        self._pipeline = Pipeline(min(workers, CHECKING_THREADS) if self._feed.device_decodes else workers, ahead)
        self._ahead: DecodeAhead | None = None
        if self._stage is not None and self._feed.device_decodes and store is None:
            from fastretina.loading.decode_ahead import DecodeAhead

            self._ahead = DecodeAhead(self._stage, self._pipeline)
        self._position, self._iterations = _Position(), itertools.count(1)
        self._next_job: tuple[int, int] | None = None  # epoch and batch that the pipeline yields next; None: unknown
        self.description = f"decode on {where}, {kept}"

    @property
    def _makes_on_device(self) -> bool:
        """Whether the device makes the batches; tests say so of a CPU, whose kernel is Triton's interpreter."""
        return self.device.type != "cpu"

    @property
    def decodes_on(self) -> Literal["cpu", "gpu"]:
        """Who decodes."""
        return "gpu" if self._feed.device_decodes else "cpu"

    def __len__(self) -> int:
        """Batches in an epoch."""
        return len(self._feed)

    @property
    def positions(self) -> NDArray[np.int64]:
        """(n,) where in an epoch's order the samples stand that this rank gives, as it gives them."""
        return np.fromiter(itertools.chain.from_iterable(map(self._feed.positions, range(len(self)))), np.int64)

    @property
    def epoch(self) -> int:
        """The epoch (0, 1, ...) that the next iteration gives, or the rest of which."""
        position = self._position
        return position.epoch if position.begins or position.batch == 0 else position.epoch + 1

    def set_epoch(self, epoch: int) -> None:
        """The next iteration gives this epoch (0, 1, ...), from its beginning; the one under way cannot go on.

        Said after `load_state_dict` of the epoch that the state stands in, it changes nothing: a loop that names each of its epochs
        goes on with the very next batch too.
        """
        if epoch < 0:
            raise UsageError(f"epochs count from 0: {epoch} is none")
        if not (self._position.begins and self._position.epoch == epoch):
            self._set_out(epoch, 0)

    def _require_threads(self) -> None:
        """LoaderError in a forked child, where waiting for a batch would have no end."""
        if not self._pipeline.process.is_this:
            raise LoaderError(f"{self.dataset.path}: this Loader was made before the process was forked; {_OWN_THREADS}")

    def _set_out(self, epoch: int, batch: int) -> None:
        """Have the next iteration begin with this batch."""
        self._require_threads()
        self._position = _Position(epoch, batch, True, next(self._iterations))

    def __iter__(self) -> Iterator[Batch]:
        if self._pipeline.closed:
            raise LoaderError(f"{self.dataset.path}: the loader is closed")
        self._require_threads()
        while True:
            now = self._position
            epoch = now.epoch if now.begins or now.batch == 0 else now.epoch + 1
            batches = _Batches(self, epoch, next(self._iterations))
            # Until a batch has been delivered, what was loaded or set holds.
            begun = _Position(epoch, now.batch if now.begins else 0, now.begins, batches.iteration)
            if self._position is now:  # no signal handler has set it elsewhere
                self._position = begun
                return batches

    def fill(self) -> None:
        """Bring to the device what resident mode keeps there, with a progress bar; the first iteration does it otherwise.

        Bad samples stay out, and meet their fate in the epoch. In RAM, samples are decoded as the first epoch asks for them.
        """
        self._require_threads()
        if self._filled or self._stage is None:
            return
        # A device decoder wants many at a time; the pinned memory that the CPU decodes into holds a rank's part of a batch.
        samples, rows = self._stage.owned, max(self._config.rows, DEVICE_BATCH if self._feed.device_decodes else 0)
        self._next_job = None  # whatever is under way will be dropped
        self._pipeline.start(self._feed.filling(samples, rows))
        with progress_bar("filling", len(samples), 0, unit="img") as bar:
            while (job := self._pipeline.get()) is not None:
                assert isinstance(job, DeviceJob)
                self._stage.keep(job)
                bar.update(job.rows)
        self._stage.kept()
        self._filled = True

    def _make(self, epoch: int, batch: int) -> Batch:
        """The batch of this number; none of its rows may be left."""
        self.fill()
        stage, ahead = self._stage, self._ahead
        if self._next_job != (epoch, batch):
            self._next_job = None  # first: an interrupt may leave either stream
            (ahead or self._pipeline).start(self._feed.jobs(epoch, batch))
        self._next_job = None  # until get() has succeeded
        job: Any  # a DeviceJob where there is a stage, or a CpuJob
        if ahead:
            job, made = ahead.get()
        else:
            job = self._pipeline.get()
            made = stage.launch(job) if stage else job.batch()
        if job.bad:  # on a device, launching may have found more of them
            self._record(job.bad.values())
        return made

    def _record(self, errors: Iterable[SampleError]) -> None:
        known = {(error.path, error.index) for error in self.skipped}
        new = {(error.path, error.index): error for error in errors}
        self.skipped += [new[key] for key in sorted(new.keys() - known)]
        if len(self.skipped) > self._config.max_bad * len(self.dataset):
            raise LoaderError(
                f"{self.dataset.path}: {len(self.skipped)} bad samples of {len(self.dataset)}, more than max_bad = "
                f"{self._config.max_bad:.2%}; the last: {self.skipped[-1]}"
            )

    def state_dict(self) -> dict[str, Any]:
        """Where the loader stands, as JSON-able numbers: the next batch to deliver, and what the order depends on."""
        self._require_threads()
        position = self._position
        return {"epoch": position.epoch, "batch": position.batch} | self._identity()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on with the very next batch after state_dict(); workers, resolution, device, rank and world size may differ.

        Raises LoaderError where the order of samples would not be the same, or the state names no batch of an epoch.
        """
        for key, mine in self._identity().items():
            if key == "data" and key not in state:
                warnings.warn(
                    f"{self.dataset.path}: the state is of an older fastretina: whether it is of these data is unknown",
                    stacklevel=2,
                )
            elif state.get(key) != mine:
                raise LoaderError(f"{self.dataset.path}: cannot resume: {key} is {mine!r} here and {state.get(key)!r} in the state")
        epoch, batch = state.get("epoch"), state.get("batch")
        if type(epoch) is not int or type(batch) is not int or epoch < 0 or not 0 <= batch < max(1, len(self)):
            raise LoaderError(
                f"{self.dataset.path}: cannot resume: epoch {epoch!r}, batch {batch!r} in the state; epochs count from 0, and have "
                f"{len(self)} batches, from 0"
            )
        self._set_out(epoch, batch)

    def _identity(self) -> dict[str, Any]:
        found = {"samples": len(self.dataset), "data": self.dataset.digest, "sampling": self._feed.sampling}
        found |= {name: getattr(self._config, name) for name in ("batch_size", "seed", "drop_last")}
        if self._feed.sampling == "shards":
            found["shards"] = len(self.dataset.shards) if isinstance(self.dataset, ShardedBeton) else 1
        return found

    def close(self) -> None:
        """End the threads and let go of the memory, and of the file if this loader opened it. Delivered batches stay valid.

        May be called at any moment, in a signal handler too. Rows under way are finished first, those that wait for a server given
        up; after 10 s close() leaves them, with a warning. Nothing in a forked child: all of that is the parent's.
        """
        if not self._pipeline.process.is_this:
            return
        if self._opened:
            self.dataset.interrupt()
        self._pipeline.close(*([self._ahead.pipeline] if self._ahead else []))
        self._feed.store = self._stage = self._ahead = None
        if self._opened:
            self.dataset.close()

    def __reduce__(self) -> NoReturn:
        raise LoaderError(f"{self.dataset.path}: a Loader cannot be pickled or copied; {_OWN_THREADS}")

    def __enter__(self) -> Loader:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


class _Batches(Iterator[Batch]):
    """The rest of an epoch. No generator, which an exception would end for good."""

    def __init__(self, loader: Loader, epoch: int, iteration: int) -> None:
        self._loader, self._epoch, self.iteration = loader, epoch, iteration
        self._over = False

    def __next__(self) -> Batch:
        loader = self._loader
        while not self._over:
            position = loader._position
            if position.iteration != self.iteration:
                raise LoaderError("the loader was set to another epoch, or a later iteration has begun; this one cannot go on")
            if position.epoch != self._epoch or not len(loader):
                break
            try:
                batch = loader._make(position.epoch, position.batch)
            except Exception:
                self._over = True  # an error ends the iteration; an interrupt does not
                raise
            last = position.batch + 1 == len(loader)
            epoch, number = (position.epoch + 1, 0) if last else (position.epoch, position.batch + 1)
            after = _Position(epoch, number, False, self.iteration)
            # Of several ranks each takes every step, or the others would wait for it for ever.
            delivered = len(batch.ids) > 0 or loader._config.world_size > 1
            # From here on nothing comes between: the interpreter looks for signals at calls and at jumps back.
            if loader._position is position:  # no signal handler has set it elsewhere
                loader._next_job = epoch, number
                loader._position = after
                if delivered:
                    return batch
        self._over = True
        raise StopIteration
