"""What training would reach on 1 to 1,000 GPUs: costs measured here, a small model, and the model checked where it can be.

    python benchmarks/scaling.py --data data/train.beton --json out.json

Measured: CPU-seconds and bytes of an image, a step and its all-reduce for 1, 2 and 4 ranks of this machine. Checked: the throughput
that the model predicts from those against training steps of the ranks, and of ranks in network namespaces whose links are limited
(needs root and Debian's iproute2; left out with a reason elsewhere). Estimated: everything about GPUs. docs/scaling.md explains it.

The model is bottleneck analysis. In the long run no resource works for longer than the time that passes: images/s <= 1 / the
largest demand, where a resource's demand is the seconds it works for one image (Denning and Buzen, The operational analysis of
queueing network models, ACM Computing Surveys 10(3), 1978). The bound is taken for the throughput, as if storage, decoding and
steps overlapped completely, which prefetching comes near to. Within a step the all-reduce overlaps with the backward pass alone: no
forward pass can begin before it.
"""

from __future__ import annotations

import math
import os
import statistics
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from measure import command, save
from scaling_ranks import Measured, RankTask, ranks_apart, ranks_here, why_no_namespaces

from fastretina.beton.reader import Beton
from fastretina.cli import run
from fastretina.errors import UsageError
from fastretina.loading.loader import Loader
from fastretina.models.precision import choose_device, device_name
from fastretina.models.resnet import build_model

RANKS = (1, 2, 4)
GPUS = (1, 8, 64, 256, 1000)
IMAGES = (10**5, 10**6, 10**7, 10**8, 10**9)
FULL_SIZE = 512  # px, of the training that is predicted
GOODPUT = 0.95  # of an Ethernet link's bits that are data: 1,448 of each 1,514 bytes at most
FORWARD_SHARE = 1 / 3  # of a step: the backward pass has two products for each of the forward pass


@dataclass(frozen=True)
class ImageCosts:
    """What one training image costs.

    bytes: read from storage. decode_cpu_s: CPU-seconds to decode and augment it. step_s: seconds of one GPU (or of one rank's CPU
    threads) for forward, backward and its share of the optimizer. step_cpu_s: CPU-seconds of the same; 0 on a GPU.
    """

    bytes: float
    decode_cpu_s: float
    step_s: float
    step_cpu_s: float = 0.0


@dataclass(frozen=True)
class Cluster:
    """What there is to work with.

    storage_bytes_s, cores: of a host. ranks_per_host: one for each GPU. link_bytes_s: of one rank to the next, each way at once.
    latency_s: of one message. hour_price: of one GPU with its part of the host.
    """

    ranks_per_host: int
    cores: float
    storage_bytes_s: float
    link_bytes_s: float
    latency_s: float
    hour_price: float = 0.0


@dataclass(frozen=True)
class Prediction:
    """images_per_second of all ranks; bottleneck: the resource whose demand bounds it; limits: what each would allow, images/s."""

    images_per_second: float
    bottleneck: str
    limits: dict[str, float]


# Estimates. Steps: bfloat16, channels-last, from an H100's memory roof, which plain PyTorch should come near to. Links: 400 Gbit/s
# network cards, one for each GPU, at 80 %. Storage: local NVMe. Price: what clouds ask for an H100 in 2026, US dollars.
H100_STEPS = {"resnet18": 3000.0, "resnet50": 800.0}  # images/s
H100_RANK_BATCH = 64
H100_HOST = Cluster(ranks_per_host=8, cores=128, storage_bytes_s=4e9, link_bytes_s=40e9, latency_s=10e-6, hour_price=3.0)
GRADIENT_TYPE_BYTES = 4  # gradients are float32 under autocast too


def all_reduce_seconds(ranks: int, gradient_bytes: float, link_bytes_s: float, latency_s: float) -> float:
    """The faster of ring and tree.

    Ring: 2 (N - 1) messages of 1/N of the gradients, all links at once (Patarasuk and Yuan, Bandwidth optimal all-reduce
    algorithms, JPDC 69(2), 2009). Tree: all of them up and down again, in small pieces (NCCL's choice for many ranks).
    """
    if ranks == 1:
        return 0.0
    hops = 2 * (ranks - 1)
    ring = hops / ranks * gradient_bytes / link_bytes_s + hops * latency_s
    tree = 2 * gradient_bytes / link_bytes_s + 2 * math.ceil(math.log2(ranks)) * latency_s
    return min(ring, tree)


