"""The warp and its parameters: against float64, at right angles, and as a pure function of (seed, epoch, id)."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastretina.errors import UsageError
from fastretina.loading.augment import IMAGENET_MEAN, IMAGENET_STD, Augment, cpu, draw
from fastretina.loading.augment.parameters import affine_matrices, philox4x32, uniforms


def photograph(height: int, width: int, seed: int = 0) -> np.ndarray:
    """Smooth colour fields with fine noise: (height, width, 3) uint8."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width]
    smooth = np.stack([np.sin(x / 17 + c) + np.cos(y / (11 + c)) for c in range(3)], axis=-1) * 50 + 120
    return np.clip(smooth + rng.normal(0, 12, (height, width, 3)), 0, 255).astype(np.uint8)


def padded(image: np.ndarray) -> np.ndarray:
    return np.concatenate([image.reshape(-1), np.full(cpu.SOURCE_PADDING, 255, np.uint8)])


def warp_cpu(image, affine, colour, resolution, dtype=np.float32, norm=None, recolour=True):
    guard = np.full(resolution * resolution * 3 + 64, 77, dtype)
    output = guard[: resolution * resolution * 3].reshape(resolution, resolution, 3)
    columns = cpu.kernel_colour(colour[None])[0]
    norm = cpu.kernel_norm() if norm is None else norm
    cpu.warp(padded(image), image.shape[0], image.shape[1], affine, columns, norm, recolour, output)
    assert (guard[output.size :] == 77).all(), "the warp wrote past its image"
    return output


def single(angle=0.0, flip_x=1.0, flip_y=1.0, zoom=1.0, size=(64, 64), resolution=64) -> np.ndarray:
    one = np.ones(1)
    return affine_matrices(
        resolution,
        one * size[0],
        one * size[1],
        one * np.deg2rad(angle),
        one * flip_x,
        one * flip_y,
        one * zoom,
        np.zeros((2, 1)),
    )[0]


