"""Ranks of this machine that take training steps, timed: started by torchrun, or each behind a limited link of its own.

Run by scaling.py, and by itself as one rank: `python scaling_ranks.py DATA TASK_JSON`, under torchrun or with its environment by
hand. Rank 0 then prints one line of JSON, after a mark.
"""

from __future__ import annotations

import json
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from measure import environment
from torch import nn

from fastretina.errors import RunError
from fastretina.loading.augment import Augment
from fastretina.loading.loader import Loader
from fastretina.models.resnet import build_model
from fastretina.training.distributed import World, joined, without_sum

PORT = 29_541
Timings = dict[str, dict[str, float]]  # of a round: kind of step, "wall" or "cpu", seconds
MARK = "\x1e"  # starts our line; torchrun's are passed over


@dataclass(frozen=True)
class RankTask:
    """arch, resolution (px), rank_batch (images): of the step. rounds: so often each kind of step is timed, in turn."""

    arch: str
    resolution: int
    rank_batch: int
    rounds: int


@dataclass(frozen=True)
class Measured:
    """Medians over rounds, for one number of ranks; of each round the slowest rank's wall time, the mean of their CPU time."""

    ranks: int
    step_s: float
    step_cpu_s: float
    all_reduce_s: float
    all_reduce_cpu_s: float
    train_s: float

    @classmethod
    def of(cls, gathered: list[list[Timings]]) -> Measured:
        """gathered: by rank and round, see `measure`."""

        def wall(kind: str) -> float:
            slowest: list[float] = [max(one[kind]["wall"] for one in together) for together in zip(*gathered, strict=True)]
            return statistics.median(slowest)

        def cpu(kind: str) -> float:
            return statistics.fmean(statistics.median(one[kind]["cpu"] for one in rank) for rank in gathered)

        return cls(len(gathered), wall("step"), cpu("step"), wall("all_reduce"), cpu("all_reduce"), wall("train"))

    @property
    def cores(self) -> float:
        """Cores that the ranks had while all of them computed: fewer than the machine's where others want some too."""
        return self.ranks * self.step_cpu_s / self.step_s


