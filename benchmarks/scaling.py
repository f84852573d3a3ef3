"""What training would reach on 1 to 1,000 GPUs: costs measured here, a small model, and the model checked where it can be.

    python benchmarks/scaling.py --data data/train.beton --json out.json

Measured: CPU-seconds and bytes of an image, a step and its all-reduce for 1, 2 and 4 ranks of this machine. Checked: the rate that
the model predicts from those against training steps of the ranks, and of ranks in network namespaces whose links are limited (needs
root and Debian's iproute2; left out with a reason elsewhere). Estimated: everything about GPUs. docs/scaling.md explains it.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from measure import save
from scaling_model import Cluster, ImageCosts, all_reduce_seconds, epoch_hours_and_price, predict
from scaling_rank import MARK, RankTask, Timings

from fastretina.beton.reader import Beton
from fastretina.cli import run
from fastretina.errors import RunError, UsageError
from fastretina.loading.loader import Loader
from fastretina.models.precision import choose_device, device_name
from fastretina.models.resnet import build_model

RANKS = (1, 2, 4)
GPUS = (1, 8, 64, 256, 1000)
IMAGES = (10**5, 10**6, 10**7, 10**8, 10**9)
FULL_SIZE = 512  # px, of the training that is predicted
GOODPUT = 0.95  # of an Ethernet link's bits that are data: 1,448 of each 1,514 bytes at most
PORT = 29_541
# Estimates. Steps: bfloat16, channels-last, from an H100's memory roof, which plain PyTorch should come near to. Links: 400 Gbit/s
# network cards, one for each GPU, at 80 %. Storage: local NVMe. Price: what clouds ask for an H100 in 2026, US dollars.
H100_STEP_RATES = {"resnet18": 3000.0, "resnet50": 800.0}  # images/s
H100_RANK_BATCH = 64
H100_HOST = Cluster(ranks_per_host=8, cores=128, storage_bytes_s=4e9, link_bytes_s=40e9, latency_s=10e-6, hour_price=3.0)
GRADIENT_TYPE_BYTES = 4  # gradients are float32 under autocast too


@dataclass(frozen=True)
class ScalingBenchmark:
    """Costs of an image, the scale model, and its checks."""

    data: Path = Path("data/train.beton")
    """A .beton file."""
    json: Path | None = None
    """Where to write the results."""
    arch: str = "resnet18"
    resolution: int = 128
    """Of the steps that are measured here, px."""
    rank_batch: int = 8
    """Images a step and rank."""
    rounds: int = 5
    megabits: tuple[int, ...] = (200, 1000)
    """Rates of the limited links, Mbit/s."""


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
        """gathered: by rank and round, see scaling_rank."""

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


def decode_cpu_seconds(data: Path, resolution: int) -> float:
    """CPU-seconds to read, decode and augment an image on one thread: the median over five parts of an epoch."""
    found: list[float] = []
    with Loader(data, batch_size=32, resolution=resolution, workers=1) as loader:
        while len(found) < 5:
            batches = iter(loader)
            next(batches)
            cpu, images = time.process_time(), 0
            for batch in batches:
                images += len(batch.ids)
                if images >= 256:
                    break
            found.append((time.process_time() - cpu) / images)
    return statistics.median(found)


def ranks_here(config: ScalingBenchmark, ranks: int) -> Measured:
    """Start `ranks` ranks on this machine by torchrun."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    process = subprocess.Popen([*torchrun, *rank_command(config)], stdout=subprocess.PIPE, text=True, env=environment())
    return answer([process])


def rank_command(config: ScalingBenchmark) -> list[str]:
    """What one rank runs."""
    task = RankTask(config.arch, config.resolution, config.rank_batch, config.rounds)
    return [str(Path(__file__).with_name("scaling_rank.py")), str(config.data.resolve()), json.dumps(asdict(task))]


def environment(**more: str) -> dict[str, str]:
    """One thread for each rank: with more than there are cores they spin."""
    return {**os.environ, "OMP_NUM_THREADS": "1", **more}


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
    """Network namespaces `fastretina0`, ... as hosts on one switch, each with a link of this rate each way: 10.77.0.1, ..."""
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