def predict(costs: ImageCosts, cluster: Cluster, ranks: int, rank_batch: int, gradient_bytes: float) -> Prediction:
    """The bound for `ranks` ranks that take steps of `rank_batch` images each."""
    hosts = -(-ranks // cluster.ranks_per_host)
    all_reduce = all_reduce_seconds(ranks, gradient_bytes, cluster.link_bytes_s, cluster.latency_s)
    forward, backward = (share * costs.step_s * rank_batch for share in (FORWARD_SHARE, 1 - FORWARD_SHARE))
    limits = {
        "storage": hosts * cluster.storage_bytes_s / costs.bytes,
        "cpu": hosts * cluster.cores / (costs.decode_cpu_s + costs.step_cpu_s),
        "step": ranks * rank_batch / (forward + backward),
        "all-reduce": ranks * rank_batch / (forward + max(backward, all_reduce)),
    }
    bottleneck = min(limits, key=lambda name: limits[name])  # step where the all-reduce takes no longer than the backward pass
    return Prediction(limits[bottleneck], bottleneck, limits)


def epoch_hours_and_price(prediction: Prediction, cluster: Cluster, ranks: int, images: int) -> tuple[float, float]:
    """Hours that one epoch takes, and its price in the currency of `hour_price`."""
    hours = images / prediction.images_per_second / 3600
    return hours, hours * ranks * cluster.hour_price


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
    """Of the limited links, Mbit/s."""


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


def check(measured: Measured, costs: ImageCosts, link_bytes_s: float, rank_batch: int, gradient_bytes: float) -> dict[str, Any]:
    """The throughput from the costs of one rank beside the measured one. All ranks are on this machine, whatever their links."""
    images = measured.ranks * rank_batch
    cluster = Cluster(measured.ranks, measured.cores, math.inf, link_bytes_s, 0.0)
    prediction = predict(costs, cluster, measured.ranks, rank_batch, gradient_bytes)
    throughput = images / measured.train_s
    return {
        "ranks": measured.ranks,
        "cores": measured.cores,
        "images_per_second": throughput,
        "predicted": prediction.images_per_second,
        "error": prediction.images_per_second / throughput - 1,
        "bottleneck": prediction.bottleneck,
        "limits": {name: limit for name, limit in prediction.limits.items() if limit != math.inf},
        "all_reduce_s": measured.all_reduce_s,
        "all_reduce_predicted_s": all_reduce_seconds(measured.ranks, gradient_bytes, cluster.link_bytes_s, cluster.latency_s),
    }


def h100_tables(sample_bytes: float, decode_cpu_s: float) -> list[dict[str, Any]]:
    """Throughput, bottlenecks, hours and prices of an epoch for GPUS x IMAGES; estimates, but for what is passed."""
    rows = []
    for arch, throughput in H100_STEPS.items():
        gradients = GRADIENT_TYPE_BYTES * parameters(arch)
        for gpus in GPUS:
            costs = ImageCosts(sample_bytes, decode_cpu_s, 1 / throughput)
            prediction = predict(costs, H100_HOST, gpus, H100_RANK_BATCH, gradients)
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

    task = RankTask(config.arch, config.resolution, config.rank_batch, config.rounds)
    here = {ranks: ranks_here(config.data, task, ranks) for ranks in RANKS}
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
            measured = ranks_apart(config.data, task, ranks, megabits)
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
        "command": command(),
        "image": {"bytes": sample_bytes, "decode_cpu_s": decode_cpu_s, f"decode_cpu_s_{FULL_SIZE}_px": full_decode},
        "gradient_bytes": gradients,
        "measured": [asdict(measured) for measured in here.values()],
        "link_bytes_s_between_ranks_here": link,
        "checks_here": checks,
        "checks_with_limited_links": apart or reason,
        "estimates": {
            "host": asdict(H100_HOST),
            "step_images_per_second": H100_STEPS,
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
