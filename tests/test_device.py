"""The device half of the loader on CPU tensors: Triton's interpreter for the kernel, a stand-in for the decoder library.

In processes of their own, because Triton reads TRITON_INTERPRET when its kernels are defined. With a GPU, `pytest -m gpu` runs the
same comparison through Loader(device="cuda").
"""

from __future__ import annotations

import os
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import simplejpeg
import torch

from fastretina.beton_writer import BetonWriter

COMMON = """
import sys
import numpy as np, simplejpeg, torch
from fastretina.augment import Augment
from fastretina.beton import Beton
from fastretina.buffers import BufferPool
from fastretina.decode.gpu import Decoded
from fastretina.device import DeviceStage
from fastretina.errors import SampleError
from fastretina.feed import CpuJob, DeviceJob, Feed, FeedSettings
from fastretina.resident import DeviceStore

path, damaged, resolution = sys.argv[1], sys.argv[2], int(sys.argv[3])
cpu = torch.device("cpu")


def settings(dtype=torch.float32, skip=False):
    return FeedSettings(5, resolution, 7, "shuffle", False, Augment.full(), dtype, True, skip)


def feed(job, path, **changes):
    beton = Beton(path)
    return Feed(beton, settings(**changes), BufferPool(5 * 64 * 64 * 3 * 4, keep=4), job)


def batches(feed, epochs=2, stage=None):
    jobs = feed.jobs(0, 0)
    for _ in range(epochs * len(feed)):
        job = next(jobs)
        for row in range(job.rows):
            job.run(row)
        images = torch.from_numpy(job.images) if stage is None else stage.launch(job)
        yield job, images


def agree(path, stage_of, tolerance=1.0):
    ours = feed(DeviceJob, path)
    stage = stage_of(ours)
    for (job, got), (_, expected) in zip(batches(ours, stage=stage), batches(feed(CpuJob, path)), strict=True):
        assert got.shape == expected.shape
        grey = (got - expected).abs() * 255 * torch.tensor([0.229, 0.224, 0.225])
        assert float(grey.max()) < tolerance, float(grey.max())
    return ours


class Library:
    # Decodes as a device library would: all at full size, None for what it does not like, memory of its own.
    def __init__(self, planar, dislikes=()):
        self.planar, self.dislikes, self.calls, self.released = planar, dislikes, 0, 0

    def decode(self, jpegs, sizes):
        images = []
        for jpeg in jpegs:
            if self.calls in self.dislikes:
                images.append(None)
            else:
                try:
                    image = torch.from_numpy(simplejpeg.decode_jpeg(jpeg))
                    images.append(image.permute(2, 0, 1).contiguous() if self.planar else image)
                except ValueError:
                    images.append(None)
            self.calls += 1
        return Decoded(images, self.planar, images)

    def release(self, event):
        self.released += 1
"""

DECODED_ON_CPU = """
agree(path, lambda feed: DeviceStage(feed, cpu, None, None))

def resident(feed):
    store = DeviceStore(len(feed.beton), *feed.sizes.only, cpu)
    feed.on_device = store.held
    return DeviceStage(feed, cpu, store, None)

kept = agree(path, resident)
assert kept.on_device.all()
"""

DECODED_BY_LIBRARY = """
def streaming(planar, dislikes):
    def make(feed):
        feed.device_decodes = True
        return DeviceStage(feed, cpu, None, Library(planar, dislikes))
    return make

def resident(feed):
    feed.device_decodes = True
    store = DeviceStore(len(feed.beton), *feed.sizes.only, cpu)
    feed.on_device = store.held
    return DeviceStage(feed, cpu, store, Library(True, {4}))

for planar in (False, True):
    agree(path, streaming(planar, {1, 9}))
agree(path, resident)
"""

DAMAGED = """
bad = {0, 9}
for decodes in (False, True):
    ours = feed(DeviceJob, damaged, skip=True)
    ours.device_decodes = decodes
    stage = DeviceStage(ours, cpu, None, Library(False) if decodes else None)
    seen = []
    good = {}
    for job, images in batches(feed(CpuJob, path), epochs=1):
        good |= {int(i): image for i, image in zip(job.indices, images)}
    for job, images in batches(ours, epochs=1, stage=stage):
        rows = [row for row in range(job.rows) if row not in job.bad]
        assert len(images) == len(rows)
        for row, image in zip(rows, images):
            index = int(job.indices[row])
            seen.append(index)
            assert (image - good[index]).abs().max() < 0.02, "a neighbour's pixels"
        assert {int(job.indices[row]) for row in job.bad} <= bad
    assert sorted(seen) == sorted(set(range(12)) - bad)
    strict = feed(DeviceJob, damaged)
    strict.device_decodes = decodes
    try:
        list(batches(strict, stage=DeviceStage(strict, cpu, None, Library(False) if decodes else None)))
    except SampleError as error:
        assert error.index in bad
    else:
        raise AssertionError("no error")
"""


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> tuple[Path, Path]:
    """Twelve images of 64 px, and the same with two samples damaged."""
    folder = tmp_path_factory.mktemp("device")
    rng = np.random.default_rng(0)
    places = []
    with BetonWriter(folder / "good.beton", 12) as writer:
        for n in range(12):
            image = np.kron(rng.integers(0, 255, (8, 8, 3), dtype=np.uint8), np.ones((8, 8, 1), np.uint8))
            jpeg = simplejpeg.encode_jpeg(np.ascontiguousarray(image), quality=92)
            places.append(jpeg)
            writer.add(jpeg, zlib.crc32(jpeg), name=str(n), label=n % 5, id=n, width=64, height=64)
        writer.finish({})
    data = bytearray((folder / "good.beton").read_bytes())
    for n in (0, 9):
        data[bytes(data).find(places[n]) + len(places[n]) // 2] ^= 0x20
    (folder / "damaged.beton").write_bytes(data)
    return folder / "good.beton", folder / "damaged.beton"


@pytest.mark.parametrize("part", [DECODED_ON_CPU, DECODED_BY_LIBRARY, DAMAGED], ids=["cpu", "library", "damaged"])
@pytest.mark.parametrize("resolution", [33])
def test_the_device_half_makes_the_batches_of_the_cpu_loader(files, part, resolution):
    code = COMMON + part + "print('same')"
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, files), str(resolution)],
        capture_output=True, text=True, timeout=200, check=False, env=os.environ | {"TRITON_INTERPRET": "1"},
    )  # fmt: skip
    assert done.stdout.strip() == "same", done.stderr[-3000:]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("change", [{}, {"resident": "on"}, {"decode": "gpu"}, {"decode": "gpu", "resident": "on"}])
def test_the_cuda_loader_makes_the_batches_of_the_cpu_loader(files, change):
    from fastretina.loader import Loader

    path, _ = files
    settings = {"batch_size": 5, "resolution": 64, "seed": 7}
    with Loader(path, **settings) as expected, Loader(path, device="cuda", **settings, **change) as loader:
        for _ in range(3):
            for ours, theirs in zip(loader, expected, strict=True):
                assert torch.equal(ours.ids.cpu(), theirs.ids)
                assert torch.equal(ours.labels.cpu(), theirs.labels)
                assert ours.images.is_contiguous(memory_format=torch.channels_last)
                # nvJPEG and libjpeg-turbo differ by a few grey levels in chroma; a level is 0.017 after normalising.
                close = (ours.images.cpu() - theirs.images).abs() < 3 * 0.018
                assert close.float().mean() > 0.99
