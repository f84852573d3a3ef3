"""The retina's disc: found in synthetic discs and real texture of known circle, cropped to, and freed of uneven light."""

from __future__ import annotations

from importlib import resources

import cv2
import numpy as np
import pytest
import simplejpeg
from synthetic_discs import KINDS, synthetic

from fastretina.errors import JpegError
from fastretina.packing.fundus import Disc, NoDisc, crop_to_disc, find_disc, local_contrast
from fastretina.sample.camera import CameraSettings, Eye, render
from fastretina.sample.lesions import LesionSettings


def error(found: Disc, true: Disc) -> float:
    """The worst of centre and radius, in radii."""
    return max(abs(found.x - true.x), abs(found.y - true.y), abs(found.radius - true.radius)) / true.radius


@pytest.fixture(scope="module")
def photo() -> np.ndarray:
    """The real photograph: 1411 x 1411 px, RGB."""
    return simplejpeg.decode_jpeg((resources.files("fastretina.sample") / "retina_cc0.jpg").read_bytes())


PHOTO = Disc(705, 705, 696)  # its retina, as fastretina.sample.retina measured it


@pytest.mark.parametrize("kind", KINDS)
def test_the_circle_of_30_random_photographs_of_each_kind_is_found(kind: str) -> None:
    errors = [error(find_disc(pixels), true) for pixels, true in (synthetic(kind, seed) for seed in range(30))]
    assert max(errors) < 0.015
    assert np.median(errors) < 0.003


@pytest.mark.parametrize(
    "how", [{"overflow": 0.0, "cropped": 0.0}, {"overflow": 0.0, "cropped": 1.0}, {"overflow": 0.0, "notch": 1.0}]
)
def test_the_sample_cameras_radius_is_found(how: dict[str, float]) -> None:
    settings = CameraSettings(field_radius=(241.0, 241.0), **how)  # type: ignore[arg-type]
    for patient in range(8):
        found = find_disc(render(Eye(3, patient, "left", patient % 5), LesionSettings(), settings))
        assert found.radius == pytest.approx(241, rel=0.01)
        assert found.x == pytest.approx(255.5, abs=6)  # the camera's own jitter is 1.5 px
        assert found.y == pytest.approx(255.5, abs=6)


def test_a_disc_wider_than_the_sample_cameras_image_is_found() -> None:
    settings = CameraSettings(overflow=1.0, overflow_radius=(285.0, 285.0), cropped=0.0)
    for patient in range(8):
        found = find_disc(render(Eye(4, patient, "right", patient % 5), LesionSettings(), settings))
        assert found.radius == pytest.approx(285, rel=0.015)


@pytest.mark.parametrize("gain", [1.0, 0.3, 0.1, 0.06])
def test_the_real_photograph_is_found_however_dark(photo: np.ndarray, gain: float) -> None:
    assert error(find_disc((photo * gain).astype(np.uint8)), PHOTO) < 0.01


def test_a_side_that_fades_to_black_does_not_move_the_circle(photo: np.ndarray) -> None:
    shaded = (photo * np.linspace(-0.1, 1, photo.shape[1]).clip(0)[None, :, None]).astype(np.uint8)
    assert error(find_disc(shaded), PHOTO) < 0.015


@pytest.mark.parametrize(("top", "bottom", "left", "right"), [(250, 1200, 0, 1411), (0, 1411, 0, 900), (300, 1411, 250, 1411)])
def test_where_the_frame_cuts_does_not_matter(photo: np.ndarray, top: int, bottom: int, left: int, right: int) -> None:
    true = Disc(PHOTO.x - left, PHOTO.y - top, PHOTO.radius)
    assert error(find_disc(np.ascontiguousarray(photo[top:bottom, left:right])), true) < 0.01


def test_a_red_free_photograph_has_its_disc_in_the_green(photo: np.ndarray) -> None:
    green = np.zeros_like(photo)
    green[..., 1] = photo[..., 1]
    assert error(find_disc(green), PHOTO) < 0.01


def test_the_same_pixels_have_the_same_disc(photo: np.ndarray) -> None:
    assert find_disc(photo) == find_disc(photo.copy())


def frame_filling(photo: np.ndarray) -> dict[str, np.ndarray]:
    y, x = np.mgrid[:400, :600]
    vignette = 180 * (1 - 0.5 * ((x - 330) ** 2 + (y - 180) ** 2) / 360**2).clip(0, 1)
    noise = np.random.default_rng(0).integers(0, 256, (300, 400, 3), dtype=np.uint8)
    return {
        "retina": np.ascontiguousarray(photo[400:1000, 400:1000]),
        "vignette": np.repeat(vignette[..., None], 3, axis=2).astype(np.uint8),
        "noise": noise,
        "blobs": cv2.resize(noise[:6, :8], (600, 400), interpolation=cv2.INTER_CUBIC),
        "white": np.full((64, 64, 3), 255, np.uint8),
        "white line": np.full((1, 200, 3), 255, np.uint8),
        "half": np.pad(np.full((200, 200, 3), 200, np.uint8), ((0, 0), (200, 0), (0, 0))),
        "rectangle": np.pad(np.full((200, 300, 3), 200, np.uint8), ((50, 50), (50, 50), (0, 0))),
        "square": np.pad(np.full((200, 200, 3), 200, np.uint8), ((50, 50), (20, 20), (0, 0))),
    }


@pytest.mark.parametrize("name", ["retina", "vignette", "noise", "blobs", "white", "white line", "half", "rectangle", "square"])
def test_there_is_no_disc_where_no_rim_is_in_sight(name: str, photo: np.ndarray) -> None:
    with pytest.raises(NoDisc, match="no rim of a retina is in sight") as raised:
        find_disc(frame_filling(photo)[name])
    assert raised.value.word == "whole frame"


