"""torchrun in a process that has imported all that a rank needs: it forks itself for each run, and torchrun its ranks.

An interpreter takes some 7 s of a core until it trains, and torchrun of two ranks starts three. What begins, watches, ends and
restarts the ranks is torchrun's own code. One line of JSON in, `{"script": FILE, "flags": [...], "ranks": N, "restarts": N,
"env": {...}, "output": FILE, "errors": FILE}`; two out: the number of torchrun's process, and its exit code once it has ended.
"""

from __future__ import annotations

import json
import os
import runpy
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn


class ForkedTorchrun:
    """Starts runs in that process, one at a time."""

    def __init__(self, train: Path) -> None:
        self._server = subprocess.Popen(
            [sys.executable, __file__, str(train)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
        )  # fmt: skip

    def __call__(self, script: str, flags: list[str], notes: Path, ranks: int = 2, restarts: int = 0, fault: str = "") -> Run:
        """notes, fault: FASTRETINA_STEPS and FASTRETINA_FAULT, see rank_run.py."""
        env = {"FASTRETINA_STEPS": str(notes), "FASTRETINA_FAULT": fault}
        output, errors = (notes.with_suffix(suffix) for suffix in (".output", ".errors"))
        job = {"script": script, "flags": flags, "ranks": ranks, "restarts": restarts, "env": env}
        assert self._server.stdin is not None
        self._server.stdin.write(json.dumps({**job, "output": str(output), "errors": str(errors)}) + "\n")
        self._server.stdin.flush()
        return Run(self._answer(), self._answer, output, errors)

    def _answer(self) -> int:
        assert self._server.stdout is not None
        return json.loads(self._server.stdout.readline())

    def close(self) -> None:
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        self._server.stdin.close()
        self._server.wait(60)
        self._server.stdout.close()


class Run:
    """What the tests use of subprocess.Popen, of a run that was forked."""

    def __init__(self, pid: int, ended: Callable[[], int], output: Path, errors: Path) -> None:
        self.pid, self._ended, self._files = pid, ended, (output, errors)
        self.returncode: int | None = None

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def communicate(self, timeout: float) -> tuple[str, str]:
        """Standard output and standard error, once it has ended."""
        overdue = threading.Timer(timeout, self.send_signal, [signal.SIGKILL])
        overdue.start()
        self.returncode = self._ended()
        overdue.cancel()
        return self._files[0].read_text(), self._files[1].read_text()


class Forked:
    """What torchrun uses of subprocess.Popen, of a rank that is forked instead of started."""

    def __init__(self, words: tuple[str, ...], env: dict[str, str]) -> None:
        self._code: int | None = None
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = os.fork()
        if self.pid == 0:
            os.setsid()
            for number in signal.valid_signals():  # as in a new interpreter: torchrun's handlers are not for the ranks
                if callable(signal.getsignal(number)):
                    signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
            os.environ.clear()
            os.environ.update(env)
            sys.argv = [word for word in words[1:] if word != "-u"]
            ended(lambda: runpy.run_path(sys.argv[0], run_name="__main__"))

    def poll(self) -> int | None:
        if self._code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self._code = os.waitstatus_to_exitcode(status) if pid else None
        return self._code

    def wait(self, timeout: float) -> int:
        until = time.monotonic() + timeout
        while (code := self.poll()) is None:
            if time.monotonic() > until:
                raise subprocess.TimeoutExpired("a rank", timeout)
            time.sleep(0.01)
        return code

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)


def ended(call: Callable[[], Any]) -> NoReturn:
    """End this process as an interpreter ends after what is called."""
    code = 0
    try:
        call()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def main() -> None:
    """Until standard input ends."""
    import torch
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.subprocess_handler.subprocess_handler import SubprocessHandler

    from fastretina import Loader, one_run  # noqa: F401  # what `train` imports once it has parsed
    from fastretina.training import batchnorm_statistics, build, loop  # noqa: F401

    torch.set_num_threads(1)
    SubprocessHandler._popen = lambda handler, words, env: Forked(words, env)
    with Loader(Path(sys.argv[1]), batch_size=4, resolution=32, workers=1) as loader:
        for _ in loader:  # loads the kernels
            pass
    for line in sys.stdin:
        job = json.loads(line)
        pid = os.fork()
        if pid == 0:
            for name, number in (("output", 1), ("errors", 2)):
                os.dup2(os.open(job[name], os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
            os.environ |= job["env"]
            options = ["--standalone", f"--nproc-per-node={job['ranks']}", f"--max-restarts={job['restarts']}"]
            words = [*options, job["script"], *job["flags"]]
            ended(lambda words=words: run.main(words))
        print(pid, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)


if __name__ == "__main__":
    main()
