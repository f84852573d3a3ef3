"""A process that has imported everything and compiled the kernels, and forks a training run for each line that it reads.

A run so begins within milliseconds, where importing torch takes seconds: runs can be killed by the hundred. One line of JSON in,
`{"flags": [...], "ids": PATH, "kill_after": SECONDS, "end_at": STEP, "die_before": N, "limit": BYTES, "limit_in": "tables" or
"report", "report": true, "umask": N, "tiny": true}`; one out: the exit code (negative: the signal), its output, and how many
operations on files it did, if it lived to tell.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import signal
import sys
import time
from typing import Any

import torch

from fastretina import train
from fastretina.loading.loader import Loader
from fastretina.report.run import RunPictures
from fastretina.training import build, loop
from fastretina.training.recorder import Recorder

OPERATIONS = ("fsync", "replace", "link", "unlink")


class Tiny(torch.nn.Sequential):
    """A network small enough that saving takes no time, with the layers that matter: normalisation has buffers."""

    def __init__(self) -> None:
        super().__init__(
            torch.nn.Conv2d(3, 8, 5, stride=4), torch.nn.BatchNorm2d(8), torch.nn.ReLU(), torch.nn.AdaptiveAvgPool2d(1),
            torch.nn.Flatten(), torch.nn.Linear(8, 5),
        )  # fmt: skip


def die_before(number: int | None, done: list[int]) -> None:
    """Count operations on files; kill this process before the one of that number, a file to be synced half-written by then."""

    def counting(real: Any, name: str) -> Any:
        def operation(*given: Any, **more: Any) -> Any:
            if done[0] == number:
                if name == "fsync":
                    with contextlib.suppress(OSError):  # a folder
                        os.ftruncate(given[0], os.fstat(given[0]).st_size // 2)
                os.kill(os.getpid(), signal.SIGKILL)
            done[0] += 1
            return real(*given, **more)

        return operation

    for name in OPERATIONS:
        setattr(os, name, counting(getattr(os, name), name))


def run(job: dict[str, Any], done: list[int]) -> None:
    """What the child does instead of `python -m fastretina.train`."""
    os.umask(job.get("umask", 0o22))
    if not job.get("report"):
        RunPictures.finish = lambda pictures: None  # pictures and report take seconds and are made from what is saved
    if job.get("tiny"):
        build.build_model = lambda *_, **__: Tiny()
    if job.get("ids"):
        log = os.open(job["ids"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        add = loop.Tally.add

        def noting(tally: loop.Tally, step: int, *rest: torch.Tensor) -> None:
            os.write(log, f"{step} {rest[-1].tolist()}\n".encode())
            add(tally, step, *rest)
            if step == job.get("end_at"):
                os.kill(os.getpid(), signal.SIGTERM)

        loop.Tally.add = noting
    if job.get("limit") is not None:
        # From the second epoch on; or in the last one's tables, or in the report.
        places = {"tables": (Recorder, "_write_tables", 3), "report": (RunPictures, "finish", 1)}
        owner, name, call = places.get(job.get("limit_in", ""), (Recorder, "end_epoch", 2))
        real, calls = getattr(owner, name), [0]

        def limited(*given: Any, **more: Any) -> None:
            calls[0] += 1
            if calls[0] == call:
                resource.setrlimit(resource.RLIMIT_FSIZE, (job["limit"], job["limit"]))
            real(*given, **more)

        setattr(owner, name, limited)
    die_before(job.get("die_before"), done)
    train.run_command(job["flags"])


def child(job: dict[str, Any], output: int) -> None:
    """Never returns."""
    os.dup2(output, 1)
    os.dup2(output, 2)
    code, done = 99, [0]
    try:
        run(job, done)
    except SystemExit as end:
        code = int(end.code or 0)
    except BaseException as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        code = 1
    print(f"\noperations {done[0]}")
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def main() -> None:
    """Until standard input ends."""
    torch.set_num_threads(1)
    with Loader(sys.argv[1], batch_size=4, resolution=32, workers=1) as loader:
        for _ in loader:  # compiles the kernels
            pass
    for line in sys.stdin:
        reading, writing = os.pipe()
        pid = os.fork()
        if pid == 0:
            child(json.loads(line), writing)
        os.close(writing)
        job = json.loads(line)
        if job.get("kill_after") is not None:
            time.sleep(job["kill_after"])
            os.kill(pid, signal.SIGKILL)  # nobody has waited for it yet: it is there, if only as a zombie
        with os.fdopen(reading, "rb") as pipe:
            output = pipe.read().decode()
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        text, _, count = output.rpartition("operations ")
        print(json.dumps({"code": code, "output": text or output, "operations": int(count) if text else None}), flush=True)


if __name__ == "__main__":
    main()