@pytest.mark.parametrize("shape", [(1, 1), (1, 200), (64, 64), (2000, 3000)])
def test_a_black_image_is_an_error(shape: tuple[int, int]) -> None:
    with pytest.raises(JpegError, match="no retina found") as raised:
        find_disc(np.zeros((*shape, 3), np.uint8))
    assert not isinstance(raised.value, NoDisc)


def test_so_is_a_black_image_with_uneven_noise() -> None:
    for seed in range(20):
        rng = np.random.default_rng(seed)
        y, x = np.mgrid[:320, :480]
        black = rng.uniform(0, 8) * (x / 480) * (y / 320) + rng.uniform(0, 3)
        noisy = black[..., None] + rng.normal(0, rng.uniform(0, 5), (320, 480, 3))
        with pytest.raises(JpegError, match="no retina found"):
            find_disc(noisy.clip(0, 255).astype(np.uint8))


def test_a_crop_that_needs_no_scaling_is_a_slice() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (90, 120, 3), dtype=np.uint8)
    # The square from x = 20 to 84, y = 10 to 74 in pixel edges: its centre is pixel (51.5, 41.5).
    assert np.array_equal(crop_to_disc(pixels, Disc(51.5, 41.5, 32), 64), pixels[10:74, 20:84])


def test_where_the_square_leaves_the_frame_the_crop_is_black() -> None:
    pixels = np.full((40, 120, 3), 255, np.uint8)
    crop = crop_to_disc(pixels, Disc(39.5, 19.5, 60), 120)  # x from -20 to 100, y from -40 to 80
    expected = np.zeros((120, 120, 3), np.uint8)
    expected[40:80, 20:] = 255
    assert np.array_equal(crop, expected)


@pytest.mark.parametrize("size", [16, 97, 512])
def test_the_disc_fills_its_crop(size: int) -> None:
    for seed in range(5):
        pixels, true = synthetic("off-centre", seed)
        crop = crop_to_disc(pixels, true, size)
        assert crop.shape == (size, size, 3)
        if size > 64:
            middle = (size - 1) / 2
            assert error(find_disc(crop), Disc(middle, middle, size / 2)) < max(0.015, 1.2 / (size / 2))


def test_cut_and_whole_photographs_give_the_same_picture(photo: np.ndarray) -> None:
    cut = np.ascontiguousarray(photo[200:1250, :1300])
    crops = []
    for pixels in (photo, cut):
        disc = find_disc(pixels)
        crops.append(crop_to_disc(pixels, disc, 256).astype(int))
    both = np.s_[48:208, 8:230]
    assert np.abs(crops[0] - crops[1])[both].mean() < 1.5


def test_local_contrast_is_grahams_formula_inside_the_disc(photo: np.ndarray) -> None:
    pixels = cv2.resize(photo, (512, 512), interpolation=cv2.INTER_AREA)
    disc = find_disc(pixels)
    average = cv2.GaussianBlur(pixels.astype(np.float64), (0, 0), disc.radius / 30)
    expected = (4 * (pixels - average) + 128).clip(0, 255)
    y, x = np.mgrid[:512, :512]
    inner = np.hypot(x - disc.x, y - disc.y) < 0.8 * disc.radius
    assert np.abs(local_contrast(pixels, disc) - expected)[inner].max() <= 1


def test_an_evenly_coloured_disc_has_no_contrast_up_to_its_rim() -> None:
    y, x = np.mgrid[:300, :300]
    away = np.hypot(x - 149.5, y - 149.5)
    pixels = np.where((away < 140)[..., None], [180, 90, 40], [0, 0, 0]).astype(np.uint8)
    contrast = local_contrast(pixels, Disc(149.5, 149.5, 140))
    assert (contrast[away < 0.95 * 140] == 128).all()
    assert not contrast[away > 140].any()


def test_local_contrast_forgets_a_slow_change_of_light_and_keeps_lesions() -> None:
    y, x = np.mgrid[:400, :400].astype(np.float64)
    retina = 120 + np.random.default_rng(0).normal(0, 4, (400, 400)) - 40 * (np.hypot(x - 150, y - 220) < 3)
    images = [retina, retina + 30 + 0.1 * (x - 200) - 0.05 * (y - 200)]
    even, uneven = (local_contrast(np.repeat(i[..., None], 3, axis=2).clip(0, 255).astype(np.uint8), None) for i in images)
    assert np.abs(even.astype(int) - uneven)[40:-40, 40:-40].mean() < 3  # two roundings to whole grey levels, enlarged 4 times
    assert even[220, 150, 0] < 60
    assert uneven[220, 150, 0] < 60


def test_local_contrast_turns_with_the_image() -> None:
    pixels, true = synthetic("plain", 1)
    side = min(pixels.shape[:2])
    square = np.ascontiguousarray(pixels[:side, :side])
    disc = Disc(true.x, true.y, true.radius)
    turned = local_contrast(np.ascontiguousarray(np.rot90(square)), Disc(true.y, side - 1 - true.x, true.radius))
    assert np.abs(np.rot90(local_contrast(square, disc)).astype(int) - turned).max() <= 1


def test_black_bands_of_a_wide_sensor_stay_black_and_draw_no_line() -> None:
    y, x = np.mgrid[:300, :300]
    lit = (np.hypot(x - 149.5, y - 149.5) < 145) & (np.abs(y - 149.5) < 110)
    contrast = local_contrast(np.where(lit[..., None], [180, 90, 40], [0, 0, 0]).astype(np.uint8), Disc(149.5, 149.5, 145))
    assert not contrast[:39].any()
    assert (contrast[44:256, 149] == 128).all()
    assert set(np.unique(contrast)) == {0, 128}
