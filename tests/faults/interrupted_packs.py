"""`write_beton` called from Python, as in a notebook, and struck by real SIGINTs: a process of its own for test_pack_interrupts."""

from __future__ import annotations

import json
import os
import random
import signal
import struct
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from fastretina.packing.pack import write_beton


@contextmanager
def striker() -> Iterator[Callable[[float], None]]:
    """Sends this process a SIGINT after so many seconds; a process of its own, that nothing here is in its way."""
    reading, writing = os.pipe()
    parent = os.getpid()
    pid = os.fork()
    if pid == 0:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        os.close(writing)
        while asked := os.read(reading, 8):
            time.sleep(struct.unpack("d", asked)[0])
            os.kill(parent, signal.SIGINT)
        os._exit(0)
    os.close(reading)
    yield lambda seconds: os.write(writing, struct.pack("d", seconds)) and None
    os.close(writing)
    os.waitpid(pid, 0)


def owned(folder: Path) -> dict[str, object]:
    """What an interrupted call could leave behind."""
    return {
        "unfinished files": sorted(entry.name for entry in folder.iterdir() if entry.name.startswith(".")),
        "descriptors": sum(1 for _ in Path("/proc/self/fd").iterdir()),
        "threads": sorted(thread.name for thread in threading.enumerate()),
        "processes": sorted(child for task in Path("/proc/self/task").glob("*/children") for child in task.read_text().split()),
        "handlers": [str(signal.getsignal(number)) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)],
    }


def main(job: dict[str, object]) -> None:
    """Prints how many calls were struck while they packed, and the longest that one of them went on, in seconds."""
    out = Path(str(job["out"])) / "o.beton"
    arguments = {"root": job["root"], "split": "train", "size": job["size"], "workers": 2, "on_bad": "skip", "max_bad": "50%"}
    write_beton(out, **arguments)
    started = time.monotonic()
    write_beton(out, **arguments)
    lifetime = time.monotonic() - started
    whole = {entry.name: entry.read_bytes() for entry in out.parent.iterdir()}
    chosen, struck, longest, kept = random.Random(int(str(job["seed"]))), 0, 0.0, []
    with striker() as strike:
        before = owned(out.parent)
        while struck < int(str(job["strikes"])):
            at, packed = chosen.uniform(0, lifetime), False
            moment = time.monotonic() + at
            try:
                strike(at)
                write_beton(out, **arguments)
                packed = True
                time.sleep(60)
            except KeyboardInterrupt as error:
                kept.append(error)  # as a notebook does, with all frames and what they hold
            longest = max(longest, time.monotonic() - moment)
            assert (after := owned(out.parent)) == before, (at, packed, after, before)
            struck += not packed
            if struck % 4 == 0:  # each time would double what this costs; a lock that was left ends the next call at any rate
                write_beton(out, **arguments)
            assert {entry.name: entry.read_bytes() for entry in out.parent.iterdir()} == whole, (at, packed)
    print(json.dumps({"struck": struck, "longest": longest}))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
