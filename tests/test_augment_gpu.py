"""The Triton warp: the same pixels as the float64 reference, on a GPU or in Triton's interpreter."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from devices import DEVICES

from fastretina.augment import Augment, WarpParameters, draw, reference
from fastretina.augment.gpu import warp
from fastretina.augment.parameters import affine_matrices

pytestmark = pytest.mark.parametrize("device", DEVICES)

IDENTITY = torch.tensor([[1.0, 1, 1], [0, 0, 0]])
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.uint8)


def tolerance(dtype: torch.dtype, device: str) -> float:
    """In grey levels: bfloat16's step at 255 is 1, and Triton's interpreter cuts where a device rounds."""
    bfloat16 = 1.05 if device == "cpu" else 0.55
    return {torch.float32: 0.05, torch.bfloat16: bfloat16, torch.float16: 0.1, torch.uint8: 0.56}[dtype]


def run(sources, parameters: WarpParameters, resolution: int, dtype: torch.dtype, device: str, recolour=False, planar=False):
    """Warp images of these tensors, which may be views into one; the output begins poisoned."""
    output = torch.full((len(sources), resolution, resolution, 3), 7, dtype=dtype, device=device)
    if dtype.is_floating_point:
        output.fill_(float("nan"))
    axes = (1, 2) if planar else (0, 1)
    heights, widths = (torch.tensor([s.shape[axis] for s in sources], dtype=torch.int32, device=device) for axis in axes)
    addresses = torch.tensor([source.data_ptr() for source in sources], device=device)
    affine, colour = (torch.from_numpy(np.asarray(part, np.float32)).to(device) for part in parameters)
    warp(addresses, heights, widths, affine, colour, IDENTITY.to(device), recolour, output, planar)
    return output


def agrees(images, sources, augment: Augment, resolution: int, dtype: torch.dtype, device: str, planar=False) -> None:
    heights, widths = np.array([i.shape[0] for i in images]), np.array([i.shape[1] for i in images])
    parameters = draw(augment, resolution, widths, heights, 3, 0, np.arange(len(images)))
    output = run(sources, parameters, resolution, dtype, device, augment.brightness > 0, planar).double().cpu().numpy()
    assert np.isfinite(output).all(), "an element was not written"
    for image, affine, colour, got in zip(images, *parameters, output, strict=True):
        assert np.abs(got - reference.warp(image, affine, colour, resolution)).max() < tolerance(dtype, device)


@pytest.mark.parametrize("augment", [Augment(), Augment.full(), Augment.none()], ids=["default", "full", "none"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_stacked_batch_agrees_with_float64(device, augment, dtype):
    stack = np.random.default_rng(0).integers(0, 255, (4, 24, 24, 3), dtype=np.uint8)
    on_device = torch.from_numpy(stack).to(device)
    for resolution in (16, 33):
        agrees(stack, on_device, augment, resolution, dtype, device)


def test_rows_of_a_resident_array_agree_in_any_order_and_number(device):
    stack = np.random.default_rng(1).integers(0, 255, (6, 24, 24, 3), dtype=np.uint8)
    on_device = torch.from_numpy(stack).to(device)
    rows = [5, 0, 0, 3]
    agrees(stack[rows], [on_device[row] for row in rows], Augment.full(), 16, torch.float32, device)


@pytest.mark.parametrize("planar", [False, True])
def test_buffers_of_several_sizes_agree(device, planar):
    rng = np.random.default_rng(2)
    images = [rng.integers(0, 255, (h, w, 3), dtype=np.uint8) for h, w in ((1, 1), (24, 7), (9, 31))]
    tensors = [torch.from_numpy(image).to(device) for image in images]
    sources = [tensor.permute(2, 0, 1).contiguous() for tensor in tensors] if planar else tensors
    agrees(images, sources, Augment(zoom=(0.5, 2.0), shift=0.3), 33, torch.float32, device, planar)


@pytest.mark.parametrize("poison", [0, 255])
def test_nothing_around_an_image_is_seen_wherever_it_begins_and_ends(device, poison):
    rng = np.random.default_rng(4)
    # The kernel reads words of four bytes: images at each of their bytes, and rows that end at each of them.
    images = [
        rng.integers(100, 150, (h, w, 3), dtype=np.uint8) for h, w in ((1, 1), (5, 1), (1, 6), (2, 2), (6, 7), (3, 8), (7, 5))
    ]
    for offset in range(4):
        sources = []
        for image in images:
            memory = torch.full((image.size + 64,), poison, dtype=torch.uint8, device=device)
            place = memory[16 + offset : 16 + offset + image.size]
            place.copy_(torch.from_numpy(image).flatten())
            sources.append(place.view(image.shape))
        agrees(images, sources, Augment(zoom=(0.4, 1.5), shift=0.4), 8 + offset % 2, torch.float32, device)


def test_right_angles_are_exact(device):
    square = np.random.default_rng(3).integers(0, 255, (20, 20, 3), dtype=np.uint8)
    angle, mirror, one = np.deg2rad(90.0 * np.arange(4)).repeat(2), np.tile([1.0, -1.0], 4), np.ones(8)
    affine = affine_matrices(20, 20 * one, 20 * one, angle, mirror, one, one, np.zeros((2, 8)))
    source = torch.from_numpy(square).to(device)
    output = run([source] * 8, WarpParameters(affine, np.zeros((8, 3, 4), np.float32)), 20, torch.uint8, device)
    for k in range(8):
        assert np.array_equal(output[k].cpu().numpy(), np.rot90(square[:, ::-1] if k % 2 else square, k // 2))