def ranks_apart(config: ScalingBenchmark, ranks: int, megabits: int) -> Measured:
    """Start a rank in each of `ranks` namespaces."""
    with namespaces(ranks, megabits) as names:
        shared = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "10.77.0.1", "MASTER_PORT": str(PORT), "GLOO_SOCKET_IFNAME": "eth0"}
        processes = [
            subprocess.Popen(
                ["ip", "netns", "exec", name, sys.executable, *rank_command(config)], stdout=subprocess.PIPE, text=True,
                env=environment(**shared, RANK=str(rank), LOCAL_RANK="0"),
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


def check(measured: Measured, costs: ImageCosts, link_bytes_s: float, rank_batch: int, gradient_bytes: float) -> dict[str, Any]:
    """The rate from the costs of one rank beside the measured one. All ranks are on this machine, whatever their links."""
    images = measured.ranks * rank_batch
    cluster = Cluster(measured.ranks, measured.cores, math.inf, link_bytes_s, 0.0)
    prediction = predict(costs, cluster, measured.ranks, rank_batch, gradient_bytes)
    rate = images / measured.train_s
    return {
        "ranks": measured.ranks,
        "cores": measured.cores,
        "images_per_second": rate,
        "predicted": prediction.images_per_second,
        "error": prediction.images_per_second / rate - 1,
        "bottleneck": prediction.bottleneck,
        "limits": {name: limit for name, limit in prediction.limits.items() if limit != math.inf},
        "all_reduce_s": measured.all_reduce_s,
        "all_reduce_predicted_s": all_reduce_seconds(measured.ranks, gradient_bytes, cluster.link_bytes_s, cluster.latency_s),
    }


def h100_tables(sample_bytes: float, decode_cpu_s: float) -> list[dict[str, Any]]:
    """Rates, bottlenecks, hours and prices of an epoch for GPUS x IMAGES; estimates, but for what is passed."""
    rows = []
    for arch, rate in H100_STEP_RATES.items():
        gradients = GRADIENT_TYPE_BYTES * parameters(arch)
        for gpus in GPUS:
            prediction = predict(ImageCosts(sample_bytes, decode_cpu_s, 1 / rate), H100_HOST, gpus, H100_RANK_BATCH, gradients)
            epochs = {
                f"{images:.0e}": epoch_hours_and_price(prediction, H100_HOST, gpus, images)
                for images in IMAGES
                if images >= gpus * H100_RANK_BATCH
            }
            rows.append({"arch": arch, "gpus": gpus, **asdict(prediction), "epoch_hours_and_price": epochs})
    return rows


def parameters(arch: str) -> int:
    """Of the model with five outputs."""
    return sum(parameter.numel() for parameter in build_model(arch).parameters())


def main(config: ScalingBenchmark) -> None:
    """Costs of an image, the scale model, and its checks."""
    if not config.data.is_file():
        raise UsageError(f"{config.data}: no such file; make data makes it")
    torch.set_num_threads(1)
    load_before = os.getloadavg()[0]
    gradients = float(GRADIENT_TYPE_BYTES * parameters(config.arch))
    with Beton(config.data) as beton:
        sample_bytes = sum(len(beton.jpeg(index)) for index in range(len(beton))) / len(beton)
    decode_cpu_s = decode_cpu_seconds(config.data, config.resolution)
    print(f"image: {sample_bytes / 1e3:.1f} kB, {1e3 * decode_cpu_s:.2f} ms of a core for {config.resolution} px")

    here = {ranks: ranks_here(config, ranks) for ranks in RANKS}
    one, two = here[1], here[2]
    # Between ranks of one machine the link is its memory, and moving gradients takes CPU time, as a GPU's all-reduce does not.
    link = all_reduce_seconds(2, gradients, 1.0, 0.0) / two.all_reduce_s
    checks = []
    for ranks, measured in here.items():
        communication = two.all_reduce_cpu_s if ranks > 1 else 0.0
        # A rank computes on one thread: its step takes as long as its CPU time, where it has a core to itself.
        step = one.step_cpu_s / config.rank_batch
        costs = ImageCosts(sample_bytes, decode_cpu_s, step, step + communication / config.rank_batch)
        checks.append(check(measured, costs, link, config.rank_batch, gradients))
        show("here", checks[-1])

    reason = why_no_namespaces()
    apart = []
    for megabits in () if reason else config.megabits:
        for ranks in RANKS[1:]:
            link_bytes_s = megabits * 1e6 / 8 * GOODPUT
            measured = ranks_apart(config, ranks, megabits)
            apart.append({"megabits": megabits, **check(measured, costs, link_bytes_s, config.rank_batch, gradients)})
            show(f"{megabits} Mbit/s", apart[-1])
    if reason:
        print(f"limited links: not tried: {reason}")

    full_decode = decode_cpu_seconds(config.data, FULL_SIZE)
    table = h100_tables(sample_bytes, full_decode)
    for row in table:
        print(
            f"{row['arch']}, {row['gpus']:>5,} H100 (estimate): {row['images_per_second']:>12,.0f} img/s, {row['bottleneck']} bound"
        )
    result = {
        "benchmark": "scaling",
        "command": " ".join(["python", *sys.argv]),
        "image": {"bytes": sample_bytes, "decode_cpu_s": decode_cpu_s, f"decode_cpu_s_{FULL_SIZE}_px": full_decode},
        "gradient_bytes": gradients,
        "measured": [asdict(measured) for measured in here.values()],
        "link_bytes_s_between_ranks_here": link,
        "checks_here": checks,
        "checks_with_limited_links": apart or reason,
        "estimates": {
            "host": asdict(H100_HOST),
            "step_images_per_second": H100_STEP_RATES,
            "rank_batch": H100_RANK_BATCH,
            "table": table,
        },
        "device": device_name(choose_device("cpu")),
        "load_average": [load_before, os.getloadavg()[0]],
    }
    save(config.json, result)


def show(where: str, found: dict[str, Any]) -> None:
    """One line of a check."""
    print(
        f"{found['ranks']} ranks {where}: {found['images_per_second']:.1f} img/s, predicted {found['predicted']:.1f} "
        f"({100 * found['error']:+.0f} %, {found['bottleneck']} bound), all-reduce {1e3 * found['all_reduce_s']:.0f} ms, "
        f"predicted {1e3 * found['all_reduce_predicted_s']:.0f} ms",
        flush=True,
    )


if __name__ == "__main__":
    run(ScalingBenchmark, main)
