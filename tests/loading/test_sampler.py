"""Orders: every sample once, the same for the same seed and epoch, and the promised class shares."""

from __future__ import annotations

import numpy as np
import pytest

from fastretina.beton.shards import WINDOW
from fastretina.errors import UsageError
from fastretina.loading.sampler import epoch_order, permutation

LABELS = np.repeat([0, 1, 2, 3, 4], [735, 70, 150, 25, 20])


def test_a_shuffled_epoch_has_every_sample_once_and_repeats_itself_only_for_the_same_seed_and_epoch():
    first = epoch_order(LABELS, "shuffle", 1, 0).indices
    assert np.array_equal(np.sort(first), np.arange(len(LABELS)))
    assert np.array_equal(first, epoch_order(LABELS, "shuffle", 1, 0).indices)
    assert not np.array_equal(first, epoch_order(LABELS, "shuffle", 1, 1).indices)
    assert not np.array_equal(first, epoch_order(LABELS, "shuffle", 2, 0).indices)


@pytest.mark.parametrize("count", [0, 1, 2, 3, 4, 5, 8, 9, 1023, 1025, 1 << 16, (1 << 16) + 1, 200_000])
def test_the_permutation_is_numpys(count):
    for key in range(3):
        ours, theirs = (np.random.Generator(np.random.Philox(key=[key, 7])) for _ in range(2))
        assert np.array_equal(permutation(ours, count), theirs.permutation(count))


def test_a_shuffle_by_shards_has_every_sample_once_and_reads_each_file_in_one_stretch():
    shards = np.repeat(np.arange(64), 200)
    labels = np.zeros(len(shards), np.int64)
    order = epoch_order(labels, "shards", 1, 0, shards).indices
    assert np.array_equal(np.sort(order), np.arange(len(labels)))
    assert np.array_equal(order, epoch_order(labels, "shards", 1, 0, shards).indices)
    assert not np.array_equal(order, epoch_order(labels, "shards", 1, 1, shards).indices)
    visited = shards[order]
    first = np.array([np.argmax(visited == shard) for shard in range(64)])
    last = np.array([len(visited) - 1 - np.argmax(visited[::-1] == shard) for shard in range(64)])
    open_at_once = [int(((first <= position) & (last >= position)).sum()) for position in range(len(visited))]
    assert max(open_at_once) == WINDOW
    # In the middle a batch draws from all files of the window about equally: 8 files, 400 samples, 50 +- 5 standard deviations.
    counts = np.unique_counts(visited[6000:6400]).counts
    assert len(counts) in (WINDOW, WINDOW + 1, WINDOW + 2)
    assert not np.array_equal(np.argsort(first), np.arange(64))


def test_a_shuffle_by_shards_of_one_file_is_a_shuffle_of_it():
    order = epoch_order(LABELS, "shards", 1, 0).indices
    assert np.array_equal(np.sort(order), np.arange(len(LABELS)))
    assert np.abs(np.corrcoef(order, np.arange(len(LABELS)))[0, 1]) < 0.1


def test_sequential_is_file_order():
    assert np.array_equal(epoch_order(LABELS, "sequential", 1, 9).indices, np.arange(len(LABELS)))


def test_balanced_draws_each_class_equally_often():
    order = epoch_order(LABELS, "balanced", 0, 0)
    assert np.bincount(LABELS[order.indices]).tolist() == [200, 200, 200, 200, 200]


def test_sqrt_draws_in_proportion_to_the_root_of_the_counts():
    order = epoch_order(LABELS, "sqrt", 0, 0)
    counts = np.bincount(LABELS)
    expected = len(LABELS) * np.sqrt(counts) / np.sqrt(counts).sum()
    assert np.abs(np.bincount(LABELS[order.indices]) - expected).max() <= 1


@pytest.mark.parametrize("sampling", ["balanced", "sqrt"])
def test_no_sample_comes_again_before_all_of_its_class_have_come(sampling):
    order = epoch_order(LABELS, sampling, 3, 4)
    assert order.repeats is not None
    for grade in range(5):
        times = np.bincount(order.indices[LABELS[order.indices] == grade], minlength=len(LABELS))[grade == LABELS]
        assert times.max() - times.min() <= 1
    # Each return of a sample has a number of its own, so that it is augmented differently.
    pairs = np.stack([order.indices, order.repeats.astype(np.int64)])
    assert np.unique(pairs, axis=1).shape[1] == len(LABELS)


def test_an_unknown_sampling_is_refused():
    with pytest.raises(UsageError, match="sampling"):
        epoch_order(LABELS, "random", 0, 0)  # type: ignore[arg-type]
