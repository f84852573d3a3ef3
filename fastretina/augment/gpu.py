"""The warp on a GPU: gather by address, sample, recolour, clamp, normalise and lay out, in one Triton kernel.

One program makes BLOCK pixels of one image. Sources are addresses, so that a stacked batch, a list of buffers and the resident
array are all the same to it. Without a GPU, TRITON_INTERPRET=1 runs it on CPU tensors (slowly: the tests do).
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 1024  # pixels; four warps with eight pixels a thread


@triton.jit  # type: ignore[untyped-decorator]
def _tap(base, height, width, row, column, inside, channel: tl.constexpr, planar: tl.constexpr):  # type: ignore[no-untyped-def]
    if planar:  # noqa: SIM108  # Triton decides this one when it compiles
        place = (channel * height + row) * width + column
    else:
        place = (row * width + column) * 3 + channel
    return tl.load(base + place, mask=inside, other=0).to(tl.float32)


@triton.jit  # type: ignore[untyped-decorator]
def _warp_kernel(  # type: ignore[no-untyped-def]
    addresses,
    heights,
    widths,
    affine,
    colour,
    norm,
    output,
    resolution,
    recolour: tl.constexpr,
    planar: tl.constexpr,
    BLOCK: tl.constexpr,
):
    image = tl.program_id(0)
    pixel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mine = pixel < resolution * resolution
    x, y = (pixel % resolution).to(tl.float32), (pixel // resolution).to(tl.float32)
    base = tl.load(addresses + image).to(tl.pointer_type(tl.uint8))
    height, width = tl.load(heights + image), tl.load(widths + image)
    a = affine + image * 6
    sx = tl.load(a) * x + (tl.load(a + 1) * y + tl.load(a + 2))
    sy = tl.load(a + 3) * x + (tl.load(a + 4) * y + tl.load(a + 5))
    left, top = tl.floor(sx), tl.floor(sy)
    fx, fy = sx - left, sy - top
    column, row = left.to(tl.int32), top.to(tl.int32)
    in_left, in_right = mine & (column >= 0) & (column < width), mine & (column >= -1) & (column < width - 1)
    in_top, in_bottom = (row >= 0) & (row < height), (row >= -1) & (row < height - 1)
    red, green, blue = fx, fx, fx
    for channel in tl.static_range(3):
        t00 = _tap(base, height, width, row, column, in_left & in_top, channel, planar)
        t01 = _tap(base, height, width, row, column + 1, in_right & in_top, channel, planar)
        t10 = _tap(base, height, width, row + 1, column, in_left & in_bottom, channel, planar)
        t11 = _tap(base, height, width, row + 1, column + 1, in_right & in_bottom, channel, planar)
        upper, lower = t00 + fy * (t10 - t00), t01 + fy * (t11 - t01)
        value = upper + fx * (lower - upper)
        if channel == 0:
            red = value
        elif channel == 1:
            green = value
        else:
            blue = value
    target = output + (image * resolution * resolution + pixel).to(tl.int64) * 3
    for channel in tl.static_range(3):
        if recolour:
            c = colour + image * 12 + channel * 4
            value = tl.load(c) * red + tl.load(c + 1) * green + tl.load(c + 2) * blue + tl.load(c + 3)
            value = tl.minimum(tl.maximum(value, 0.0), 255.0)
        elif channel == 0:
            value = red
        elif channel == 1:
            value = green
        else:
            value = blue
        value = value * tl.load(norm + channel) + tl.load(norm + 3 + channel)
        if output.dtype.element_ty == tl.uint8:
            value = tl.minimum(tl.maximum(value, 0.0), 255.0) + 0.5
        tl.store(target + channel, value.to(output.dtype.element_ty), mask=mine)


def warp(
    addresses: Tensor,
    heights: Tensor,
    widths: Tensor,
    affine: Tensor,
    colour: Tensor,
    norm: Tensor,
    recolour: bool,
    output: Tensor,
    planar: bool = False,
) -> None:
    """Warp B images on the device that `output` is on, in its current stream. All tensors are on that device.

    addresses: (B,) int64, of each image's first byte: uint8 RGB rows without gaps, whether in a stacked batch, in buffers of
    their own or in the resident array. heights, widths: (B,) int32, px. affine: (B, 2, 3) and colour: (B, 3, 4) float32, as
    `augment.draw` gives them. norm: (2, 3) float32, scale and bias per channel. recolour: whether the colour matrices do
    anything. output: (B, R, R, 3) contiguous; float32, bfloat16, float16 or uint8. planar: the sources are (3, H, W) and not
    (H, W, 3). The caller keeps all of it alive and unwritten until the stream has passed this point.
    """
    count, resolution = output.shape[0], output.shape[1]
    if not output.is_contiguous() or output.shape != (count, resolution, resolution, 3):
        raise ValueError(f"output must be a contiguous (B, R, R, 3), not {tuple(output.shape)}")
    grid = (count, triton.cdiv(resolution * resolution, _BLOCK))
    _warp_kernel[grid](
        addresses, heights, widths, affine, colour, norm, output, resolution, recolour, planar, BLOCK=_BLOCK, num_warps=4
    )
