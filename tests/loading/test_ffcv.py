"""fastretina's warp as an operation of stock FFCV's Loader. In a process of its own: FFCV hangs where it fails."""

from __future__ import annotations

import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import simplejpeg

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


def test_stock_ffcv_yields_the_images_of_our_loader(beton):
    command = [sys.executable, "-c", SCRIPT, str(beton), "48"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.stdout.strip().endswith("same"), done.stderr[-2000:]
