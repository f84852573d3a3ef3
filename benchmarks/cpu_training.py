"""What training costs on a CPU: one step in every form, and whole epochs beside the plain loops that one would write with torch.

    python benchmarks/cpu_training.py --data train.beton --images photographs --json out.json

`step`: ResNet18 on a batch that is there already; contiguous and channels-last, float32 and bfloat16, eager and compiled by
inductor, by batch size, threads and side of the image, all in one process and interleaved; compiling is timed apart. `epoch`: the
loop of `fastretina train`, with --amp and without, beside DataLoaders of torch over the photographs that the .beton was packed
from, read by Pillow or kept decoded in memory, each side in a process of its own, in turn; their first epoch is not counted, nor
are evaluations. The JSON is rewritten after every round. What huge pages do: call it with GLIBC_TUNABLES set, which is noted.
"""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from cpu_training_side import EpochTask
from export_speed import spread
from measure import command, save
from side_process import SideProcess
from training_step import FORMATS, TrainingStep

from fastretina.cli import run
from fastretina.errors import UsageError
from fastretina.models.precision import Precision
from fastretina.system.malloc import keep_freed_memory

CPU = torch.device("cpu")
PRECISIONS = {"float32": Precision("cpu", None, ""), "bfloat16": Precision("cpu", torch.bfloat16, "")}
PAUSE = 0.3  # seconds between two sides, in which the OpenMP threads of the last stop spinning
OURS = "fastretina-0-amp"
SIDES = (
    OURS, "fastretina-0-float32",
    *(f"{loop}-{kind}" for kind in ("bfloat16", "float32") for loop in ("pillow-0", "pillow-1", "pillow-2", "memory-0")),
)  # fmt: skip
Part = Literal["step", "epoch"]
Mode = Literal["eager", "compiled"]


@dataclass(frozen=True)
class CpuTraining:
    """Steps and epochs of training on this CPU, beside plain loops of torch."""

    json: Path | None = None
    """Where the results are, after every round."""
    data: Path = Path("data/train.beton")
    """The .beton to train on, for epochs."""
    images: Path | None = None
    """The folder of photographs that it was packed from, for epochs."""
    parts: tuple[Part, ...] = ("step", "epoch")
    arch: Literal["resnet18", "resnet50"] = "resnet18"
    resolutions: tuple[int, ...] = (96, 160, 224)
    """px"""
    batches: tuple[int, ...] = (16, 32, 64, 128)
    """Images of a step; of an epoch's steps --batch-size."""
    threads: tuple[int, ...] = ()
    """Of a step; none given: all cores, and all but one. Epochs take what each side takes by itself."""
    modes: tuple[Mode, ...] = ("eager", "compiled")
    batch_size: int = 32
    sides: tuple[str, ...] = SIDES
    """Of epochs: LOOP-WORKERS-PRECISION, see cpu_training_side.py."""
    rounds: int = 5
    """Timed rounds."""
    seconds: float = 2.0
    """Of steps in a round, at least."""
    patience: float = 3600.0
    """Seconds that an epoch may take."""


@dataclass
class Results:
    """What is known so far."""

    path: Path | None
    found: dict[str, Any]

    def keep(self, line: str = "") -> None:
        """Save, then say so."""
        save(self.path, self.found)
        if line:
            print(line, flush=True)


def main(config: CpuTraining) -> None:
    """Steps and epochs of training on this CPU, beside plain loops of torch."""
    if "epoch" in config.parts and config.images is None:
        raise UsageError("--images: epochs need the photographs that --data was packed from; or give --parts step")
    header = {"benchmark": "cpu_training", "command": command(), "tunables": os.environ.get("GLIBC_TUNABLES")}
    results = Results(config.json, header | {"settings": {key: str(value) for key, value in asdict(config).items()}})
    if "step" in config.parts:
        keep_freed_memory()  # as the command does; the sides of epochs have processes of their own
        results.found["step"] = []
        for resolution, threads, batch in itertools.product(config.resolutions, threads_of(config), config.batches):
            steps(config, resolution, threads, batch, results)
    if "epoch" in config.parts:
        results.found["epoch"] = []
        for resolution in config.resolutions:
            epochs(config, resolution, results)


def threads_of(config: CpuTraining) -> Sequence[int]:
    cores = len(os.sched_getaffinity(0))
    return config.threads or sorted({cores, max(1, cores - 1)}, reverse=True)


def rounds(sides: dict[str, Callable[[], float]], number: int) -> Iterator[tuple[str, float]]:
    """Each side's number of each round, as soon as it is there; every other round goes backwards."""
    for each in range(number):
        for name in list(sides) if each % 2 == 0 else list(reversed(sides)):
            if name in sides:  # still
                time.sleep(PAUSE)
                yield name, sides[name]()


