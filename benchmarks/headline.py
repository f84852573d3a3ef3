"""What this project is about in one number: images/s of training a ResNet, and how near real data come to data that cost nothing.

    python benchmarks/headline.py --arch resnet18 --budget 150 --data train.beton --json out.json

All sides share one process, one model, one compiled step and cuDNN's one choice of kernels, and take turns, round by round:
"clone" (a few real batches in rotation), "resident", "cpu-decode" and "gpu-decode" (the Loader, rotation and flips on).

Made for a machine that is rarely to be had and may be taken away at any moment. First of all come steps on random images, so that
there is a number; a line is printed after the JSON holds what it says; the same command goes on from what the JSON has. A side that
raises is left out; for one that hangs a watchdog ends the process with 4, and the next call leaves it out. Several batch sizes,
modes of torch.compile and memory formats: the first of each together, then every other one in the first's place.

--device cpu rehearses it (with TRITON_INTERPRET=1, --modes off and --decoder nvimgcodec); its numbers say nothing.
"""

from __future__ import annotations

import gc
import itertools
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from measure import FATAL, Journal, OutOfBudget, brief, roof, summary
from training_step import LOADERS, Source, TrainingStep, clones_of, one_round, open_loader, random_images

from fastretina.cli import run
from fastretina.models.precision import choose_device

UNTIMED = 10  # steps of each side before those of a round: they use up what its loader has made in the pause
EAGER_STEPS = 50
STEPS = {"resnet18": 150, "resnet50": 80}
Side = Literal["clone", "resident", "cpu-decode", "gpu-decode"]
Mode = Literal["default", "off", "reduce-overhead", "max-autotune-no-cudagraphs"]


@dataclass(frozen=True)
class Headline:
    """Training of one ResNet on real data beside the same on data that cost nothing."""

    json: Path
    """Where the results are, after every round; and where an earlier call of the same settings left off."""
    arch: Literal["resnet18", "resnet50"] = "resnet18"
    budget: float = 300.0
    """Seconds from the process's start; no round begins that would end later."""
    data: Path = Path("data/train.beton")
    """The .beton to train on. It may still be in the making."""
    wait_for_data: float = 120.0
    """Seconds from the process's start; then it does without."""
    device: Literal["cpu", "cuda"] = "cuda"
    batch_size: tuple[int, ...] = (128,)
    modes: tuple[Mode, ...] = ("default",)
    """Of torch.compile; off: eager, which is also what takes the place of a mode that fails."""
    memory_format: tuple[Literal["channels_last", "contiguous"], ...] = ("channels_last",)
    plain_stem: bool = False
    """torchvision's own first convolution and pooling (see fastretina/models/stem.py)."""
    sides: tuple[Side, ...] = ("clone", "resident", "cpu-decode", "gpu-decode")
    decoder: str | None = None
    """Which decoder the side gpu-decode uses; default: the Loader's choice."""
    resolution: int = 512
    """px"""
    rounds: int = 3
    steps: int = 0
    """Timed steps of a side in a round, after at most ten untimed ones; 0: 150 of a ResNet18, 80 of a ResNet50."""
    deadline: float = 25.0
    """Seconds of a side's round, after which the steps that it has made count, if there are 20."""
    open_deadline: float = 60.0
    """Seconds until a side's loader has filled its memory and made a batch."""
    compile_deadline: float = 240.0
    """Seconds."""
    grace: float = 20.0
    """Seconds past a deadline at which a side is thought to hang."""


