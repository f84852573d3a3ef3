"""The warp on a CPU core: bilinear sampling, colour matrix, clamp, normalisation and layout in one pass.

Row by row. First the taps of a row's pixels are brought side by side: of each pixel's two rows of taps the eight bytes that hold
them, by plain loads and stores, since gathers are slow on many CPUs. Then sixteen pixels at a time are made of vectors, one for
each channel and tap, and leave as three cache lines: past the caches, where rows of output begin at a cache line, since a batch is
larger than those, and would only push the source out of them. numba compiles the loops, the vectors are LLVM's (portable: of two
or four registers where there is no AVX-512).

512 x 512 into float32, one core of an Intel Xeon (Emerald Rapids, AVX-512), fastest of 40 rounds: rotated 0.52 ms, with all
augmentation 0.61 ms, where one pixel at a time had taken 0.99 and 1.38 ms.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic
from numpy.typing import NDArray

from fastretina.system.kernel import kernel

# A pixel's taps are loaded eight bytes at a time where six belong to it: sources must be readable this far past their last pixel.
SOURCE_PADDING = 8

_LANES = 16  # pixels to a vector
_LINE = 64  # bytes of a cache line
_GROUP_BYTES = 3 * _LINE  # of output that are made at a time
_ROW_MULTIPLE = 64  # the largest group's pixels, those of uint8
_ROW_BYTES = (
    36  # of a pixel in the row's buffers: taps of the upper row 8, of the lower 8, offset, x, y, weights of x and of y 4 each
)

_FLOAT, _HALF, _I8, _I16, _I32, _I64 = ir.FloatType(), ir.HalfType(), *(ir.IntType(bits) for bits in (8, 16, 32, 64))
_CONTRACT = ("contract", "nsz")
_vector = ir.VectorType  # of an element type and a number of lanes


def _shuffle(builder: Any, one: Any, other: Any, lanes: list[int]) -> Any:
    return builder.shuffle_vector(one, other, ir.Constant(_vector(_I32, len(lanes)), lanes))


def _splat(builder: Any, value: Any) -> Any:
    seed = builder.insert_element(ir.Constant(_vector(value.type, _LANES), ir.Undefined), value, ir.Constant(_I32, 0))
    return _shuffle(builder, seed, seed, [0] * _LANES)


def _constant(element: ir.Type, value: float) -> ir.Constant:
    return ir.Constant(_vector(element, _LANES), [value] * _LANES)


def _offset(builder: Any, address: Any, nbytes: int) -> Any:
    return builder.add(address, ir.Constant(address.type, nbytes))


def _load(builder: Any, address: Any, of: ir.Type) -> Any:
    value = builder.load(builder.inttoptr(address, of.as_pointer()))
    value.align = 1
    return value


def _store(builder: Any, value: Any, address: Any) -> Any:
    stored = builder.store(value, builder.inttoptr(address, value.type.as_pointer()))
    stored.align = 1
    return stored


def _mul_add(builder: Any, a: Any, b: Any, c: Any) -> Any:
    return builder.fadd(builder.fmul(a, b, _CONTRACT), c, _CONTRACT)


def _blend(builder: Any, weight: Any, one: Any, other: Any) -> Any:
    return _mul_add(builder, weight, builder.fsub(other, one, _CONTRACT), one)


def _clamp(builder: Any, value: Any) -> Any:
    """To 0-255."""
    for operator, bound in ((">", _constant(_FLOAT, 0.0)), ("<", _constant(_FLOAT, 255.0))):
        value = builder.select(builder.fcmp_ordered(operator, value, bound), value, bound)
    return value


def _narrow(builder: Any, value: Any, dtype: types.Type) -> Any:
    """Float lanes as the output's element type: float32, int16 (float16's bits) or uint8; for uint16 (bfloat16's bits) twice as
    many, of which the odd ones are meant."""
    if dtype == types.float32:
        return value
    if dtype == types.int16:
        return builder.bitcast(builder.fptrunc(value, _vector(_HALF, _LANES)), _vector(_I16, _LANES))
    if dtype == types.uint8:
        rounded = builder.fadd(_clamp(builder, value), _constant(_FLOAT, 0.5))
        return builder.trunc(builder.fptosi(rounded, _vector(_I32, _LANES)), _vector(_I8, _LANES))
    # bfloat16: round to nearest, ties to even, by adding just below half of what is cut off. With AVX512-BF16's own conversion the
    # whole warp takes 1.1 times as long (Emerald Rapids).
    bits = builder.bitcast(value, _vector(_I32, _LANES))
    odd = builder.and_(builder.lshr(bits, _constant(_I32, 16)), _constant(_I32, 1))
    return builder.bitcast(builder.add(bits, builder.add(odd, _constant(_I32, 0x7FFF))), _vector(_I16, 2 * _LANES))


@intrinsic  # type: ignore[untyped-decorator]
def _locate(
    typing_context: Any, buffer: Any, part: Any, x: Any, start_x: Any, start_y: Any, step_x: Any, step_y: Any, stride: Any
) -> Any:
    """Where in the source the pixels x, x + 1, ... of a row lie: start + step * x.

    buffer: address of five parts of `part` bytes, which from pixel x on get int32 offsets in bytes (meaningless outside of the
    source), columns and rows of the upper left taps, and float32 weights of the right and lower taps.
    stride: bytes to the next row.
    """
    signature = types.void(*[types.intp] * 3, *[types.float32] * 4, types.intp)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        buffer, part, x, start_x, start_y, step_x, step_y, stride = arguments
        floats, integers = _vector(_FLOAT, _LANES), _vector(_I32, _LANES)
        floor = cgutils.get_or_insert_function(builder.module, ir.FunctionType(floats, [floats]), f"llvm.floor.v{_LANES}f32")
        lanes = builder.add(_splat(builder, builder.trunc(x, _I32)), ir.Constant(integers, list(range(_LANES))))
        wholes, fractions = [], []
        for start, step in ((start_x, step_x), (start_y, step_y)):
            place = _mul_add(builder, _splat(builder, step), builder.sitofp(lanes, floats), _splat(builder, start))
            whole = builder.call(floor, [place])
            wholes.append(builder.fptosi(whole, integers))
            fractions.append(builder.fsub(place, whole))
        column, row = wholes
        above = builder.mul(row, _splat(builder, builder.trunc(stride, _I32)))
        offsets = builder.add(above, builder.mul(column, _constant(_I32, 3)))
        address = builder.add(buffer, builder.mul(x, ir.Constant(x.type, 4)))
        for values in (offsets, *wholes, *fractions):
            _store(builder, values, address)
            address = builder.add(address, part)
        return context.get_dummy_value()

    return signature, generate


@intrinsic  # type: ignore[untyped-decorator]
def _bring_two(typing_context: Any, offsets: Any, source: Any, stride: Any, upper: Any, lower: Any) -> Any:
    """Copy the taps of two neighbours to the addresses upper and lower, eight bytes each. offsets: address of their two."""
    signature = types.void(*[types.intp] * 5)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        offsets, source, stride, upper, lower = arguments
        taps = [
            builder.add(source, builder.sext(_load(builder, _offset(builder, offsets, 4 * pixel), _I32), source.type))
            for pixel in range(2)
        ]
        # All loads before the stores, of which LLVM cannot know that they change no source; stores to one line follow each other.
        rows = [[_load(builder, address, _I64) for address in taps]]
        rows.append([_load(builder, builder.add(address, stride), _I64) for address in taps])
        for row, to in zip(rows, (upper, lower), strict=True):
            for pixel, eight in enumerate(row):
                _store(builder, eight, _offset(builder, to, 8 * pixel))
        return context.get_dummy_value()

    return signature, generate


def _channels(builder: Any, address: Any) -> list[Any]:
    """The six floats of each pixel's row of taps: red, green, blue of the left one, and of the right one."""
    words = _load(builder, address, _vector(_I32, 2 * _LANES))
    first, second = (_shuffle(builder, words, words, list(range(half, 2 * _LANES, 2))) for half in range(2))
    channels = []
    for word, bits in ((first, 0), (first, 8), (first, 16), (first, 24), (second, 0), (second, 8)):
        byte = builder.and_(builder.lshr(word, _constant(_I32, bits)), _constant(_I32, 255))
        channels.append(builder.sitofp(byte, _vector(_FLOAT, _LANES)))
    return channels


def _pixels(builder: Any, upper: Any, lower: Any, x_weights: Any, y_weights: Any, norm: Any, colour: Any | None) -> list[Any]:
    """Sixteen pixels: 48 floats, channel by channel within a pixel, in three vectors. All but builder are addresses."""
    down, right = (_load(builder, address, _vector(_FLOAT, _LANES)) for address in (y_weights, x_weights))
    rows = [
        _blend(builder, down, above, below)
        for above, below in zip(_channels(builder, upper), _channels(builder, lower), strict=True)
    ]
    channels = [_blend(builder, right, rows[channel], rows[channel + 3]) for channel in range(3)]

    def scalar(address: Any, number: int) -> Any:
        return _splat(builder, _load(builder, _offset(builder, address, 4 * number), _FLOAT))

    if colour is not None:
        mixed = []
        for channel in range(3):
            total = scalar(colour, 12 + channel)
            for other in range(3):
                total = _mul_add(builder, channels[other], scalar(colour, 4 * other + channel), total)
            mixed.append(_clamp(builder, total))
        channels = mixed
    channels = [_mul_add(builder, channels[c], scalar(norm, c), scalar(norm, 4 + c)) for c in range(3)]
    two = _shuffle(builder, channels[0], channels[1], list(range(2 * _LANES)))
    third = _shuffle(builder, channels[2], channels[2], list(range(2 * _LANES)))
    order = [(element % 3) * _LANES + element // 3 for element in range(3 * _LANES)]
    return [_shuffle(builder, two, third, order[first : first + _LANES]) for first in range(0, 3 * _LANES, _LANES)]


@intrinsic(prefer_literal=True)  # type: ignore[untyped-decorator]
def _group(
    typing_context: Any, output: Any, upper: Any, lower: Any, x_weights: Any, y_weights: Any, norm: Any, colour: Any, target: Any,
    recolour: Any, past_caches: Any,
) -> Any:  # fmt: skip
    """Write three cache lines of pixels of output's dtype at address `target`, a multiple of 64 where past_caches.

    upper, lower, x_weights, y_weights: addresses of their taps and weights. norm: address of 4 scales and 4 biases. colour: address
    of 4 x 4 floats, column by column; read only where `recolour` (a literal, as past_caches is) is true.
    """
    signature = types.void(output, *[types.intp] * 7, recolour, past_caches)
    recolours, streams = bool(recolour.literal_value), bool(past_caches.literal_value)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        _, upper, lower, x_weights, y_weights, norm, colour, target, _, _ = arguments
        dtype = signature.args[0].dtype
        made: list[Any] = []
        for first in range(0, _GROUP_BYTES * 8 // dtype.bitwidth // 3, _LANES):
            above, below = (_offset(builder, address, 8 * first) for address in (upper, lower))
            right, down = (_offset(builder, address, 4 * first) for address in (x_weights, y_weights))
            found = _pixels(builder, above, below, right, down, norm, colour if recolours else None)
            made += [_narrow(builder, floats, dtype) for floats in found]
        while len(made) > 3:
            pairs = zip(made[::2], made[1::2], strict=True)
            meant = slice(1, None, 2) if dtype == types.uint16 else slice(None)
            made = [_shuffle(builder, one, other, list(range(2 * one.type.count))[meant]) for one, other in pairs]
        for number, line in enumerate(made):
            stored = _store(builder, line, _offset(builder, target, number * _LINE))
            if streams:
                stored.align = _LINE
                stored.set_metadata("nontemporal", builder.module.add_metadata([ir.Constant(_I32, 1)]))
        return context.get_dummy_value()

    return signature, generate


@intrinsic  # type: ignore[untyped-decorator]
def _fence(typing_context: Any) -> Any:
    """What was stored past the caches is there for whoever is told so afterwards."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        builder.fence("seq_cst")
        return context.get_dummy_value()

    return types.void(), generate


@njit(nogil=True, error_model="numpy", inline="always")  # type: ignore[untyped-decorator]
def _clip_to_source(start: float, step: float, limit: int, low: float, high: float) -> tuple[float, float]:
    """Narrow [low, high] to the x where 0 <= start + step * x < limit."""
    if step == 0:
        return (low, high) if 0 <= start < limit else (1.0, 0.0)
    a, b = -start / step, (limit - start) / step
    return max(low, min(a, b)), min(high, max(a, b))


@njit(nogil=True, error_model="numpy", inline="always")  # type: ignore[untyped-decorator]
def _span(start_x: float, step_x: float, width: int, start_y: float, step_y: float, height: int, columns: int) -> tuple[int, int]:
    """First column, and one past the last, where 0 <= start + step * x < width, and the same of y. Meaningless if none is."""
    low, high = _clip_to_source(start_x, step_x, width, 0.0, columns - 1.0)
    low, high = _clip_to_source(start_y, step_y, height, low, high)
    return int(np.ceil(low)), int(np.floor(high)) + 1


@njit(nogil=True, error_model="numpy")  # type: ignore[untyped-decorator]
def _rim(source: NDArray[np.uint8], height: int, width: int, column: int, row: int) -> tuple[Any, Any]:
    """The taps of a pixel on the rim, whose upper left one is there: eight bytes of each row, black where the source has none."""
    upper, lower = np.uint64(0), np.uint64(0)
    for byte in range(6):
        x = column + byte // 3
        if 0 <= x < width:
            at, shift = 3 * x + byte % 3, np.uint64(8 * byte)
            if 0 <= row < height:
                upper |= np.uint64(source[row * width * 3 + at]) << shift
            if 0 <= row + 1 < height:
                lower |= np.uint64(source[(row + 1) * width * 3 + at]) << shift
    return upper, lower


@kernel(error_model="numpy", fastmath={"contract", "nsz"})
def warp(
    source: NDArray[np.uint8],
    height: int,
    width: int,
    affine: NDArray[np.float64],
    colour: NDArray[np.float32],
    norm: NDArray[np.float32],
    recolour: bool,
    output: NDArray[Any],
) -> None:
    """Warp one image into output (R, R, 3), C-contiguous; releases the GIL.

    source: (>= height * width * 3 + SOURCE_PADDING,) uint8, RGB rows without gaps, below 2 GB. affine: (2, 3) float64, output to
    source pixels. colour: (4, 4) float32, transposed and padded (see `kernel_colour`), used when recolour. norm: (2, 4) float32,
    scale and bias per channel. output: float32, uint8, uint16 (written as bfloat16) or int16 (written as float16).
    """
    rows, columns = output.shape[0], output.shape[1]
    stride = width * 3
    # Signed: numba would do arithmetic between the unsigned addresses and signed offsets in float64.
    base, norm_at, colour_at = np.intp(source.ctypes.data), np.intp(norm.ctypes.data), np.intp(colour.ctypes.data)
    target, pixel_bytes = np.intp(output.ctypes.data), np.intp(3 * output.itemsize)
    padded = (columns + _ROW_MULTIPLE - 1) // _ROW_MULTIPLE * _ROW_MULTIPLE
    memory = np.zeros(padded * _ROW_BYTES + _GROUP_BYTES + _LINE, np.uint8)
    memory = memory[-np.intp(memory.ctypes.data) % _LINE :]
    uppers, lowers = memory[: 8 * padded].view(np.uint64), memory[8 * padded : 16 * padded].view(np.uint64)
    lefts, tops = memory[20 * padded : 24 * padded].view(np.int32), memory[24 * padded : 28 * padded].view(np.int32)
    upper = np.intp(memory.ctypes.data)
    lower, offsets = upper + 8 * padded, upper + 16 * padded
    x_weights, y_weights = upper + 28 * padded, upper + 32 * padded
    group = _GROUP_BYTES // pixel_bytes  # pixels
    last = columns // group * group  # from here on a row has less than a group
    flat, spare_at = output.reshape(-1), upper + _ROW_BYTES * padded  # a multiple of 64, as `padded` is
    spare = memory[_ROW_BYTES * padded : _ROW_BYTES * padded + _GROUP_BYTES].view(output.dtype)
    past_caches = target % _LINE == 0 and columns * pixel_bytes % _LINE == 0
    step_x, step_y = np.float32(affine[0, 0]), np.float32(affine[1, 0])
    if height * stride >= 1 << 31:
        raise ValueError("the source has 2 GB or more")
    for y in range(rows):
        start_x = np.float32(affine[0, 1] * y + affine[0, 2])
        start_y = np.float32(affine[1, 1] * y + affine[1, 2])
        for x in range(0, columns, _LANES):
            _locate(offsets, 4 * padded, x, start_x, start_y, step_x, step_y, stride)
        # The columns whose four taps all lie inside, and those of which any does. Solved in floating point, then mended at both
        # ends on the very integers that address memory; those are monotonic in x, so the ends vouch for all between them.
        begin, end = _span(start_x, step_x, width - 1, start_y, step_y, height - 1, columns)
        while begin < end and not (0 <= lefts[begin] < width - 1 and 0 <= tops[begin] < height - 1):
            begin += 1
        while begin < end and not (0 <= lefts[end - 1] < width - 1 and 0 <= tops[end - 1] < height - 1):
            end -= 1
        rim_begin, rim_end = _span(start_x + 1, step_x, width + 1, start_y + 1, step_y, height + 1, columns)
        if rim_begin >= rim_end:  # or so it seems
            rim_begin, rim_end = 0, columns
        if begin >= end:
            begin = end = rim_begin
        end -= (end - begin) % 2  # they are brought by two
        rim_begin, rim_end = min(rim_begin, begin), max(rim_end, end)
        while rim_begin > 0 and -1 <= lefts[rim_begin - 1] < width and -1 <= tops[rim_begin - 1] < height:
            rim_begin -= 1
        while rim_end < columns and -1 <= lefts[rim_end] < width and -1 <= tops[rim_end] < height:
            rim_end += 1
        for x in range(begin, end, 2):
            _bring_two(offsets + 4 * x, base, stride, upper + 8 * x, lower + 8 * x)
        for x in range(rim_begin, begin):
            uppers[x], lowers[x] = _rim(source, height, width, lefts[x], tops[x])
        for x in range(end, rim_end):
            uppers[x], lowers[x] = _rim(source, height, width, lefts[x], tops[x])
        for buffer in (uppers, lowers):
            buffer[:rim_begin] = 0
            buffer[rim_end:columns] = 0
        for x in range(0, columns, group):
            up, low, right, down = upper + 8 * x, lower + 8 * x, x_weights + 4 * x, y_weights + 4 * x
            to = target + x * pixel_bytes if x < last else spare_at
            if recolour and past_caches:
                _group(output, up, low, right, down, norm_at, colour_at, to, True, True)
            elif recolour:
                _group(output, up, low, right, down, norm_at, colour_at, to, True, False)
            elif past_caches:
                _group(output, up, low, right, down, norm_at, colour_at, to, False, True)
            else:
                _group(output, up, low, right, down, norm_at, colour_at, to, False, False)
        for element in range(3 * (columns - last)):
            flat[3 * (y * columns + last) + element] = spare[element]
        target += columns * pixel_bytes
    if past_caches:
        _fence()


def kernel_colour(colour: NDArray[np.float32]) -> NDArray[np.float32]:
    """(B, 3, 4) colour matrices as the (B, 4, 4) columns that `warp` loads."""
    columns = np.zeros((len(colour), 4, 4), np.float32)
    columns[:, :, :3] = colour.transpose(0, 2, 1)
    return columns


def kernel_norm(mean: tuple[float, ...] = (0.0,) * 3, std: tuple[float, ...] = (1 / 255,) * 3) -> NDArray[np.float32]:
    """(2, 4) float32 scale and bias that turn 0-255 into (v / 255 - mean) / std; by default v as it is. mean and std on 0-1."""
    norm = np.zeros((2, 4), np.float32)
    norm[0, :3] = 1 / (255 * np.asarray(std))
    norm[1, :3] = -np.asarray(mean) / np.asarray(std)
    return norm
