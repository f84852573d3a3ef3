"""Where the time of a few training steps goes: torch's trace for chrome://tracing or Perfetto, and its table of operators.

The spans in it (`system.tracing`) are marked on the host, and on CUDA for Nsight Systems as NVTX ranges too.
"""

from __future__ import annotations

import gzip
from types import TracebackType
from typing import Any, Self

import torch
from torch.profiler import ProfilerActivity, profile

from fastretina.system import tracing
from fastretina.system.files import write_bytes
from fastretina.training.run_folder import RunFolder

WARM_UP = 10  # steps before the first that is recorded: cuDNN's choice of kernels, the allocator's first blocks, the profiler's own
ROWS = 25  # of the table


class StepProfiler:
    """Records `steps` training steps after WARM_UP others; 0: does nothing at all.

    Attributes:
        table: what was found, as text; empty until the steps are done.
    """

    def __init__(self, folder: RunFolder, steps: int, warm_up: int = WARM_UP) -> None:
        """folder: gets profile.json.gz, the trace, and profile.txt, the table."""
        self.table = ""
        self._folder, self._steps = folder, steps
        self._left = warm_up + steps if steps > 0 else 0
        self._profile: Any = None

    def __enter__(self) -> Self:
        if self._left and self._left == self._steps:
            self._start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """The end of the loop; steps recorded so far are written unless an error ended it."""
        if self._profile is not None:
            self._stop(write=kind is None)
        self._left = 0

    def step(self) -> None:
        """One training step is over."""
        if not self._left:
            return
        self._left -= 1
        if self._left == self._steps:
            self._start()
        elif self._left == 0 and self._profile is not None:
            self._stop(write=True)

    def _start(self) -> None:
        activities = [ProfilerActivity.CPU]
        if torch.cuda.is_available():
            activities.append(ProfilerActivity.CUDA)
            torch.cuda.synchronize()
        self._profile = profile(activities=activities)
        self._profile.start()
        tracing.record(True)

    def _stop(self, write: bool) -> None:
        tracing.record(False)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        recorded, self._profile = self._profile, None
        recorded.stop()
        if not write:
            return
        temporary = self._folder.file(".profile.json")
        recorded.export_chrome_trace(str(temporary))
        # The level of speed: a trace of five steps has tens of megabytes, and the run is waiting.
        write_bytes(self._folder.file("profile.json.gz"), gzip.compress(temporary.read_bytes(), 1))
        temporary.unlink()
        where = "device" if torch.cuda.is_available() else "cpu"
        averages, steps = recorded.key_averages(), self._steps - self._left
        # Spans by themselves: among the operators a short one, such as a wait for data that is none, would not be shown.
        spans = [event for event in averages if event.is_user_annotation and event.cpu_time_total]
        lines = [f"{steps} steps; of each, on the host"]
        lines += [f"{event.cpu_time_total / 1e3 / max(1, steps):9.3f} ms  {event.key}" for event in spans]
        operators = averages.table(f"self_{where}_time_total", row_limit=ROWS, max_name_column_width=60)
        self.table = "\n".join([*lines, operators.strip()])
        write_bytes(self._folder.file("profile.txt"), (self.table + "\n").encode())