class Measurement:
    """What is measured, in order."""

    def __init__(self, config: Headline) -> None:
        self.config, self.device = config, choose_device(config.device)
        settings = {key: value for key, value in asdict(config).items() if key not in ("json", "budget", "wait_for_data")}
        self.journal = Journal(config.json, "headline", settings, config.budget, config.grace)
        self.result = self.journal.result
        self.cases: dict[str, dict[str, Any]] = self.result.setdefault("cases", {})
        self.steps = config.steps or STEPS[config.arch]
        self.untimed = min(UNTIMED, self.steps)

    def all(self) -> int:
        """Everything that there is time for; the exit code."""
        where = self.result["hardware"].get("gpu", self.result["hardware"]["cpu"])
        self.journal.report(f"{self.config.arch} on {where}, process {self.result['processes']}")
        try:
            self.before()
            for size, mode, memory_format in self.combinations():
                self.case(size, mode, memory_format)
            self.result["ended"] = "complete"
        except OutOfBudget:
            self.result["ended"] = "budget"
        self.journal.report(f"ended: {self.result['ended']}")
        return 0 if self.result["ended"] == "budget" or any(case["sides"] for case in self.cases.values()) else 1

    def combinations(self) -> Iterator[tuple[int, str, str]]:
        """Batch size, mode and memory format: the first of each, then every other one in its place."""
        config = self.config
        size, mode, memory_format = config.batch_size[0], config.modes[0], config.memory_format[0]
        yield size, mode, memory_format
        slow = [other for other in config.modes[1:] if other.startswith("max-autotune")]  # minutes of compiling: last
        yield from ((size, other, memory_format) for other in config.modes[1:] if other not in slow)
        yield from ((other, mode, memory_format) for other in config.batch_size[1:])
        yield from ((size, mode, other) for other in config.memory_format[1:])
        yield from ((size, other, memory_format) for other in slow)

    def step(self, size: int, mode: str = "off", memory_format: str = "channels_last") -> TrainingStep:
        """A new model, not compiled yet."""
        compiled = None if mode == "off" else mode
        config = self.config
        return TrainingStep(
            config.arch, size, config.resolution, self.device, compiled, memory_format, plain_stem=config.plain_stem
        )  # fmt: skip

    def before(self) -> None:
        """Eager steps on random images, so that there is a number; then what shares are told of."""
        failed, size, seconds = self.result.setdefault("failed", {}), self.config.batch_size[0], self.config.open_deadline

        def eager() -> dict[str, Any]:
            step = self.step(size)
            source = Source(itertools.repeat(step.random_batch()), "one random batch")
            return one_round(step, source, self.untimed, min(EAGER_STEPS, self.steps), seconds) | {"batch_size": size}

        parts: dict[str, Callable[[], Any]] = {
            "eager": eager, "roof": lambda: roof(self.device, 3), "gflop_per_image": lambda: self.step(1).flops() / 1e9
        }  # fmt: skip
        for part, work in parts.items():
            if part not in self.result and (found := self.journal.attempt(failed, "before", part, seconds, work)):
                self.result[part] = found
                shown = f"batch {size}, random images: {found['per_second']:,.1f} images/s" if part == "eager" else brief(found)
                self.journal.report(f"{part}: {shown}")

    def case(self, size: int, mode: str, memory_format: str) -> None:
        """All rounds of one batch size, mode and memory format. Where the mode fails, eager steps take its place."""
        name = f"batch {size}, {mode}, {memory_format}"
        if name not in self.cases:
            known = {
                part: reason
                for other in self.cases.values()
                for part, reason in other["failed"].items()
                if reason.startswith(FATAL) and (part in LOADERS or (part == "compile" and other["mode"] == mode))
            }
            self.cases[name] = {"batch_size": size, "mode": mode, "memory_format": memory_format, "compile_s": [], "failed": known}
            self.cases[name] |= {"opened": {}, "sides": {}}
        case, config = self.cases[name], self.config
        if "compile" not in case["failed"] and not self.wanting(case):
            return
        torch.compiler.reset()  # dynamo gives up on a function that it has compiled eight times
        gc.collect()  # the case before, with what it had compiled and recorded
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        seconds = [seconds for other in self.cases.values() for seconds in other["compile_s"]]
        self.journal.spend(max(seconds, default=10.0) if mode != "off" else 5.0)

        def compiled() -> TrainingStep:
            step = self.step(size, mode, memory_format)
            took = step.warm_up()
            if mode != "off":
                case["compile_s"].append(took)
                self.journal.report(f"{name}: compiled in {took:.1f} s")
            return step

        step = self.journal.attempt(case["failed"], name, "compile", config.compile_deadline, compiled)
        if step is None:
            if mode != "off":
                self.case(size, "off", memory_format)
            return
        while not config.data.exists() and self.journal.age < min(config.wait_for_data, config.budget):
            time.sleep(0.2)
        sources: dict[str, Source] = {}
        try:
            self.open(name, step, sources)
            for number in range(config.rounds):
                for side in config.sides if number % 2 == 0 else reversed(config.sides):
                    if side in self.wanting(case) and len(case["sides"].get(side, [])) == number:
                        self.round(name, step, sources, side)
        finally:
            for opened in list(sources):
                self.close(name, opened, sources)

    def wanting(self, case: dict[str, Any]) -> list[Side]:
        """The sides that still have a round to go."""
        return [
            side
            for side in self.config.sides
            if side not in case["failed"] and len(case["sides"].get(side, [])) < self.config.rounds
        ]

    def open(self, name: str, step: TrainingStep, sources: dict[str, Source]) -> None:
        """The loaders of the sides that need them, and the batches that one of them gives the clones."""
        case = self.cases[name]
        settings = self.config.data, case["batch_size"], self.config.resolution, self.device, step.dtype, self.config.decoder

        def clones() -> Source:
            try:
                if sources:
                    return clones_of(next(iter(sources.values())), step)
                source = open_loader("cpu-decode", *settings)
                try:
                    return clones_of(source, step)
                finally:
                    source.close()
            except Exception as error:
                return random_images(step, f"{type(error).__name__}: {error}")

        for side in [side for side in (*LOADERS, "clone") if side in self.wanting(case)]:
            self.journal.spend(5.0)
            began = time.perf_counter()
            work = partial(open_loader, side, *settings) if side in LOADERS else clones
            source = self.journal.attempt(case["failed"], name, side, self.config.open_deadline, work)
            if source is not None:
                sources[side] = source
                case["opened"][side] = {"seconds": time.perf_counter() - began, "source": source.description}
                self.journal.report(f"{name}: {side} ready in {time.perf_counter() - began:.1f} s: {source.description}")

    def close(self, name: str, side: str, sources: dict[str, Source]) -> None:
        self.journal.attempt({}, name, f"the end of {side}", 10.0, sources.pop(side).close)

    def round(self, name: str, step: TrainingStep, sources: dict[str, Source], side: str) -> None:
        """One side's next round."""
        case, seconds = self.cases[name], self.config.deadline
        records: dict[str, list[dict[str, Any]]] = case["sides"]
        took = [record["took_s"] for record in records.get(side) or itertools.chain.from_iterable(records.values())]
        if not took and "eager" in self.result:
            took = [(self.untimed + self.steps) * case["batch_size"] / self.result["eager"]["per_second"]]
        self.journal.spend(min(1.1 * max(took, default=0.0) + 1.0, seconds))
        work = partial(one_round, step, sources[side], self.untimed, self.steps, seconds)
        found = self.journal.attempt(case["failed"], name, side, seconds, work)
        if found is None:
            if "resident" in sources and case["failed"][side].startswith("OutOfMemoryError") and side != "resident":
                # The model comes first: the others go on without what is resident.
                self.journal.drop(case["failed"], f"{name}, resident", "resident", f"{side}: {case['failed'].pop(side)}")
                self.close(name, "resident", sources)
                self.round(name, step, sources, side)
            else:
                self.close(name, side, sources)
            return
        number = len(records.get(side, [])) + 1
        records.setdefault(side, []).append({"round": number, "process": self.result["processes"]} | found)
        case |= conclude(records, self.result)
        line = f"{name}: round {number}, {side}: {found['per_second']:,.1f} images/s"
        if "idle_s" in found:
            line += f", waits {found['idle_s'] / found['seconds']:.2%} of the time"
        self.journal.report(line)


