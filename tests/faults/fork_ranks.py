"""A process that has imported everything and compiled the kernels, and forks the ranks of a training run for each line it reads.

torchrun takes seconds to start; ranks so begin within milliseconds, and each is left to end by itself: nothing kills the others
when one has failed. One line of JSON in, `{"flags": [...], "ranks": N, "others": {RANK: [flags]}, "at": PLACE, "rank": RANK,
"what": "kill"|"stop"|SECONDS, "patience": SECONDS}`; one out: for each rank its exit code (negative: the signal), its output, and
after how many seconds it ended.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import rank_run
import torch
import torch.distributed as dist

from fastretina import train
from fastretina.loading.loader import Loader
from fastretina.report.run import RunPictures
from fastretina.training import build, distributed, loop
from fastretina.training.recorder import Recorder

# Where something may happen to a rank: what is called there, by rank 0 alone or by all.
PLACES: dict[str, tuple[Any, str]] = {
    "begin": (Recorder, "catch_up"),
    "step": (loop.Tally, "add"),
    "evaluation": (loop, "_outputs"),
    "judging": (loop, "_note_epoch"),
    "save": (Recorder, "_save"),
    "best weights": (Recorder, "load_best"),
    "report": (RunPictures, "finish"),
}
LIMIT = 60  # seconds; only reached when something hangs


def strike(job: dict[str, Any]) -> None:
    """Let it happen at the first call of what stands in `at`: the others then still have an epoch to train. Of a step or an
    evaluation at the second: in mid-epoch, in the test set's."""
    owner, name = PLACES[job["at"]]
    real: Callable[..., Any] = getattr(owner, name)
    left = [2 if job["at"] in ("step", "evaluation") else 1]

    def struck(*given: Any, **more: Any) -> Any:
        left[0] -= 1
        if left[0] == 0:
            if job["what"] in ("kill", "stop"):
                os.kill(os.getpid(), signal.SIGKILL if job["what"] == "kill" else signal.SIGSTOP)
            else:
                time.sleep(job["what"])
        return real(*given, **more)

    setattr(owner, name, struck)


def child(job: dict[str, Any], rank: int, port: int, output: int) -> None:
    """Never returns."""
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(job["ranks"]), "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    os.environ |= {
        "LOCAL_RANK": str(rank),
        "LOCAL_WORLD_SIZE": str(job["ranks"]),
    }
    os.environ["TORCHELASTIC_USE_AGENT_STORE"] = str(not job.get("own_store"))
    distributed.PATIENCE, distributed.BEAT = timedelta(seconds=job["patience"]), job["patience"] / 10
    build.build_model = lambda arch, outputs, **_: rank_run.Tiny(outputs)
    RunPictures.finish = lambda pictures: None
    if job.get("rank") == rank:
        strike(job)
    code = 99
    try:
        train.run_command([*job["flags"], *job.get("others", {}).get(str(rank), [])])
    except SystemExit as end:
        code = int(end.code or 0)
    except BaseException as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def ended(job: dict[str, Any]) -> list[dict[str, Any]]:
    # As with torchrun, in a process that outlives the ranks; or, as with TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1, in that of rank 0.
    store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    port = store.port
    if job.get("own_store"):
        with socket.socket() as taken:
            taken.bind(("localhost", 0))
            port = taken.getsockname()[1]
    started, pids, outputs = time.monotonic(), {}, []
    for rank in range(job["ranks"]):
        outputs.append(tempfile.TemporaryFile())  # noqa: SIM115  # closed below
        pid = os.fork()
        if pid == 0:
            child(job, rank, port, outputs[rank].fileno())
        pids[pid] = rank
    found: list[dict[str, Any]] = [{} for _ in pids]
    while pids and time.monotonic() < started + LIMIT:
        for pid in list(pids):
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                rank = pids.pop(pid)
                outputs[rank].seek(0)
                output = outputs[rank].read().decode()
                found[rank] = {"code": os.waitstatus_to_exitcode(status), "output": output, "seconds": time.monotonic() - started}
        if list(pids.values()) == [job.get("rank")] and job.get("what") == "stop":
            os.kill(*pids, signal.SIGKILL)  # as torchrun does in the end
        time.sleep(0.02)
    for pid, rank in pids.items():
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        found[rank] = {"code": None, "output": "hangs", "seconds": LIMIT}
    for output in outputs:
        output.close()
    return found


def main() -> None:
    """Until standard input ends."""
    torch.set_num_threads(1)
    with Loader(Path(sys.argv[1]), batch_size=4, resolution=32, workers=1) as loader:
        for _ in loader:  # compiles the kernels
            pass
    for line in sys.stdin:
        print(json.dumps(ended(json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
