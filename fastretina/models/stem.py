"""A ResNet's first convolution and its pooling as a GPU likes them: the same numbers in less time.

At 512 px the stem is where a ResNet18's training step on a GPU goes: cuDNN pads three channels to eight and the forward pass
comes to 39 TFLOP/s, and the backward pass of the pooling asks each of half a billion pixels which windows it was the largest of.

- The convolution takes blocks of 2 x 2 pixels for one of twelve channels (space to depth, as in MLPerf's ResNet50): a 7 x 7 kernel
  with stride 2 is then one of 4 x 4 with stride 1. Four channels of zeros fill them up to sixteen.
- The pooling notes in a byte which of a window's nine was the largest; the backward pass makes 2 x 2 pixels from the four windows
  that they lie in. Two Triton kernels, for channels-last memory.

Parameters, their names and their shapes stay what they are, so that checkpoints do.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor, nn
from torch.nn import functional

_CHANNELS = 16  # of the blocks: 2 x 2 x 3, and four of zeros
_BLOCK = 1024  # values of a program


def accelerate_stem(model: nn.Module) -> None:
    """Have a torchvision ResNet's stem run as described above, on CUDA in channels-last; other networks stay as they are."""
    convolution, pooling = getattr(model, "conv1", None), getattr(model, "maxpool", None)
    if isinstance(convolution, nn.Conv2d) and _is_stem(convolution):
        quicker = SpaceToDepthConvolution(3, convolution.out_channels, 7, stride=2, padding=3, bias=False, device="meta")
        quicker.weight = convolution.weight
        model.conv1 = quicker
    if isinstance(pooling, nn.MaxPool2d) and _is_halving(pooling):
        model.maxpool = HalvingMaxPool(3, stride=2, padding=1)


def _is_stem(convolution: nn.Conv2d) -> bool:
    expected = (3, (7, 7), (2, 2), (3, 3), (1, 1), 1, None)
    found = (convolution.in_channels, convolution.kernel_size, convolution.stride, convolution.padding, convolution.dilation)
    return (*found, convolution.groups, convolution.bias) == expected and convolution.padding_mode == "zeros"


def _is_halving(pooling: nn.MaxPool2d) -> bool:
    found = (pooling.kernel_size, pooling.stride, pooling.padding, pooling.dilation, pooling.ceil_mode, pooling.return_indices)
    return found == (3, 2, 1, 1, False, False)


def _suits(images: Tensor) -> bool:
    return images.is_cuda and images.is_contiguous(memory_format=torch.channels_last)


class SpaceToDepthConvolution(nn.Conv2d):
    """(B, 3, H, W) -> (B, C, ceil(H / 2), ceil(W / 2)): 7 x 7, stride 2, padding 3, no bias."""

    def forward(self, images: Tensor) -> Tensor:
        """What nn.Conv2d gives, but for the order in which products are added."""
        return space_to_depth_convolution(images, self.weight) if _suits(images) else super().forward(images)


class HalvingMaxPool(nn.MaxPool2d):
    """(B, C, H, W) -> (B, C, ceil(H / 2), ceil(W / 2)): 3 x 3, stride 2, padding 1."""

    def forward(self, images: Tensor) -> Tensor:
        """What nn.MaxPool2d gives, with the same gradients: a window's goes to the first of its largest."""
        if torch.is_grad_enabled() and _suits(images):
            pooled: Tensor = max_pool(images)[0]
            return pooled
        return super().forward(images)  # type: ignore[no-any-return]


