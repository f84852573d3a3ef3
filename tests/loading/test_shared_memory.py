"""What the ranks of one machine keep together: one copy, the same batches, and agreement where it cannot be."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from devices import DeviceLoader, write_blocks

from fastretina import Loader
from fastretina.beton.reader import Beton
from fastretina.errors import LoaderError, SampleError
from fastretina.loading import resident
from fastretina.loading.config import LoaderConfig
from fastretina.loading.resident import Residence, Store, plan_residence
from fastretina.loading.shared_memory import shared_memory

SIDE, COUNT = 16, 14  # px; three ranks: runs of 4, 5 and 5
SETTINGS: dict[str, Any] = {"batch_size": 4, "resolution": SIDE, "workers": 1, "seed": 3, "decode": "cpu"}


class ThreadPeers:
    """Ranks that are threads of this process."""

    group = None

    def __init__(self, rank: int, size: int, parts: list[Any], barrier: threading.Barrier) -> None:
        self.rank, self.size, self._parts, self._barrier = rank, size, parts, barrier

    def gather(self, part: Any) -> list[Any]:
        self._parts[self.rank] = part
        self._barrier.wait(20)
        found = list(self._parts)
        self._barrier.wait(20)
        return found


def on_all(size: int, work: Callable[[ThreadPeers], Any]) -> list[Any]:
    """What `work` gives on each of so many ranks at the same time."""
    parts, barrier = [None] * size, threading.Barrier(size)
    with ThreadPoolExecutor(size) as threads:
        return list(threads.map(work, [ThreadPeers(rank, size, parts, barrier) for rank in range(size)]))


def planned(path: Path, peers: ThreadPeers, **settings: Any) -> Residence:
    config = LoaderConfig(resolution=SIDE, rank=peers.rank, world_size=peers.size, peers=peers, **settings)
    return plan_residence(Beton(path), config)


@pytest.fixture(scope="module")
def beton(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_blocks(tmp_path_factory.mktemp("peers") / "data.beton", COUNT, SIDE)


@pytest.fixture
def one_device_of(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Makes devices of which each has room for so many copies of the data set."""

    real = plan_residence

    def make(copies: float) -> None:
        monkeypatch.setattr(resident, "available_bytes", lambda: 1)
        monkeypatch.setattr(resident, "device_available_bytes", lambda device: int(copies * Store.nbytes(COUNT, SIDE, SIDE)))
        # As for a GPU: a DeviceLoader on a CPU would ask for RAM.
        monkeypatch.setattr(
            "fastretina.loading.loader.plan_residence",
            lambda beton, config: real(beton, replace(config, device="cuda")),
        )

    return make


def loaders(path: Path, kind: type[Loader], size: int, **changes: Any) -> list[Loader]:
    settings = {"resident": "on", "world_size": size} | SETTINGS | changes
    return on_all(size, lambda peers: kind(path, rank=peers.rank, peers=peers, **settings))


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def assert_same_batches(parts: list[Loader], path: Path, epochs: int = 2) -> None:
    """All ranks' batches, each in its turn, are those of a loader that keeps nothing."""
    for rank, loader in enumerate(parts):
        settings = {**SETTINGS, "rank": rank, "world_size": len(parts)}
        with type(loader)(path, **settings) as plain:
            for _ in range(epochs):
                for found, expected in zip(loader, plain, strict=True):
                    assert torch.equal(found.ids, expected.ids)
                    assert torch.equal(found.images, expected.images)


def test_memory_is_the_same_for_all_and_freed_with_the_last():
    gc.collect()  # what tests before this one have left to be closed
    before = open_files()
    first, second = on_all(2, lambda peers: shared_memory(10_000, peers))
    assert open_files() == before + 2  # one for each map
    assert not first.any()
    first[-1] = 7
    assert second[-1] == 7
    assert first.ctypes.data != second.ctypes.data
    del first
    gc.collect()
    assert second[-1] == 7
    del second
    gc.collect()
    assert "memfd:fastretina" not in Path("/proc/self/maps").read_text()
    assert open_files() == before


