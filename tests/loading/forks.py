"""A process with a Loader in the middle of an epoch, and what children that it forks meet with it: a child for each operation.

One argument, a .beton; JSON out: for each operation its answer, or its error as "Type: message", or "hung": the threads
that make the batches are not there.
"""

from __future__ import annotations

import copy
import gc
import json
import os
import pickle
import signal
import sys
from collections.abc import Callable, Iterator
from typing import Any

from torch.utils.data import DataLoader, IterableDataset

from fastretina.errors import FastretinaError
from fastretina.loading.loader import Loader

SETTINGS = {"batch_size": 16, "resolution": 32, "workers": 2}
PATIENCE = 20  # seconds


class Batches(IterableDataset[Any]):
    """A Loader inside torch's DataLoader, as people write it."""

    def __init__(self, path: str) -> None:
        self.loader = Loader(path, **SETTINGS)

    def __iter__(self) -> Iterator[list[int]]:
        return (batch.ids.tolist() for batch in self.loader)


def said(action: Callable[[], Any]) -> str:
    try:
        return str(action())
    except FastretinaError as error:
        return f"{type(error).__name__}: {error}"


def in_child(loader: Loader, action: Callable[[], Any]) -> str:
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        signal.alarm(PATIENCE)
        os.write(writing, said(action).encode())
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        found = pipe.read().decode()
    return found if os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0 else "hung"


def main(path: str) -> None:
    loader = Loader(path, **SETTINGS)
    epoch = iter(loader)
    ids, state = next(epoch).ids.tolist(), loader.state_dict()
    held = {"loader": loader}

    def forget() -> str:
        nonlocal loader, epoch
        held.clear()
        del loader, epoch
        gc.collect()
        return "forgotten"

    def made_here() -> int:
        with Loader(path, **SETTINGS) as own:
            return sum(len(batch.ids) for batch in own)

    def a_sample_and_close() -> int:
        size = len(loader.dataset.jpeg(3))
        loader.close()
        return size

    operations: dict[str, Callable[[], Any]] = {
        "iter": lambda: next(iter(loader)),
        "next": lambda: next(epoch),
        "fill": lambda: loader.fill(),
        "state_dict": lambda: loader.state_dict(),
        "load_state_dict": lambda: loader.load_state_dict(state),
        "set_epoch": lambda: loader.set_epoch(3),
        "len": lambda: len(loader),
        "close": a_sample_and_close,
        "forget": forget,
        "made_here": made_here,
    }
    found = {name: in_child(loader, action) for name, action in operations.items()}
    found["pickle"] = said(lambda: pickle.dumps(loader))
    found["copy"] = said(lambda: copy.deepcopy(loader))
    for how in ("fork", "spawn"):
        batches = DataLoader(Batches(path), batch_size=None, num_workers=1, multiprocessing_context=how, timeout=PATIENCE)
        found[how] = said(lambda batches=batches: list(batches))
    found["none"] = said(lambda: sum(map(len, DataLoader(Batches(path), batch_size=None, num_workers=0))))
    ids += [number for batch in epoch for number in batch.ids.tolist()]
    print(json.dumps(found | {"parent": sorted(ids)}))


if __name__ == "__main__":
    main(sys.argv[1])