def conclude(records: dict[str, list[dict[str, Any]]], result: dict[str, Any]) -> dict[str, Any]:
    """Medians by side, and what real data reach of what clones do, round by round, where one process measured both."""
    found: dict[str, Any] = {"per_second": {}, "tflops": {}, "share_of_matmul_roof": {}, "ratios": {}}
    clones = {(record["round"], record["process"]): record["per_second"] for record in records.get("clone", [])}
    for side, rounds in records.items():
        found["per_second"][side] = throughput = summary([record["per_second"] for record in rounds])
        if "gflop_per_image" in result:
            found["tflops"][side] = tflops = throughput["median"] * result["gflop_per_image"] / 1e3
            if "roof" in result:
                found["share_of_matmul_roof"][side] = tflops / result["roof"]["matmul_tflops"]["median"]
        keys = [(record["round"], record["process"]) for record in rounds]
        pairs = [record["per_second"] / clones[key] for record, key in zip(rounds, keys, strict=True) if key in clones]
        if side != "clone" and pairs:
            found["ratios"][f"{side} / clone"] = summary(pairs)
    return found


def main(config: Headline) -> int:
    """Training of one ResNet on real data beside the same on data that cost nothing."""
    return Measurement(config).all()


if __name__ == "__main__":
    run(Headline, main)