def ranks_here(data: Path, task: RankTask, ranks: int) -> Measured:
    """Start `ranks` ranks on this machine by torchrun."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    process = subprocess.Popen(
        [*torchrun, *rank_command(data, task)], stdout=subprocess.PIPE, text=True, env=environment(OMP_NUM_THREADS="1")
    )
    return answer([process])


def rank_command(data: Path, task: RankTask) -> list[str]:
    """What one rank runs."""
    return [__file__, str(data.resolve()), json.dumps(asdict(task))]


def answer(processes: list[subprocess.Popen[str]]) -> Measured:
    """What the first of these says, once all have ended."""
    try:
        outputs = [process.communicate(timeout=1800)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    if any(process.returncode for process in processes):
        raise RunError("a rank failed; the reason stands above")
    line = next(line for line in outputs[0].split("\n") if line.startswith(MARK))
    return Measured.of(json.loads(line[len(MARK) :]))


@contextmanager
def namespaces(count: int, megabits: int) -> Iterator[list[str]]:
    """Network namespaces `fastretina0`, ... as hosts on one switch, each with a link of so many Mbit/s each way: 10.77.0.1, ..."""
    names = [f"fastretina{number}" for number in range(count)]

    def call(*command: str) -> None:
        subprocess.run(command, check=True, capture_output=True, text=True)

    try:
        call("ip", "link", "add", "fastretina-sw", "type", "bridge")
        call("ip", "link", "set", "fastretina-sw", "up")
        for number, name in enumerate(names):
            call("ip", "netns", "add", name)
            call("ip", "link", "add", f"frsw{number}", "type", "veth", "peer", "name", "eth0", "netns", name)
            call("ip", "link", "set", f"frsw{number}", "master", "fastretina-sw", "up")
            call("ip", "-n", name, "addr", "add", f"10.77.0.{number + 1}/24", "dev", "eth0")
            call("ip", "-n", name, "link", "set", "eth0", "up")
            call("ip", "-n", name, "link", "set", "lo", "up")
            limit = ("root", "tbf", "rate", f"{megabits}mbit", "burst", "256kb", "latency", "100ms")
            call("tc", "qdisc", "add", "dev", f"frsw{number}", *limit)
            call("tc", "-n", name, "qdisc", "add", "dev", "eth0", *limit)
        yield names
    finally:
        for number, name in enumerate(names):
            # A namespace takes its links along only some time after it is gone, and their names would still be taken.
            subprocess.run(["ip", "link", "del", f"frsw{number}"], capture_output=True)
            subprocess.run(["ip", "netns", "del", name], capture_output=True)
        subprocess.run(["ip", "link", "del", "fastretina-sw"], capture_output=True)


def ranks_apart(data: Path, task: RankTask, ranks: int, megabits: int) -> Measured:
    """Start a rank in each of `ranks` namespaces."""
    with namespaces(ranks, megabits) as names:
        shared = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "10.77.0.1", "MASTER_PORT": str(PORT), "GLOO_SOCKET_IFNAME": "eth0"}
        processes = [
            subprocess.Popen(
                ["ip", "netns", "exec", name, sys.executable, *rank_command(data, task)], stdout=subprocess.PIPE, text=True,
                env=environment(OMP_NUM_THREADS="1", **shared, RANK=str(rank), LOCAL_RANK="0"),
            )
            for rank, name in enumerate(names)
        ]  # fmt: skip
        return answer(processes)


def why_no_namespaces() -> str | None:
    """The reason why namespaces cannot be tried here, if they cannot."""
    if not (shutil.which("ip") and shutil.which("tc")):
        return "needs ip and tc: apt-get install iproute2"
    try:
        with namespaces(1, 100):
            return None
    except subprocess.CalledProcessError as error:
        return f"needs root and network namespaces: {error.stderr.strip()}"


def timed(work: Callable[[], object], world: World) -> dict[str, float]:
    """Wall seconds, from when all ranks begin to when this one is done, and CPU seconds of this process with all its threads."""
    world.largest(0)
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    return {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}


def measure(task: RankTask, data: Path, world: World) -> list[Timings]:
    """Rounds of: a step without its all-reduce, the all-reduce alone, loading alone, and a training step with all three."""
    torch.manual_seed(0)
    model = build_model(task.arch)
    forward = world.wrap(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, fused=True)
    gradients = torch.zeros(sum(parameter.numel() for parameter in model.parameters()))
    # Decoded anew each time, as in an epoch of a data set that does not fit memory.
    with Loader(
        data, task.rank_batch * world.size, resolution=task.resolution, workers=1, augment=Augment(), rank=world.rank,
        world_size=world.size, drop_last=True,
    ) as loader:  # fmt: skip

        def endless() -> Any:
            while True:
                yield from loader

        batches = endless()
        fixed = next(batches)

        def step(batch: Any, context: Any) -> None:
            with context:
                loss = nn.functional.cross_entropy(forward(batch.images), batch.labels)
                optimizer.zero_grad(set_to_none=True)
                torch.autograd.backward(loss)
            optimizer.step()

        kinds: dict[str, Callable[[], object]] = {
            "step": lambda: step(fixed, without_sum(forward)),
            "all_reduce": lambda: world.sum(gradients)(),
            "train": lambda: step(next(batches), without_sum(None)),
        }
        for work in kinds.values():
            work()
        found = []
        for _ in range(task.rounds):
            taken = {name: timed(work, world) for name, work in kinds.items()}
            # The loader works ahead while others are timed: a training step in a row of its own finds no batch ready but what it
            # has loaded itself.
            taken["train"] = mean_of_row(kinds["train"], world)
            found.append(taken)
    return found


def mean_of_row(work: Callable[[], object], world: World, warm: int = 3, counted: int = 4) -> dict[str, float]:
    """Mean seconds of `counted` steps after `warm` that empty the loader's store of batches."""
    for _ in range(warm):
        work()
    taken = [timed(work, world) for _ in range(counted)]
    return {key: statistics.fmean(part[key] for part in taken) for key in taken[0]}


def main() -> None:
    torch.set_num_threads(1)
    with joined("cpu") as world:
        rounds = world.gather(measure(RankTask(**json.loads(sys.argv[2])), Path(sys.argv[1]), world))
        if world.is_main:
            print(MARK + json.dumps(rounds), flush=True)


if __name__ == "__main__":
    main()