@pytest.mark.parametrize("wrong", ["/proc/0/fd/0", "/dev/null"], ids=["no such process", "another's file"])
def test_memory_that_one_cannot_have_nobody_has(monkeypatch, wrong):
    real = os.open

    def opened(path: Any, *rest: Any) -> int:
        other = threading.current_thread().name.endswith("_1") and str(path).startswith("/proc/")
        return real(wrong if other else path, *rest)

    monkeypatch.setattr(os, "open", opened)
    assert on_all(2, lambda peers: shared_memory(10_000, peers)) == [None, None]


def test_memory_that_the_system_does_not_give_nobody_has(monkeypatch):
    before = open_files()
    monkeypatch.setattr(os, "pwrite", lambda *given: (_ for _ in ()).throw(OSError("no space")))
    assert on_all(2, lambda peers: shared_memory(10_000, peers)) == [None, None]
    assert open_files() == before


def test_devices_whose_models_need_different_memory_still_decide_alike(beton, monkeypatch):
    needed = Store.nbytes(COUNT, SIDE, SIDE)
    monkeypatch.setattr(resident, "device_available_bytes", lambda device: 3 * needed)
    reserves = [0, 2 * needed]  # of the second rank alone, all images would not fit
    plans = on_all(2, lambda peers: planned(beton, peers, resident="auto", device="cuda", reserve=reserves[peers.rank]))
    assert [plan.split for plan in plans] == [True, True]


def test_ranks_in_ram_decode_each_sample_once_and_find_it_in_the_same_memory(beton, monkeypatch):
    decoded: list[int] = []
    real = Store.read

    def read(store: Store, index: int, target: Any, decode: Any) -> None:
        real(store, index, target, lambda number, pixels: (decoded.append(number), decode(number, pixels)))

    monkeypatch.setattr(Store, "read", read)
    parts = loaders(beton, Loader, 3)
    assert all("resident in RAM (0 MB, shared by 3 ranks)" in loader.description for loader in parts)
    assert_same_batches(parts, beton)
    assert sorted(decoded) == list(range(COUNT))
    for loader in parts:
        loader.close()


def test_where_ranks_cannot_share_ram_each_needs_its_own(beton, monkeypatch):
    monkeypatch.setattr(resident, "shared_memory", lambda nbytes, peers: None)
    needed = Store.nbytes(COUNT, SIDE, SIDE)
    monkeypatch.setattr(resident, "available_bytes", lambda: 3 * needed)
    parts = loaders(beton, Loader, 3)
    assert_same_batches(parts, beton)
    monkeypatch.setattr(resident, "available_bytes", lambda: 3 * needed - 1)
    with pytest.raises(LoaderError, match="resident mode needs"):
        loaders(beton, Loader, 3)


def test_ranks_that_do_not_know_each_other_are_reckoned_to_need_their_own(beton, monkeypatch):
    needed = Store.nbytes(COUNT, SIDE, SIDE)
    for free, fits in ((2 * needed, True), (2 * needed - 1, False)):
        monkeypatch.setattr(resident, "available_bytes", lambda free=free: free)
        with pytest.raises(LoaderError, match="resident mode needs") if not fits else nullcontext():
            Loader(beton, resident="on", rank=1, world_size=2, **SETTINGS).close()


def test_the_rank_with_the_least_memory_decides_for_all(beton, monkeypatch):
    needed = Store.nbytes(COUNT, SIDE, SIDE)
    free = iter([10 * needed, 2 * needed])
    monkeypatch.setattr(resident, "available_bytes", lambda: next(free))  # "auto" takes 40 %
    notes = on_all(2, lambda peers: planned(beton, peers, resident="auto").note)
    assert notes[0] == notes[1]
    assert notes[0].startswith("streaming")


def test_devices_keep_all_where_that_fits_and_else_their_part(beton, monkeypatch):
    def plan(copies: float, mode: str = "on") -> list[Any]:
        monkeypatch.setattr(resident, "device_available_bytes", lambda device: int(copies * Store.nbytes(COUNT, SIDE, SIDE)))
        return on_all(3, lambda peers: planned(beton, peers, resident=mode, device="cuda", reserve=0))

    assert [(one.size, one.split) for one in plan(1.0)] == 3 * [((SIDE, SIDE), False)]
    assert [(one.size, one.split) for one in plan(0.4)] == 3 * [((SIDE, SIDE), True)]
    assert [one.size for one in plan(0.3, "auto")] == 3 * [None]
    assert "split among 3 ranks" in plan(0.4)[0].note
    with pytest.raises(LoaderError, match="use resident='auto'"):
        plan(0.3)


