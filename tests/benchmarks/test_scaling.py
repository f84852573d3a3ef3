"""The scale model: worked by hand, and bounded by whatever is scarcest."""

from __future__ import annotations

from dataclasses import replace

import pytest
from scaling import Cluster, ImageCosts, all_reduce_seconds, epoch_hours_and_price, predict

COSTS = ImageCosts(bytes=50_000, decode_cpu_s=1e-3, step_s=1 / 1000)
HOSTS = Cluster(ranks_per_host=8, cores=64, storage_bytes_s=2e9, link_bytes_s=10e9, latency_s=1e-5, hour_price=2.0)
GRADIENTS = 100e6


def test_one_gpu_is_as_fast_as_its_steps_and_exchanges_nothing():
    found = predict(COSTS, HOSTS, ranks=1, rank_batch=32, gradient_bytes=GRADIENTS)
    assert (found.images_per_second, found.bottleneck) == (1000, "step")
    assert found.limits["storage"] == 40_000
    assert found.limits["cpu"] == 64_000


@pytest.mark.parametrize(
    ("change", "bottleneck", "throughput"),
    [
        ({"storage_bytes_s": 100e6}, "storage", 2 * 100e6 / 50_000),
        ({"cores": 4.0}, "cpu", 2 * 4 / 1e-3),
        ({"link_bytes_s": 1e9, "latency_s": 0.0}, "all-reduce", 16 * 32 / (32e-3 / 3 + 2 * 15 / 16 * 0.1)),
    ],
)
def test_the_scarcest_resource_bounds_two_hosts(change, bottleneck, throughput):
    found = predict(COSTS, replace(HOSTS, **change), ranks=16, rank_batch=32, gradient_bytes=GRADIENTS)
    assert found.bottleneck == bottleneck
    assert found.images_per_second == pytest.approx(throughput)


def test_all_reduce_by_ring_among_few_and_by_tree_where_latency_counts():
    assert all_reduce_seconds(1, GRADIENTS, 1e9, 1.0) == 0
    assert all_reduce_seconds(4, 100e6, 1e9, 0.0) == pytest.approx(1.5 * 0.1)
    assert all_reduce_seconds(1024, 1e6, 1e9, 1e-3) == pytest.approx(2e-3 + 20e-3)


def test_an_epoch_costs_its_gpu_hours():
    found = predict(COSTS, HOSTS, ranks=8, rank_batch=64, gradient_bytes=GRADIENTS)
    hours, price = epoch_hours_and_price(found, HOSTS, 8, 28_800_000)
    assert hours == pytest.approx(28_800_000 / found.images_per_second / 3600)
    assert price == pytest.approx(hours * 8 * 2.0)
