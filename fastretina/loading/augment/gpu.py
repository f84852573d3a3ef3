"""The warp on a GPU: gather by address, sample, recolour, clamp, normalise and lay out, in one Triton kernel.

Sources are addresses, so that a stacked batch, a list of buffers and the resident array are all the same to it. Without a GPU,
TRITON_INTERPRET=1 runs it on CPU tensors (slowly: the tests do), and benchmarks/kernel_code.py counts what it compiles to.

Moving 2.4 MB an image at the speed of a GPU's memory leaves an H100 90 to 100 instructions a pixel, so the kernel saves them:

- A thread makes four neighbours and stores them in whole words. It loads the six bytes of two neighbouring source pixels as one or
  two aligned words. A word without a byte that is needed is never touched, so the bytes before and after an image that are read
  along with it lie on memory pages that hold a part of it.
- A byte's bits read as float32 are that byte times 2^-149, exactly, and GPUs multiply such denormal numbers at full speed; they
  convert integers at an eighth of it. Weights times 2^126 bring the product into the normal range.

What limits it on an H200 is the L1 cache (86 % of its throughput; instructions: 53 %). By a model fitted to the times of variants,
most of that is bank conflicts: a warp's load takes as many turns as it has different words in one of the cache's 32 banks of four
bytes. They repeat every 128 bytes, so that all rows of an image of 512 pixels begin in the same one. So

- words have eight bytes: each takes two turns at least, but there are 16 loads and not 24;
- one program makes a tile, one warp a patch of it, whose threads stand 8 across and 4 down, or, where the image is rotated by more
  than 76 degrees, 4 across and 8 down: wide and low in the source.

256 images of 512 px took it 319 us at random angles (392 with words of four bytes and 4 across for all), 357 (411) recoloured too,
287 (418) as they are, 332 (405) at 45 degrees and 376 (313) at 90. 2 across at 90 degrees took 504, 16 across as they are 282.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

# A program goes down its tile in steps, so that what it needs to know of the image is loaded once for all of them.
_THREADS = tl.constexpr(128)
_TILE_WIDTH, _TILE_HEIGHT, _STEP_HEIGHT = tl.constexpr(32), tl.constexpr(64), tl.constexpr(16)
# From here on, the slope of a row's source, a warp's 32 threads stand 4 across instead of 8, each with four pixels in a row.
_STEEP = tl.constexpr(4.0)
_WEIGHT = tl.constexpr(2.0**126)
_LEVEL = tl.constexpr(2.0**23)  # what a sum of denormal bytes by such weights is still to be multiplied by


@triton.jit
def _row_of_words(words, offset, last):  # type: ignore[no-untyped-def]
    """Bytes offset ... offset + 3, and those from offset + 4 to offset + last, which must be between 0 and 5."""
    word, over = words + (offset >> 3), offset & 7
    a = tl.load(word)
    b = tl.load(word + 1, mask=over + last >= 8, other=0)
    # Whole halves by selection and the rest by shifts of 32 bits: GPUs have none of 64.
    far, shift = over >= 4, ((over & 3) * 8).to(tl.uint64)
    p = tl.where(far, a >> 32, a).to(tl.uint32).to(tl.uint64)
    q = tl.where(far, b, a >> 32).to(tl.uint32).to(tl.uint64)
    r = tl.where(far, b >> 32, b).to(tl.uint32).to(tl.uint64)
    first, second = (p | (q << 32)) >> shift, (q | (r << 32)) >> shift
    return first.to(tl.uint32), second.to(tl.uint32)


@triton.jit  # type: ignore[untyped-decorator]
def _level(word, byte: tl.constexpr):  # type: ignore[no-untyped-def]
    return ((word >> (8 * byte)) & 255).to(tl.float32, bitcast=True)


@triton.jit
def _sample(address, height, width, sx, sy):  # type: ignore[no-untyped-def]
    """Red, green and blue at (sx, sy), in grey levels divided by _LEVEL; zeros outside the image, and a pixel's fade at its edge.

    The taps are the nearest two rows and columns that the image has. Their weights fall to 0 one pixel away, so that at an edge
    those that are not next to (sx, sy) count for nothing.
    """
    wide, tall = width > 1, height > 1
    column = tl.minimum(tl.maximum(sx, 0.0), tl.maximum(width - 2, 0).to(tl.float32)).to(tl.int32)
    row = tl.minimum(tl.maximum(sy, 0.0), tl.maximum(height - 2, 0).to(tl.float32)).to(tl.int32)
    dx, dy = sx - column.to(tl.float32), sy - row.to(tl.float32)
    one, weight = tl.where(wide, 1.0, 0.0), tl.where(tall, _WEIGHT, 0.0)
    left, right = 1.0 - tl.minimum(tl.abs(dx), 1.0), one - one * tl.minimum(tl.abs(dx - 1.0), 1.0)
    top, bottom = _WEIGHT - _WEIGHT * tl.minimum(tl.abs(dy), 1.0), weight - weight * tl.minimum(tl.abs(dy - 1.0), 1.0)
    w00, w01, w10, w11 = left * top, right * top, left * bottom, right * bottom
    words = (address & -8).to(tl.pointer_type(tl.uint64))
    offset = (row * width + column) * 3 + (address & 7).to(tl.int32)
    last, below = tl.where(wide, 5, 2), tl.where(tall, width * 3, 0)
    u, v = _row_of_words(words, offset, last)
    r00, g00, b00, r01, g01, b01 = _level(u, 0), _level(u, 1), _level(u, 2), _level(u, 3), _level(v, 0), _level(v, 1)
    u, v = _row_of_words(words, offset + below, last)
    r10, g10, b10, r11, g11, b11 = _level(u, 0), _level(u, 1), _level(u, 2), _level(u, 3), _level(v, 0), _level(v, 1)
    red = w00 * r00 + w01 * r01 + w10 * r10 + w11 * r11
    green = w00 * g00 + w01 * g01 + w10 * g10 + w11 * g11
    blue = w00 * b00 + w01 * b01 + w10 * b10 + w11 * b11
    return red, green, blue


@triton.jit
def _mixed(red, green, blue, to_red, to_green, to_blue, to_all):  # type: ignore[no-untyped-def]
    return tl.minimum(tl.maximum(to_red * red + to_green * green + to_blue * blue + to_all, 0.0), 255.0)


@triton.jit  # type: ignore[untyped-decorator]
def _store(target, offset, a, b, c, d, mine, byte: tl.constexpr):  # type: ignore[no-untyped-def]
    """Four values of each thread, one after the other."""
    values = tl.reshape(tl.join(tl.join(a, c), tl.join(b, d)), [_THREADS, 4])
    if byte:
        values = tl.minimum(tl.maximum(values, 0.0), 255.0) + 0.5
    tl.store(target + offset, values.to(target.dtype.element_ty), mask=mine)


@triton.jit  # type: ignore[untyped-decorator]
def _warp_kernel(  # type: ignore[no-untyped-def]
    addresses, heights, widths, affine, colour, norm, output, resolution, recolour: tl.constexpr, whole: tl.constexpr
):
    image = tl.program_id(2)
    thread = tl.arange(0, _THREADS)
    address, height, width = tl.load(addresses + image), tl.load(heights + image), tl.load(widths + image)
    a = affine + image * 6
    xx, xy, x0, yx, yy, y0 = tl.load(a), tl.load(a + 1), tl.load(a + 2), tl.load(a + 3), tl.load(a + 4), tl.load(a + 5)
    across = tl.where(tl.abs(yx) > tl.abs(xx) * _STEEP, 2, 3)  # log2
    # Lanes first across, then down, then, where a step's height is reached, to the next patch.
    px = tl.program_id(0) * _TILE_WIDTH + ((thread & (1 << across) - 1) | thread >> across + 4 << across) * 4
    line = thread >> across & 15
    c = colour + image * 12
    unit: tl.constexpr = 1.0 if recolour else _LEVEL
    if recolour:
        rr, rg, rb, r = tl.load(c) * _LEVEL, tl.load(c + 1) * _LEVEL, tl.load(c + 2) * _LEVEL, tl.load(c + 3)
        gr, gg, gb, g = tl.load(c + 4) * _LEVEL, tl.load(c + 5) * _LEVEL, tl.load(c + 6) * _LEVEL, tl.load(c + 7)
        br, bg, bb, b = tl.load(c + 8) * _LEVEL, tl.load(c + 9) * _LEVEL, tl.load(c + 10) * _LEVEL, tl.load(c + 11)
    s0, s1, s2 = tl.load(norm) * unit, tl.load(norm + 1) * unit, tl.load(norm + 2) * unit
    t0, t1, t2 = tl.load(norm + 3), tl.load(norm + 4), tl.load(norm + 5)
    target = output + image.to(tl.int64) * resolution * resolution * 3
    byte: tl.constexpr = output.dtype.element_ty == tl.uint8
    element = tl.arange(0, 4)[None, :]
    x = px.to(tl.float32)
    top = tl.program_id(1) * _TILE_HEIGHT
    end = tl.minimum(top + _TILE_HEIGHT, resolution)
    while top < end:
        py = top + line
        y = py.to(tl.float32)
        sx, sy = xy * y + x0, yy * y + y0
        r0, g0, b0 = _sample(address, height, width, xx * x + sx, yx * x + sy)
        r1, g1, b1 = _sample(address, height, width, xx * (x + 1.0) + sx, yx * (x + 1.0) + sy)
        r2, g2, b2 = _sample(address, height, width, xx * (x + 2.0) + sx, yx * (x + 2.0) + sy)
        r3, g3, b3 = _sample(address, height, width, xx * (x + 3.0) + sx, yx * (x + 3.0) + sy)
        if recolour:
            r0, g0, b0 = _mixed(r0, g0, b0, rr, rg, rb, r), _mixed(r0, g0, b0, gr, gg, gb, g), _mixed(r0, g0, b0, br, bg, bb, b)
            r1, g1, b1 = _mixed(r1, g1, b1, rr, rg, rb, r), _mixed(r1, g1, b1, gr, gg, gb, g), _mixed(r1, g1, b1, br, bg, bb, b)
            r2, g2, b2 = _mixed(r2, g2, b2, rr, rg, rb, r), _mixed(r2, g2, b2, gr, gg, gb, g), _mixed(r2, g2, b2, br, bg, bb, b)
            r3, g3, b3 = _mixed(r3, g3, b3, rr, rg, rb, r), _mixed(r3, g3, b3, gr, gg, gb, g), _mixed(r3, g3, b3, br, bg, bb, b)
        r0, r1, r2, r3 = r0 * s0 + t0, r1 * s0 + t0, r2 * s0 + t0, r3 * s0 + t0
        g0, g1, g2, g3 = g0 * s1 + t1, g1 * s1 + t1, g2 * s1 + t1, g3 * s1 + t1
        b0, b1, b2, b3 = b0 * s2 + t2, b1 * s2 + t2, b2 * s2 + t2, b3 * s2 + t2
        offset = ((py * resolution + px) * 3)[:, None] + element
        # Where rows are a whole number of fours, one comparison for all four values lets them be stored as one word.
        room = (resolution - px)[:, None] if whole else ((resolution - px) * 3)[:, None] - element
        mine = (py < resolution)[:, None]
        _store(target, offset, r0, g0, b0, r1, mine & (room > 0), byte)
        _store(target, offset + 4, g1, b1, r2, g2, mine & (room > (0 if whole else 4)), byte)
        _store(target, offset + 8, b2, r3, g3, b3, mine & (room > (0 if whole else 8)), byte)
        top += _STEP_HEIGHT


def warp(
    addresses: Tensor,
    heights: Tensor,
    widths: Tensor,
    affine: Tensor,
    colour: Tensor,
    norm: Tensor,
    recolour: bool,
    output: Tensor,
) -> None:
    """Warp B images on the device that `output` is on, in its current stream. All tensors are on that device.

    addresses: (B,) int64, of each image's first byte: uint8 RGB rows without gaps, whether in a stacked batch, in buffers of
    their own or in the resident array. heights, widths: (B,) int32, px. affine: (B, 2, 3) and colour: (B, 3, 4) float32, as
    `augment.draw` gives them. norm: (2, 3) float32, scale and bias per channel. recolour: whether the colour matrices do
    anything. output: (B, R, R, 3) contiguous; float32, bfloat16, float16 or uint8. The caller keeps all of it alive and unwritten
    until the stream has passed this point. An image, and one of the output, has less than 2 GiB; B is below 65,536.
    """
    count, resolution = output.shape[0], output.shape[1]
    if not output.is_contiguous() or output.shape != (count, resolution, resolution, 3):
        raise ValueError(f"output must be a contiguous (B, R, R, 3), not {tuple(output.shape)}")
    grid = (triton.cdiv(resolution, _TILE_WIDTH.value), triton.cdiv(resolution, _TILE_HEIGHT.value), count)
    _warp_kernel[grid](
        addresses, heights, widths, affine, colour, norm, output, resolution, recolour, resolution % 4 == 0, num_warps=4
    )
