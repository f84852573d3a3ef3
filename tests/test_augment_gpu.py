"""The Triton warp in the interpreter: the same pixels as the float64 reference. In a process of its own, because Triton reads
TRITON_INTERPRET when its kernels are defined. The same checks run on a real device under `pytest -m gpu`."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

CHECK = """
import sys
import numpy as np, torch
from fastretina.augment import Augment, draw, reference
from fastretina.augment.gpu import addresses_of, warp

device = torch.device(sys.argv[1])
rng = np.random.default_rng(0)
# bfloat16's step at 255 is 1, and Triton's interpreter cuts where a device rounds.
tolerance = {torch.float32: 0.05, torch.bfloat16: 1.05 if device.type == "cpu" else 0.55, torch.float16: 0.1, torch.uint8: 0.56}


def check(images, sources, heights, widths, augment, resolution, dtype, seed):
    ids = np.arange(len(images))
    parameters = draw(augment, resolution, widths, heights, seed, 0, ids)
    output = torch.full((len(images), resolution, resolution, 3), 7, dtype=dtype, device=device)
    if dtype.is_floating_point:
        output.fill_(float("nan"))
    norm = torch.tensor([[1.0, 1, 1], [0, 0, 0]], device=device)
    size = [torch.from_numpy(np.asarray(s, np.int32)).to(device) for s in (heights, widths)]
    warp(sources, *size, parameters, norm, augment.brightness > 0, output)
    for image, affine, colour, got in zip(images, parameters.affine, parameters.colour, output.double().cpu().numpy()):
        expected = reference.warp(image, affine, colour, resolution)
        assert np.isfinite(got).all(), "an element was not written"
        worst = np.abs(got - expected).max()
        assert worst < tolerance[dtype], (dtype, worst)


for resolution in (16, 33):
    stack = rng.integers(0, 255, (6, 24, 24, 3), dtype=np.uint8)
    on_device = torch.from_numpy(stack).to(device)
    size = np.full(6, 24)
    for augment in (Augment(), Augment.full(), Augment.none()):
        for dtype in tolerance:
            check(list(stack), addresses_of(on_device), size, size, augment, resolution, dtype, 3)
    rows = torch.tensor([5, 0, 0, 3], device=device)
    picked, at = [stack[i] for i in rows.tolist()], addresses_of(on_device, rows)
    check(picked, at, size[:4], size[:4], Augment.full(), resolution, torch.float32, 4)
    several = [rng.integers(0, 255, (h, w, 3), dtype=np.uint8) for h, w in ((1, 1), (24, 7), (9, 31))]
    tensors = [torch.from_numpy(image).to(device) for image in several]
    heights, widths = np.array([i.shape[0] for i in several]), np.array([i.shape[1] for i in several])
    check(several, addresses_of(tensors), heights, widths, Augment(zoom=(0.5, 2.0), shift=0.3), resolution, torch.float32, 5)

# Right angles are exact: eight images that are turned and mirrored in the eight ways must come out to the bit.
from fastretina.augment import WarpParameters
from fastretina.augment.parameters import affine_matrices
square = rng.integers(0, 255, (20, 20, 3), dtype=np.uint8)
angle, mirror, one = np.deg2rad(90.0 * np.arange(4)).repeat(2), np.tile([1.0, -1.0], 4), np.ones(8)
affine = affine_matrices(20, 20 * one, 20 * one, angle, mirror, one, one, np.zeros((2, 8)))
output = torch.zeros((8, 20, 20, 3), dtype=torch.uint8, device=device)
source = torch.from_numpy(square).to(device)
size = torch.full((8,), 20, dtype=torch.int32, device=device)
warp(addresses_of([source] * 8), size, size, WarpParameters(affine, np.zeros((8, 3, 4), np.float32)),
     torch.tensor([[1.0, 1, 1], [0, 0, 0]], device=device), False, output)
for k in range(8):
    assert np.array_equal(output[k].cpu().numpy(), np.rot90(square[:, ::-1] if k % 2 else square, k // 2)), k
print("agree")
"""


def run_check(device: str, interpret: bool) -> None:
    environment = os.environ | {"TRITON_INTERPRET": "1" if interpret else "0"}
    command = [sys.executable, "-c", CHECK, device]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, env=environment)
    assert done.stdout.strip() == "agree", done.stderr[-3000:]


def test_the_triton_warp_agrees_with_float64_in_the_interpreter():
    run_check("cpu", interpret=True)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_the_triton_warp_agrees_with_float64_on_the_device():
    run_check("cuda", interpret=False)
