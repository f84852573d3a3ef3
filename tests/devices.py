"""What the tests of the device half run on: a CUDA device, or CPU tensors with Triton's interpreter where there is none.

Import this before fastretina.loading.augment.gpu: Triton looks at TRITON_INTERPRET when a kernel is defined.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Collection
from pathlib import Path

import numpy as np
import pytest
import simplejpeg
import torch

from fastretina import Loader
from fastretina.beton.writer import BetonWriter

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

on_cuda = (pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"))
DEVICES = [
    pytest.param("cpu", marks=pytest.mark.skipif(torch.cuda.is_available(), reason="the kernel is compiled for the GPU")),
    pytest.param("cuda", marks=on_cuda),
]


class DeviceLoader(Loader):
    """A Loader whose batches the device makes, on a CPU too."""

    _makes_on_device = True


def write_blocks(path: Path, count: int, side: int, bad: Collection[int] = ()) -> Path:
    """A .beton of `count` images of flat blocks, on which all inverse DCTs agree; of the bad ones, a byte is another."""
    rng = np.random.default_rng(0)
    jpegs = []
    with BetonWriter(path, count) as writer:
        for n in range(count):
            image = np.kron(rng.integers(0, 255, (side // 8, side // 8, 3), dtype=np.uint8), np.ones((8, 8, 1), np.uint8))
            jpeg = simplejpeg.encode_jpeg(np.ascontiguousarray(image), quality=92, colorsubsampling="444")
            jpegs.append(jpeg)
            writer.add(jpeg, zlib.crc32(jpeg), name=f"eye_{n}", label=n % 5, id=100 + n, width=side, height=side)
        writer.finish({})
    data = bytearray(path.read_bytes())
    for n in bad:
        data[bytes(data).find(jpegs[n]) + len(jpegs[n]) // 2] ^= 0x20
    path.write_bytes(data)
    return path
