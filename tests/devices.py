"""What the tests of the device half run on: a CUDA device, or CPU tensors with Triton's interpreter where there is none.

Import this before fastretina.augment.gpu: Triton looks at TRITON_INTERPRET when a kernel is defined.
"""

from __future__ import annotations

import os

import pytest
import torch

from fastretina import Loader

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
