"""Images warped by fastretina.loading.augment.gpu.warp, against the float64 reference."""

from __future__ import annotations

import devices  # noqa: F401  # before the kernel is defined
import numpy as np
import reference
import torch

from fastretina.loading.augment import Augment, WarpParameters, draw
from fastretina.loading.augment.gpu import warp

IDENTITY = torch.tensor([[1.0, 1, 1], [0, 0, 0]])
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.uint8)


def tolerance(dtype: torch.dtype, device: str) -> float:
    """In grey levels: bfloat16's step at 255 is 1, and Triton's interpreter cuts where a device rounds."""
    bfloat16 = 1.05 if device == "cpu" else 0.55
    return {torch.float32: 0.05, torch.bfloat16: bfloat16, torch.float16: 0.1, torch.uint8: 0.56}[dtype]


def run(sources, parameters: WarpParameters, resolution: int, dtype: torch.dtype, device: str, recolour=False):
    """Warp images of these tensors, which may be views into one; the output begins poisoned."""
    poison = float("nan") if dtype.is_floating_point else 7
    # An image more than there are, to see what is written past the end.
    memory = torch.full((len(sources) + 1, resolution, resolution, 3), poison, dtype=dtype, device=device)
    output, untouched = memory[:-1], memory[-1].clone()
    heights, widths = (torch.tensor([s.shape[axis] for s in sources], dtype=torch.int32, device=device) for axis in (0, 1))
    addresses = torch.tensor([source.data_ptr() for source in sources], device=device)
    affine, colour = (torch.from_numpy(np.asarray(part, np.float32)).to(device) for part in parameters)
    warp(addresses, heights, widths, affine, colour, IDENTITY.to(device), recolour, output)
    assert torch.equal(memory[-1].view(torch.uint8), untouched.view(torch.uint8))
    return output


def surrounded(image: np.ndarray, offset: int, poison: int, device: str) -> torch.Tensor:
    """The image on the device, so many bytes past a multiple of 16, in the midst of poison."""
    memory = torch.full((image.size + 64,), poison, dtype=torch.uint8, device=device)
    inside = memory[16 + offset : 16 + offset + image.size].view(image.shape)
    return inside.copy_(torch.from_numpy(image))


def agrees(images, sources, augment: Augment, resolution: int, dtype: torch.dtype, device: str, levels=None) -> None:
    """levels: the largest difference in grey levels; None: the device's tolerance."""
    levels = tolerance(dtype, device) if levels is None else levels
    heights, widths = np.array([i.shape[0] for i in images]), np.array([i.shape[1] for i in images])
    parameters = draw(augment, resolution, widths, heights, 3, 0, np.arange(len(images)))
    output = run(sources, parameters, resolution, dtype, device, augment.recolours).double().cpu().numpy()
    assert np.isfinite(output).all(), "an element was not written"
    for image, affine, colour, got in zip(images, *parameters, output, strict=True):
        assert np.abs(got - reference.warp(image, affine, colour, resolution)).max() < levels