@pytest.mark.parametrize("size", [2, 3])
def test_ranks_that_split_the_images_make_the_same_batches(beton, one_device_of, size):
    one_device_of(0.6)
    parts = loaders(beton, DeviceLoader, size)
    on_all(size, lambda peers: parts[peers.rank].fill())
    kept = [loader._stage.owned for loader in parts]
    assert [number for run in kept for number in run] == list(range(COUNT))
    assert max(map(len, kept)) - min(map(len, kept)) <= 1
    assert_same_batches(parts, beton)
    for loader in parts:
        loader.close()


@pytest.mark.parametrize(
    "device",
    [
        pytest.param("cpu", marks=pytest.mark.skipif(torch.cuda.is_available(), reason="the kernel is compiled for the GPU")),
        pytest.param("cuda", marks=(pytest.mark.gpu, pytest.mark.skipif(torch.cuda.device_count() < 2, reason="no two GPUs"))),
    ],
)
def test_ranks_that_are_processes_split_the_images(beton, device):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    said = subprocess.run(
        [*torchrun, str(Path(__file__).parents[1] / "rank_split.py"), str(beton), device],
        env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert said.returncode == 0, said.stderr
    assert "split among 2 ranks" in said.stdout


def test_a_bad_sample_is_named_by_the_rank_that_needs_it_whoever_keeps_it(tmp_path, one_device_of):
    bad = 1  # of rank 0's run
    corrupt = write_blocks(tmp_path / "bad.beton", COUNT, SIDE, {bad})
    one_device_of(0.6)
    parts = loaders(corrupt, DeviceLoader, 2, on_bad="skip", max_bad=0.1)
    on_all(2, lambda peers: parts[peers.rank].fill())
    seen = [sorted(int(number) for batch in loader for number in batch.ids) for loader in parts]
    assert sorted(seen[0] + seen[1]) == [100 + number for number in range(COUNT) if number != bad]
    assert sum(len(loader.skipped) for loader in parts) == 1
    strict = loaders(corrupt, DeviceLoader, 2)
    on_all(2, lambda peers: strict[peers.rank].fill())
    errors = []
    for loader in strict:
        try:
            list(loader)
        except SampleError as error:
            errors.append(error.index)
    assert errors == [bad]


def test_what_was_unreadable_while_filling_can_still_come_later(beton, one_device_of, monkeypatch):
    one_device_of(0.6)
    parts = loaders(beton, DeviceLoader, 2, on_bad="skip")
    real = Beton.jpeg

    def failing(self: Beton, i: int) -> memoryview:
        if i == 1:
            raise self.sample_error(i, "cannot be read: a fault of the moment")
        return real(self, i)

    with monkeypatch.context() as moment:
        moment.setattr(Beton, "jpeg", failing)
        on_all(2, lambda peers: parts[peers.rank].fill())
    assert [int((~loader._stage._store.held).sum()) for loader in parts] == [1, 1]
    assert_same_batches(parts, beton)


def test_device_memory_that_one_rank_cannot_have_is_streamed_by_all_or_an_error(beton, one_device_of, monkeypatch):
    one_device_of(1.6)
    monkeypatch.setattr(resident, "peer_memory", lambda *given: None)
    one_device_of(0.6)
    with pytest.raises(LoaderError, match="for each rank that all others can read"):
        loaders(beton, DeviceLoader, 2)
    monkeypatch.setattr(resident, "_RESERVED_SHARE", 1.0)
    parts = loaders(beton, DeviceLoader, 2, resident="auto", reserve=0)
    assert all("streaming (resident would take" in loader.description for loader in parts)
    assert_same_batches(parts, beton, epochs=1)
    assert np.all([loader._filled for loader in parts])
