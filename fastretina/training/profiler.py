"""Where the time of a few training steps goes: a timeline for chrome://tracing or Perfetto, and a table of it.

    profiler = StepProfiler(run.path, steps=5)
    with profiler:
        for batch in loader:
            with span("forward"): ...
            profiler.step()

`span` marks a range on the host, in the timeline and (on CUDA) for Nsight Systems as an NVTX range. While nothing is profiled it
costs a comparison.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from torch.profiler import ProfilerActivity, profile

from fastretina.system import tracing
from fastretina.system.files import write_bytes

WARM_UP = 10  # steps before the first that is recorded: cuDNN's choice of kernels, the allocator's first blocks, the profiler's own


class StepProfiler:
    """Records `steps` training steps after WARM_UP others; 0: does nothing at all.

    Attributes:
        table: what was found, as text; empty until the steps are done.
    """

    def __init__(self, folder: Path, steps: int, warm_up: int = WARM_UP) -> None:
        """folder: gets profile.json.gz, the timeline, and profile.txt, the table."""
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
        temporary = self._folder / ".profile.json"
        recorded.export_chrome_trace(str(temporary))
        trace = temporary.read_bytes()
        temporary.unlink()
        # The level of speed: a trace of five steps has tens of megabytes, and the run is waiting.
        write_bytes(self._folder / "profile.json.gz", gzip.compress(trace, 1))
        self.table = Timeline.of(json.loads(trace)["traceEvents"]).table(self._steps)
        write_bytes(self._folder / "profile.txt", (self.table + "\n").encode())


@dataclass(frozen=True)
class Timeline:
    """What a trace says of the device and the host.

    Attributes:
        kernels: seconds on the device (without a GPU: in operators of the host) by name. streams: busy seconds of each stream
            of the device. overlaps: the part of that, 0-1, in which the busiest stream worked as well. spans: seconds on the
            host by name. wall: seconds from the first event to the end of the last.
    """

    kernels: dict[str, float]
    streams: dict[str, float]
    overlaps: dict[str, float]
    spans: dict[str, float]
    wall: float

    @classmethod
    def of(cls, events: Iterable[Mapping[str, Any]]) -> Timeline:
        """Read the complete events ("ph": "X", microseconds) of a chrome trace by torch.profiler."""
        complete = [event for event in events if event.get("ph") == "X" and "dur" in event]
        device = [event for event in complete if event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")]
        kernels: dict[str, float] = {}
        for event in device or [event for event in complete if event.get("cat") == "cpu_op"]:
            kernels[event["name"]] = kernels.get(event["name"], 0.0) + event["dur"] / 1e6
        spans: dict[str, float] = {}
        for event in complete:
            if event.get("cat") == "user_annotation" and not event["name"].startswith("ProfilerStep"):
                spans[event["name"]] = spans.get(event["name"], 0.0) + event["dur"] / 1e6
        work: dict[str, list[tuple[float, float]]] = {}
        for event in device:
            stream = f"stream {event.get('args', {}).get('stream', event.get('tid'))}"
            work.setdefault(stream, []).append((event["ts"], event["ts"] + event["dur"]))
        busy = {stream: union(intervals) for stream, intervals in work.items()}
        streams = {stream: sum(end - start for start, end in parts) / 1e6 for stream, parts in busy.items()}
        main = max(streams, key=lambda stream: streams[stream], default=None)
        overlaps = {
            stream: common(parts, busy[main]) / 1e6 / max(1e-12, streams[stream])
            for stream, parts in busy.items()
            if main is not None and stream != main
        }
        edges = [(event["ts"], event["ts"] + event["dur"]) for event in complete if event.get("cat") != "Trace"]
        wall = (max(end for _, end in edges) - min(start for start, _ in edges)) / 1e6 if edges else 0.0
        return cls(kernels, streams, overlaps, spans, wall)

    def table(self, steps: int, rows: int = 15) -> str:
        """The figures of so many steps as text, per step."""
        lines = [f"{steps} steps, {1e3 * self.wall / max(1, steps):.2f} ms each"]
        lines += [f"  {1e3 * seconds / steps:9.3f} ms  {name}" for name, seconds in self.spans.items()]
        for stream, seconds in sorted(self.streams.items(), key=lambda item: -item[1]):
            share = f"busy {seconds / max(1e-12, self.wall):6.1%} of the time"
            beside = f", {self.overlaps[stream]:.1%} of it beside the busiest stream" if stream in self.overlaps else ""
            lines.append(f"{stream}: {share}{beside}")
        lines.append("most time in" + (" (on the device)" if self.streams else " (operators on the CPU, with what they call)"))
        largest = sorted(self.kernels.items(), key=lambda item: -item[1])[:rows]
        return "\n".join([*lines, *(f"  {1e3 * seconds / steps:9.3f} ms  {name[:100]}" for name, seconds in largest)])


def union(intervals: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The same time as intervals in order that do not overlap."""
    joined: list[tuple[float, float]] = []
    for start, end in sorted(intervals):
        if joined and start <= joined[-1][1]:
            joined[-1] = joined[-1][0], max(joined[-1][1], end)
        else:
            joined.append((start, end))
    return joined


def common(these: Sequence[tuple[float, float]], those: Sequence[tuple[float, float]]) -> float:
    """How much time lies in both of two lists as `union` makes them."""
    total, i, j = 0.0, 0, 0
    while i < len(these) and j < len(those):
        total += max(0.0, min(these[i][1], those[j][1]) - max(these[i][0], those[j][0]))
        if these[i][1] < those[j][1]:
            i += 1
        else:
            j += 1
    return total
