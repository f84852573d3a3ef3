"""How fast a training run can be on so many GPUs, from what an image costs each resource: bottleneck analysis.

In the long run no resource works for longer than the time that passes: images/s <= 1 / the largest demand, where a resource's
demand is the seconds it works for one image (Denning and Buzen, The operational analysis of queueing network models, ACM Computing
Surveys 10(3), 1978). The model takes the bound for the rate, as if storage, decoding and steps overlapped completely, which
prefetching comes near to. Within a step the all-reduce overlaps with the backward pass alone: no forward pass can begin before it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

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