def space_to_depth_convolution(images: Tensor, weight: Tensor) -> Tensor:
    """(B, 3, H, W) and (C, 3, 7, 7) -> (B, C, ceil(H / 2), ceil(W / 2)), with stride 2 and padding 3."""
    count, channels, height, width = images.shape
    # Blocks that the windows need, two of padding before the first of the image.
    rows, columns = (height + 1) // 2 + 3, (width + 1) // 2 + 3
    padded = functional.pad(images, (4, 2 * columns - 4 - width, 4, 2 * rows - 4 - height))
    blocks = padded.reshape(count, channels, rows, 2, columns, 2).permute(0, 3, 5, 1, 2, 4)
    blocks = blocks.reshape(count, 4 * channels, rows, columns)
    eight = functional.pad(weight, (1, 0, 1, 0))  # a window begins with the second row of its first block
    taps = eight.reshape(-1, channels, 4, 2, 4, 2).permute(0, 3, 5, 1, 2, 4).reshape(-1, 4 * channels, 4, 4)
    spare = (0, 0, 0, 0, 0, _CHANNELS - 4 * channels)
    blocks, taps = (functional.pad(part, spare).contiguous(memory_format=torch.channels_last) for part in (blocks, taps))
    return functional.conv2d(blocks, taps)


@triton.jit  # type: ignore[untyped-decorator]
def _pool_kernel(images, pooled, winners, height, width, out_height, out_width, channels: tl.constexpr, block: tl.constexpr):  # type: ignore[no-untyped-def]
    """One row of windows: the largest of each, and its number from 0 to 8. Row, part of the row, image: the program's place."""
    line, image = tl.program_id(0), tl.program_id(2).to(tl.int64)
    value = tl.program_id(1) * block + tl.arange(0, block)
    column, channel = value // channels, value % channels
    mine = column < out_width
    source = images + image * height * width * channels
    best = tl.full([block], float("-inf"), tl.float32)
    # Where all are minus infinity the first that lies in the image.
    winner = tl.where(column == 0, 1, 0) + tl.where(line == 0, 3, 0)
    for tap in tl.static_range(9):
        y, x = line * 2 + tap // 3 - 1, column * 2 + (tap % 3 - 1)
        there = mine & (y >= 0) & (y < height) & (x >= 0) & (x < width)
        level = tl.load(source + (y * width + x) * channels + channel, mask=there, other=float("-inf")).to(tl.float32)
        # As torch has it: of several numbers that are none, the last.
        larger = (level > best) | (level != level)
        best = tl.where(larger, level, best)
        winner = tl.where(larger, tap, winner)
    target = (image * out_height + line) * out_width * channels + value
    tl.store(pooled + target, best.to(pooled.dtype.element_ty), mask=mine)
    tl.store(winners + target, winner.to(tl.uint8), mask=mine)


@triton.jit  # type: ignore[untyped-decorator]
def _window(gradients, winners, row, column, value, out_height, out_width, channels: tl.constexpr):  # type: ignore[no-untyped-def]
    """The gradient of a window, and the number of its largest; zeros where there is none."""
    there = (row < out_height) & (column < out_width)
    place = row * out_width * channels + value
    gradient = tl.load(gradients + place, mask=there, other=0.0).to(tl.float32)
    return gradient, tl.load(winners + place, mask=there, other=255)


@triton.jit  # type: ignore[untyped-decorator]
def _pool_backward_kernel(  # type: ignore[no-untyped-def]
    gradients, winners, result, height, width, out_height, out_width, channels: tl.constexpr, block: tl.constexpr
):
    """Two rows of pixels: each 2 x 2 of them from the four windows that they lie in."""
    row, image = tl.program_id(0), tl.program_id(2).to(tl.int64)
    value = tl.program_id(1) * block + tl.arange(0, block)
    column, channel = value // channels, value % channels
    gradients += image * out_height * out_width * channels
    winners += image * out_height * out_width * channels
    g00, w00 = _window(gradients, winners, row, column, value, out_height, out_width, channels)
    g01, w01 = _window(gradients, winners, row, column + 1, value + channels, out_height, out_width, channels)
    g10, w10 = _window(gradients, winners, row + 1, column, value, out_height, out_width, channels)
    g11, w11 = _window(gradients, winners, row + 1, column + 1, value + channels, out_height, out_width, channels)
    # Pixels of even rows and columns are the middle of one window; the others lie at the edge of two, or at the corner of four.
    first = tl.where(w00 == 4, g00, 0.0)
    second = tl.where(w00 == 5, g00, 0.0) + tl.where(w01 == 3, g01, 0.0)
    third = tl.where(w00 == 7, g00, 0.0) + tl.where(w10 == 1, g10, 0.0)
    fourth = tl.where(w00 == 8, g00, 0.0) + tl.where(w01 == 6, g01, 0.0)
    fourth += tl.where(w10 == 2, g10, 0.0) + tl.where(w11 == 0, g11, 0.0)
    y, x = row * 2, column * 2
    target = result + image * height * width * channels + (y * width + x) * channels + channel
    element = result.dtype.element_ty
    tl.store(target, first.to(element), mask=x < width)
    tl.store(target + channels, second.to(element), mask=x + 1 < width)
    below = target + width * channels
    tl.store(below, third.to(element), mask=(x < width) & (y + 1 < height))
    tl.store(below + channels, fourth.to(element), mask=(x + 1 < width) & (y + 1 < height))


