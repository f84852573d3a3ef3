"""The Triton warp: the same pixels as the float64 reference, on a GPU or in Triton's interpreter."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from devices import DEVICES
from warps import DTYPES, agrees, run, surrounded

from fastretina.loading.augment import Augment, WarpParameters
from fastretina.loading.augment.parameters import affine_matrices

pytestmark = pytest.mark.parametrize("device", DEVICES)


@pytest.mark.parametrize("augment", [Augment(), Augment.full(), Augment.none()], ids=["default", "full", "none"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_stacked_batch_agrees_with_float64(device, augment, dtype):
    stack = np.random.default_rng(0).integers(0, 255, (4, 24, 24, 3), dtype=np.uint8)
    on_device = torch.from_numpy(stack).to(device)
    # Every type over the edge of a tile by one of the augmentations; the interpreter makes each tile's 16 rows by themselves.
    for resolution in (16, 33 if augment == Augment() or device == "cuda" else 17):
        agrees(stack, on_device, augment, resolution, dtype, device)


def test_rows_of_a_resident_array_agree_in_any_order_and_number(device):
    stack = np.random.default_rng(1).integers(0, 255, (6, 24, 24, 3), dtype=np.uint8)
    on_device = torch.from_numpy(stack).to(device)
    rows = [5, 0, 0, 3]
    agrees(stack[rows], [on_device[row] for row in rows], Augment.full(), 16, torch.float32, device)


def test_buffers_of_several_sizes_agree(device):
    rng = np.random.default_rng(2)
    images = [rng.integers(0, 255, (h, w, 3), dtype=np.uint8) for h, w in ((1, 1), (24, 7), (9, 31))]
    sources = [torch.from_numpy(image).to(device) for image in images]
    agrees(images, sources, Augment(zoom=(0.5, 2.0), shift=0.3), 33, torch.float32, device)


@pytest.mark.parametrize("poison", [0, 255])
def test_nothing_around_an_image_is_seen_wherever_it_begins_and_ends(device, poison):
    rng = np.random.default_rng(4)
    # The kernel reads words of eight bytes: images at each of their bytes, and rows that end at each of them.
    images = [
        rng.integers(100, 150, (h, w, 3), dtype=np.uint8) for h, w in ((1, 1), (5, 1), (1, 6), (2, 2), (6, 7), (3, 8), (7, 5))
    ]
    for offset in range(8) if poison or device == "cuda" else (0, 3, 6):
        sources = [surrounded(image, offset, poison, device) for image in images]
        agrees(images, sources, Augment(zoom=(0.4, 1.5), shift=0.4), 8 + offset % 2, torch.float32, device)


def test_right_angles_are_exact(device):
    square = np.random.default_rng(3).integers(0, 255, (20, 20, 3), dtype=np.uint8)
    angle, flip, one = np.deg2rad(90.0 * np.arange(4)).repeat(2), np.tile([1.0, -1.0], 4), np.ones(8)
    affine = affine_matrices(20, 20 * one, 20 * one, angle, flip, one, one, np.zeros((2, 8)))
    source = torch.from_numpy(square).to(device)
    output = run([source] * 8, WarpParameters(affine, np.zeros((8, 3, 4), np.float32)), 20, torch.uint8, device)
    for k in range(8):
        assert np.array_equal(output[k].cpu().numpy(), np.rot90(square[:, ::-1] if k % 2 else square, k // 2))
