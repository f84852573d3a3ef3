"""fastretina's warp as an operation of stock FFCV's Loader. In a process of its own: FFCV hangs where it fails."""

from __future__ import annotations

import os
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import simplejpeg
from devices import DEVICES, write_blocks

from fastretina.beton.writer import BetonWriter

pytestmark = pytest.mark.ffcv
pytest.importorskip("ffcv", reason="the ffcv extra is not installed")

SCRIPT = """
import sys, warnings
import torch
from ffcv.loader import Loader, OrderOption
from fastretina import Loader as Ours
from fastretina.loading.augment import Augment
from fastretina.loading.ffcv import pipelines

path, resolution = sys.argv[1], int(sys.argv[2])
for augment in (Augment(), Augment.full(), Augment.none()):
    pipes, warp = pipelines(path, resolution=resolution, seed=3, augment=augment)
    theirs = Loader(path, batch_size=8, num_workers=2, order=OrderOption.SEQUENTIAL, drop_last=False, pipelines=pipes)
    ours = Ours(path, batch_size=8, resolution=resolution, seed=3, sampling="sequential", augment=augment)
    for epoch in range(2):
        warp.epoch = epoch
        pairs = list(zip(theirs, ours, strict=True))
        assert len(pairs) == 3
        for (images, labels), batch in pairs:
            assert images.is_contiguous(memory_format=torch.channels_last)
            assert torch.equal(labels, batch.labels)
            assert (images - batch.images).abs().max() < 1e-6, (images - batch.images).abs().max()
    ours.close()
print("same")
"""


DEVICE_SCRIPT = """
import sys
import torch
from ffcv.loader import Loader, OrderOption
from fastretina import Loader as Ours
from fastretina.loading.augment import Augment
from fastretina.loading.ffcv_device import device_pipelines

good, corrupt, resolution, device, decoder = *sys.argv[1:3], *map(int, sys.argv[3:4]), *sys.argv[4:6]
for workers in (1, 2):
    pipes, decode, warp = device_pipelines(good, resolution, seed=3, augment=Augment.full(), device=device, decoder=decoder)
    settings = {"batch_size": 8, "order": OrderOption.SEQUENTIAL, "drop_last": False, "os_cache": True, "num_workers": workers}
    theirs = Loader(good, pipelines=pipes, **settings)
    ours = Ours(good, batch_size=8, resolution=resolution, seed=3, sampling="sequential", augment=Augment.full())
    for epoch in range(2):
        warp.epoch = epoch
        pairs = list(zip(theirs, ours, strict=True))
        assert len(pairs) == 3
        for (images, labels), batch in pairs:
            assert images.is_contiguous(memory_format=torch.channels_last)
            assert torch.equal(labels.cpu(), batch.labels)
            near = (images.cpu() - batch.images).abs() < 3 * 0.018  # three grey levels
            assert near.float().mean() > 0.99, near.float().mean()
    ours.close()

pipes, decode, warp = device_pipelines(corrupt, resolution, augment=Augment.none(), device=device, decoder=decoder)
found = torch.cat([images.cpu().clone() for images, _ in Loader(corrupt, pipelines=pipes, **settings)])
ours = next(iter(Ours(good, batch_size=20, train=False, resolution=resolution))).images
black = ours.new_tensor([-0.485 / 0.229, -0.456 / 0.224, -0.406 / 0.225])[:, None, None]
ours[[4, 17]] = black
assert ((found - ours).abs() < 3 * 0.018).float().mean() > 0.99
assert sorted(decode.bad) == [4, 17] and "checksum" in str(decode.bad[4]), decode.bad
print("same")
"""


@pytest.fixture
def beton(tmp_path) -> Path:
    """Twenty images of 64 px."""
    rng = np.random.default_rng(0)
    with BetonWriter(tmp_path / "d.beton", 20) as writer:
        for n in range(20):
            image = np.kron(rng.integers(0, 255, (8, 8, 3), dtype=np.uint8), np.ones((8, 8, 1), np.uint8))
            # Flat blocks: on them FFCV's fast inverse DCT and the accurate one give the same pixels.
            jpeg = simplejpeg.encode_jpeg(np.ascontiguousarray(image), quality=100, colorsubsampling="444")
            writer.add(jpeg, zlib.crc32(jpeg), name=str(n), label=n % 5, id=2 * n, width=64, height=64)
        writer.finish({})
    return tmp_path / "d.beton"


def run(*arguments: object) -> None:
    # Where there is no GPU, Triton's interpreter runs the kernel.
    environment = os.environ | ({} if "cuda" in arguments else {"TRITON_INTERPRET": "1"})
    command = [sys.executable, "-c", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False, env=environment)
    assert done.stdout.strip().endswith("same"), done.stderr[-2000:]


def test_stock_ffcv_yields_the_images_of_our_loader(beton):
    run(SCRIPT, beton, 48)


@pytest.mark.parametrize("device", DEVICES)
def test_stock_ffcv_hands_the_jpegs_to_a_device_decoder(tmp_path, device):
    pytest.importorskip("nvidia.nvimgcodec")
    side = 64 if device == "cuda" else 16
    good = write_blocks(tmp_path / "good.beton", 20, side)
    corrupt = write_blocks(tmp_path / "corrupt.beton", 20, side, bad={4, 17})
    run(DEVICE_SCRIPT, good, corrupt, 3 * side // 4, device, "nvimgcodec")