def steps(config: CpuTraining, resolution: int, threads: int, batch: int, results: Results) -> None:
    """Images/s of one step on one batch, in every form."""
    case: dict[str, Any] = {"resolution": resolution, "threads": threads, "batch": batch, "compile_s": {}, "failed": {}}
    case |= {"rates": {}, "images_per_second": {}}
    results.found["step"].append(case)
    sides: dict[str, Callable[[], float]] = {}
    torch.compiler.reset()  # dynamo gives up on a function that it has compiled eight times
    with torch_threads(threads):
        for memory_format, precision, mode in itertools.product(FORMATS, PRECISIONS, config.modes):
            compiled = "default" if mode == "compiled" else None
            step = TrainingStep(config.arch, batch, resolution, CPU, compiled, memory_format, PRECISIONS[precision])
            name = f"{memory_format}, {precision}, {mode}"
            try:
                seconds = step.warm_up()
            except Exception as error:  # without a compiler, say
                case["failed"][name] = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
                continue
            if compiled:
                case["compile_s"][name] = seconds
            sides[name] = partial(step_rate, step, config.seconds)
        for name, rate in rounds(sides, config.rounds):
            case["rates"].setdefault(name, []).append(rate)
            case["images_per_second"] = {side: spread(rates) for side, rates in case["rates"].items()}
            results.keep()
    title = f"\nstep of {config.arch}, {resolution} px, batch {batch}, {threads} threads (images/s)"
    results.keep("\n".join([title, *table(case), *(f"  compiled in {s:.1f} s: {name}" for name, s in case["compile_s"].items())]))


@contextmanager
def torch_threads(number: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def step_rate(step: TrainingStep, seconds: float) -> float:
    """Images/s of steps for so many seconds, after one that is not counted."""
    images, labels = step.random_batch()
    step(images, labels)
    started, done = time.perf_counter(), 0
    while done == 0 or time.perf_counter() - started < seconds:
        step(images, labels)
        done += 1
    return done * len(labels) / (time.perf_counter() - started)


def epochs(config: CpuTraining, resolution: int, results: Results) -> None:
    """Images/s of whole epochs of every side, and of fastretina's by each plain loop's, round by round."""
    case: dict[str, Any] = {"resolution": resolution, "batch_size": config.batch_size, "sides": {}, "failed": {}}
    case |= {"rates": {}, "images_per_second": {}}
    results.found["epoch"].append(case)
    task = EpochTask(str(config.data), str(config.images), config.arch, resolution, config.batch_size)
    script = str(Path(__file__).with_name("cpu_training_side.py"))
    with ExitStack() as stack:
        sides: dict[str, Callable[[], float]] = {}

        def rate(name: str, process: SideProcess) -> float:
            try:
                answer = process.ask("epoch")
            except RuntimeError as error:
                fail(name, error)
                return 0.0
            return float(answer["images"] / answer["seconds"])

        def fail(name: str, error: RuntimeError) -> None:
            case["failed"][name] = str(error)[-500:]
            sides.pop(name, None)
            case["rates"].pop(name, None)

        for name in config.sides:
            try:
                process = SideProcess(name, task, config.patience, script)
            except RuntimeError as error:
                fail(name, error)
                continue
            stack.callback(process.close)
            case["sides"][name] = process.ready
            sides[name] = partial(rate, name, process)
        for name, found in rounds(sides, config.rounds):
            if name in sides:
                case["rates"].setdefault(name, []).append(found)
            case |= compared(case["rates"])
            results.keep()
    results.keep("\n".join([f"\nepochs of {config.arch}, {resolution} px, batch {config.batch_size} (images/s)", *table(case)]))


def compared(rates: dict[str, list[float]]) -> dict[str, Any]:
    """Medians and ranges by side; and of fastretina's --amp by each plain loop, round by round, the fastest of which is named."""
    found: dict[str, Any] = {"images_per_second": {name: spread(each) for name, each in rates.items()}}
    plain = {name: each for name, each in rates.items() if not name.startswith("fastretina")}
    if OURS in rates and plain:
        # A round that is under way lacks some of its sides.
        pairs = {name: list(zip(rates[OURS], each, strict=False)) for name, each in plain.items()}
        found["times_plain"] = {name: spread([ours / theirs for ours, theirs in each]) for name, each in pairs.items()}
        found["fastest_plain"] = max(plain, key=lambda name: found["images_per_second"][name]["median"])
        found["times_the_fastest_plain"] = found["times_plain"][found["fastest_plain"]]
    return found


def table(case: dict[str, Any]) -> list[str]:
    """A line for each side."""
    lines = []
    for name, rate in case["images_per_second"].items():
        line = f"  {name:<36} {rate['median']:8.1f}  ({rate['least']:.1f}-{rate['most']:.1f})"
        if ratio := case.get("times_plain", {}).get(name):
            line += f"  fastretina {ratio['median']:.2f} times ({ratio['least']:.2f}-{ratio['most']:.2f})"
        lines.append(line + "  <- fastest plain loop" * (name == case.get("fastest_plain")))
    return lines + [f"  {name}: left out: {reason.splitlines()[-1]}" for name, reason in case["failed"].items()]


if __name__ == "__main__":
    run(CpuTraining, main)