NEUTRAL = np.concatenate([np.eye(3), np.zeros((3, 1))], axis=1).astype(np.float32)


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ([0] * 4, (0, 0), [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([0xFFFFFFFF] * 4, (0xFFFFFFFF, 0xFFFFFFFF), [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            (0xA4093822, 0x299F31D0),
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ],
)
def test_philox_gives_the_published_test_vectors(counter, key, expected):
    result = philox4x32(np.array(counter, np.uint32)[:, None], key)
    assert result[:, 0].tolist() == expected


def test_parameters_depend_on_seed_epoch_id_and_repeat_and_on_nothing_else():
    ids = np.arange(1000)
    whole = uniforms(3, 5, ids)
    assert np.array_equal(whole[:, [7, 900, 4]], uniforms(3, 5, np.array([7, 900, 4])))
    for other in (
        uniforms(4, 5, ids),
        uniforms(3, 6, ids),
        uniforms(3, 5, ids + 2**33),
        uniforms(3, 5, ids, np.ones(1000, np.uint32)),
    ):
        assert (other == whole).mean() < 0.001
    assert np.array_equal(whole, uniforms(3, 5, ids, np.zeros(1000, np.uint32)))


def test_uniforms_are_uniform_and_uncorrelated():
    u = uniforms(0, 0, np.arange(20000))
    assert u.min() >= 0
    assert u.max() < 1
    assert np.abs(u.mean(axis=1) - 0.5).max() < 0.01
    assert np.abs(np.corrcoef(u) - np.eye(12)).max() < 0.04


def test_switching_one_augmentation_on_leaves_the_others_alone():
    size = np.full(8, 64)
    plain = draw(Augment(), 64, size, size, 0, 0, np.arange(8))
    recoloured = draw(Augment(brightness=0.5, saturation=0.5), 64, size, size, 0, 0, np.arange(8))
    assert np.array_equal(plain.affine, recoloured.affine)
    assert not np.array_equal(plain.colour, recoloured.colour)


@pytest.mark.parametrize("setting", [field.name for field in dataclasses.fields(Augment)])
def test_whether_colours_change_is_known_of_every_setting(setting):
    """A colour setting that `recolours` did not see would be drawn, and left out by the warps."""
    size = np.full(200, 64)
    for strength in (0.01, 1.0):
        value = (1.0, 1.0 + strength) if setting == "zoom" else strength
        augment = dataclasses.replace(Augment.none(), **{setting: value})
        assert augment.recolours == (draw(augment, 64, size, size, 0, 0, np.arange(200)).colour != NEUTRAL).any()


def test_colours_are_left_alone_unless_a_setting_changes_them():
    assert not Augment().recolours
    assert not Augment.none().recolours
    assert Augment.full().recolours


def test_rotations_cover_the_circle_and_flips_are_fair():
    size = np.full(4000, 64)
    affine = draw(Augment(), 64, size, size, 1, 2, np.arange(4000)).affine
    flipped = np.linalg.det(affine[:, :, :2]) < 0
    angle = np.rad2deg(np.arctan2(-affine[:, 0, 1], affine[:, 0, 0]))
    assert 0.46 < flipped.mean() < 0.54
    assert np.histogram(angle, bins=8, range=(-180, 180))[0].min() > 400


@pytest.mark.parametrize("quarters", [0, 1, 2, 3])
@pytest.mark.parametrize("flip", [1.0, -1.0])
@pytest.mark.parametrize("side", [64, 63])
def test_right_angles_are_exact(quarters, flip, side):
    image = photograph(side, side)
    affine = single(angle=90.0 * quarters, flip_x=flip, size=(side, side), resolution=side)
    expected = np.rot90(image[:, ::-1] if flip < 0 else image, quarters)
    for recolour in (False, True):
        assert np.array_equal(warp_cpu(image, affine, NEUTRAL, side, np.uint8, recolour=recolour), expected)
    assert np.array_equal(reference.warp(image, affine, NEUTRAL, side), expected)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    height=st.integers(1, 90),
    width=st.integers(1, 90),
    resolution=st.sampled_from([1, 2, 7, 48, 97]),
    recolour=st.booleans(),
)
def test_cpu_warp_agrees_with_float64_for_any_size(seed, height, width, resolution, recolour):
    image = photograph(height, width, seed)
    augment = Augment.full() if recolour else Augment(zoom=(0.5, 3.0), shift=0.4)
    affine, colour = draw(augment, resolution, np.array([width]), np.array([height]), seed, 0, np.array([seed]))
    expected = reference.warp(image, affine[0], colour[0], resolution)
    got = warp_cpu(image, affine[0], colour[0], resolution, recolour=recolour)
    assert np.abs(got - expected).max() < 0.05
    rounded = warp_cpu(image, affine[0], colour[0], resolution, np.uint8, recolour=recolour)
    assert np.abs(rounded - expected).max() < 0.55


def test_the_normalised_output_types_agree_within_their_precision():
    image = photograph(512, 512)
    affine, colour = draw(Augment.full(), 512, np.array([512]), np.array([512]), 0, 0, np.array([5]))
    expected = reference.normalise(reference.warp(image, affine[0], colour[0], 512), IMAGENET_MEAN, IMAGENET_STD)
    norm = cpu.kernel_norm(IMAGENET_MEAN, IMAGENET_STD)
    for storage, dtype, tolerance in [
        (np.float32, torch.float32, 2e-4),
        (np.int16, torch.float16, 2e-3),
        (np.uint16, torch.bfloat16, 1.2e-2),
    ]:
        got = torch.from_numpy(warp_cpu(image, affine[0], colour[0], 512, storage, norm)).view(dtype).double().numpy()
        assert np.abs(got - expected).max() < tolerance


def test_bfloat16_rounds_as_torch_does():
    image = photograph(64, 64)
    norm = cpu.kernel_norm(IMAGENET_MEAN, IMAGENET_STD)
    affine = single(angle=33)
    exact = torch.from_numpy(warp_cpu(image, affine, NEUTRAL, 64, np.float32, norm))
    narrow = torch.from_numpy(warp_cpu(image, affine, NEUTRAL, 64, np.uint16, norm)).view(torch.bfloat16)
    assert torch.equal(exact.to(torch.bfloat16), narrow)


@pytest.mark.parametrize("side", [1, 15, 16, 33, 64, 100, 128])
@pytest.mark.parametrize("storage", [np.float32, np.uint16, np.int16, np.uint8])
@pytest.mark.parametrize("recolour", [False, True])
def test_where_the_output_lies_makes_no_difference_and_nothing_beyond_it_is_written(side, storage, recolour):
    """Rows that begin at a cache line take another way than others; a row's last pixels are fewer than a group."""
    image, norm = photograph(70, 90), cpu.kernel_norm() if storage == np.uint8 else cpu.kernel_norm(IMAGENET_MEAN, IMAGENET_STD)
    affine, colour = draw(Augment.full(), side, np.array([90]), np.array([70]), 0, 0, np.array([3]))
    exact = torch.from_numpy(warp_cpu(image, affine[0], colour[0], side, np.float32, norm, recolour=recolour))
    dtype = {np.uint16: torch.bfloat16, np.int16: torch.float16, np.float32: torch.float32}.get(storage)
    size, guard = side * side * 3, 256
    memory = np.zeros(size * np.dtype(storage).itemsize + 2 * guard + 64, np.uint8)
    for shift in (0, 4):
        memory[:] = 0xA5
        start = guard - memory.ctypes.data % 64 + shift
        end = start + size * np.dtype(storage).itemsize
        output = memory[start:end].view(storage).reshape(side, side, 3)
        cpu.warp(padded(image), 70, 90, affine[0], cpu.kernel_colour(colour)[0], norm, recolour, output)
        assert (memory[:start] == 0xA5).all()
        assert (memory[end:] == 0xA5).all()
        got = torch.from_numpy(output.copy())
        if dtype is None:
            assert torch.equal(got, (exact + 0.5).to(torch.uint8))
        else:
            assert torch.equal(got.view(dtype), exact.to(dtype))


def test_a_source_whose_offsets_do_not_fit_is_refused():
    output = np.empty((4, 4, 3), np.float32)
    with pytest.raises(ValueError, match="2 GB"):
        cpu.warp(
            padded(photograph(4, 4)),
            1 << 15,
            1 << 15,
            single(),
            cpu.kernel_colour(NEUTRAL[None])[0],
            cpu.kernel_norm(),
            False,
            output,
        )


def test_a_rotated_white_image_stays_white_inside_and_black_outside():
    white = np.full((40, 40, 3), 255, np.uint8)
    out = warp_cpu(white, single(angle=45, size=(40, 40), resolution=40), NEUTRAL, 40, np.uint8)
    assert (out[20, 20] == 255).all()
    assert (out[0, 0] == 0).all()


def test_a_wide_image_is_shown_whole_with_black_above_and_below():
    white = np.full((20, 40, 3), 255, np.uint8)
    out = warp_cpu(white, single(size=(40, 20), resolution=40), NEUTRAL, 40, np.uint8)
    assert (out[12:28, 2:38] == 255).all()
    assert (out[:8] == 0).all()
    assert (out[32:] == 0).all()


@pytest.mark.parametrize("wrong", [{"zoom": (0.0, 1.0)}, {"zoom": (2.0, 1.0)}, {"brightness": -0.1}, {"flip_vertical": 1.5}])
def test_impossible_ranges_are_refused(wrong):
    with pytest.raises(UsageError, match=next(iter(wrong))):
        Augment(**wrong)