def _channels_last(images: Tensor) -> Tensor:
    return images.contiguous(memory_format=torch.channels_last)


def _empty(like: Tensor, height: int, width: int, dtype: torch.dtype) -> Tensor:
    """(B, C, height, width) in channels-last memory on the same device."""
    count, channels = like.shape[:2]
    return like.new_empty((count, height, width, channels), dtype=dtype).permute(0, 3, 1, 2)


@torch.library.custom_op("fastretina::max_pool", mutates_args=())
def max_pool(images: Tensor) -> tuple[Tensor, Tensor]:
    """(B, C, H, W) float -> (B, C, ceil(H / 2), ceil(W / 2)) of the same type, and uint8: which of a window's nine, row by row.

    Both in channels-last memory. On a CPU with Triton's interpreter. An image has less than 2^31 values.
    """
    images = _channels_last(images)
    count, channels, height, width = images.shape
    out_height, out_width = (height + 1) // 2, (width + 1) // 2
    pooled = _empty(images, out_height, out_width, images.dtype)
    winners = _empty(images, out_height, out_width, torch.uint8)
    grid = (out_height, triton.cdiv(out_width * channels, _BLOCK), count)
    _pool_kernel[grid](images, pooled, winners, height, width, out_height, out_width, channels, _BLOCK, num_warps=4)
    return pooled, winners


@max_pool.register_fake
def _max_pool_shapes(images: Tensor) -> tuple[Tensor, Tensor]:
    height, width = ((side + 1) // 2 for side in images.shape[2:])
    return _empty(images, height, width, images.dtype), _empty(images, height, width, torch.uint8)


@torch.library.custom_op("fastretina::max_pool_backward", mutates_args=())
def max_pool_backward(gradients: Tensor, winners: Tensor, height: int, width: int) -> Tensor:
    """The gradient of `max_pool`'s images (B, C, height, width), from that of what it made; in channels-last memory."""
    gradients = _channels_last(gradients)
    count, channels, out_height, out_width = gradients.shape
    result = _empty(gradients, height, width, gradients.dtype)
    grid = (out_height, triton.cdiv(out_width * channels, _BLOCK), count)
    _pool_backward_kernel[grid](
        gradients, winners, result, height, width, out_height, out_width, channels, _BLOCK, num_warps=4
    )  # fmt: skip
    return result


@max_pool_backward.register_fake
def _max_pool_backward_shape(gradients: Tensor, winners: Tensor, height: int, width: int) -> Tensor:
    return _empty(gradients, height, width, gradients.dtype)


def _remember(ctx: Any, inputs: tuple[Tensor], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(output[1])
    ctx.shape = inputs[0].shape[2:]
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, gradients: Tensor | None, _: None) -> Tensor | None:
    return None if gradients is None else max_pool_backward(gradients, ctx.saved_tensors[0], *ctx.shape)


max_pool.register_autograd(_backward, setup_context=_remember)
