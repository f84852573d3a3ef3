"""Every row's image as the bytes that go into the .beton, in the order of the table.

Threads read the files, walk their headers and check what passes through, processes re-encode the rest, and results come in order,
so that they do not depend on how many of either there are.
"""

from __future__ import annotations

import os
import threading
import zlib
from collections import deque
from collections.abc import Generator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing

from fastretina.errors import ConvertError
from fastretina.packing.config import PackConfig
from fastretina.packing.inspect import Source, inspect
from fastretina.packing.labels.table import LabelTable
from fastretina.packing.reencode import Reencoded, ReencodePool, WorkerDied
from fastretina.system.interrupts import HeldSignals

_CHUNK = 32  # images a thread reads at a time
_AHEAD = 4  # chunks in flight for each worker


def packed_images(config: PackConfig, table: LabelTable, rows: range, signals: HeldSignals) -> Generator[Source]:
    """The images of these rows, in order: each with its payload, or bad. Lets signals in at each of them, and while it waits.

    Raises ConvertError where a worker process dies or the system gives no more threads, processes or memory.
    """
    workers = config.workers or len(os.sched_getaffinity(0))

    over = threading.Event()

    def inspected(row: int) -> Source:
        try:
            return inspect(table.paths[row], config.size, config.check, config.preparation)
        except MemoryError:
            return Source(None, 0, "not enough memory to read it", bad=True)
        except OSError as error:  # no more open files and the like: no image is to be left out for that
            raise ConvertError(f"{table.where(row)}: {table.paths[row]}: {error.strerror}; fewer --workers need less") from error

    def read(start: int) -> list[Source]:
        return [
            Source(None, 0, str(reason), bad=True)
            if (reason := table.problems.get(row) or table.left_out.get(row))
            else inspected(row)
            for row in rows[start - rows.start :][:_CHUNK]
            if not over.is_set()  # then nobody waits for them
        ]

    starts = iter(rows[::_CHUNK])
    pending: deque[tuple[int, Future[list[Source]]]] = deque()
    submitted = 0  # rows whose re-encoding, if needed, has been asked for
    threads = ThreadPoolExecutor(workers, thread_name_prefix="fastretina-pack")
    try:
        with closing(ReencodePool(workers, config.size, config.preparation)) as pool:
            while True:
                while len(pending) < _AHEAD * workers and (start := next(starts, None)) is not None:
                    try:
                        pending.append((start, threads.submit(read, start)))
                    except RuntimeError as error:
                        raise ConvertError(f"no thread to read with: {error}; fewer --workers need less") from error
                if not pending:
                    return
                signals.result(pending[0][1])
                for start, future in pending:
                    if not future.done():
                        break
                    if start >= submitted:
                        for row, source in enumerate(future.result(), start):
                            if source.payload is None and not source.bad:
                                pool.submit(row, table.paths[row])
                        submitted = start + _CHUNK
                start, future = pending.popleft()
                for row, source in enumerate(future.result(), start):
                    signals.check()
                    if source.payload is None and not source.bad:
                        source = _finished(pool.result(row, signals), source.reason)
                    yield source
                pool.poll()
    except WorkerDied as error:
        at = row if error.row is None else error.row  # an idle one: near the image that is waited for
        raise ConvertError(f"{table.where(at)}: {table.paths[at]}: {error}") from None
    finally:
        over.set()
        threads.shutdown(wait=True, cancel_futures=True)


def _finished(answer: Reencoded | str, reason: str) -> Source:
    if isinstance(answer, str):
        return Source(None, 0, answer, bad=True)
    return Source(answer.jpeg, zlib.crc32(answer.jpeg), reason, notes=answer.notes)
