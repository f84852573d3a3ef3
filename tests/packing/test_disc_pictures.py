"""The disc in pictures as they come: on a slide, on paper, beside text, in the dark; two eyes; and pictures that have none."""

from __future__ import annotations

import json
import math
from dataclasses import astuple
from pathlib import Path

import cv2
import numpy as np
import pytest
import simplejpeg
from disc_pictures import KINDS, NO_DISC, WITH_DISC, photo, picture, retina
from discs import DiscsConfig, error_of, main, measure

from fastretina.errors import JpegError
from fastretina.packing.fundus import Disc, NoDisc, crop_to_disc, find_disc
from fastretina.packing.preprocessing import Preparation
from fastretina.packing.reencode import reencode, square


def word_of(pixels: np.ndarray) -> str:
    with pytest.raises(NoDisc) as raised:
        find_disc(pixels)
    return raised.value.word


@pytest.mark.parametrize("kind", WITH_DISC)
def test_the_circle_of_20_pictures_of_each_kind_is_found(kind: str) -> None:
    errors = [error_of(find_disc(pixels), true) for pixels, (true,) in (picture(kind, number) for number in range(20))]
    assert max(errors) < 0.02
    assert np.median(errors) < 0.005


def test_two_eyes_in_one_montageare_recognised_and_said_in_plain_words() -> None:
    assert {word_of(picture("two eyes", number)[0]) for number in range(30)} == {"two eyes"}
    with pytest.raises(NoDisc, match="two eyes or more; cut it into one picture for each eye"):
        find_disc(picture("two eyes", 0)[0])


def test_two_eyes_are_not_packed_and_the_message_says_what_to_do() -> None:
    jpeg = simplejpeg.encode_jpeg(picture("two eyes", 0)[0])
    with pytest.raises(JpegError, match="two eyes or more"):
        reencode(jpeg, 64, Preparation("fundus"))
    assert square(jpeg, 64, Preparation("fundus")).no_crop == "two eyes"


def eye(radius: int, gain: float = 1.0) -> np.ndarray:
    """The real photograph, its disc of that radius in a black square."""
    side = round(2.1 * radius)
    pixels = retina(np.random.default_rng(1), side, side, Disc(side / 2, side / 2, radius))
    return (gain * pixels).clip(0, 255).astype(np.uint8)


@pytest.mark.parametrize(("small", "gain", "two"), [(100, 1.0, True), (85, 1.0, True), (100, 0.3, True), (40, 1.0, False)])
def test_two_eyes_are_two_discs_of_similar_size_however_differently_lit(small: int, gain: float, two: bool) -> None:
    montage = np.zeros((230, 480, 3), np.uint8)
    for left, part in ((5, eye(100)), (240, eye(small, gain))):
        montage[5 : 5 + len(part), left : left + len(part)] = part
    if two:
        assert word_of(montage) == "two eyes"
    else:
        assert error_of(find_disc(montage), Disc(5 + 105, 5 + 105, 100)) < 0.01


@pytest.mark.parametrize("kind", [kind for kind in NO_DISC if kind != "front of the eye"])
def test_a_picture_that_shows_no_rim_has_no_disc(kind: str) -> None:
    assert {word_of(picture(kind, number)[0]) for number in range(12)} == {"whole frame"}


def test_the_front_of_an_eye_is_rarely_taken_for_a_retina() -> None:
    row = measure("front of the eye", (picture("front of the eye", number) for number in range(25)))
    assert row.false_discs <= 3  # an iris is a disc, too


@pytest.mark.parametrize(("degrees", "found"), [(90, False), (110, False), (150, True), (180, True)])
def test_an_arc_of_less_than_120_degrees_is_not_a_disc(degrees: float, found: bool) -> None:
    radius, half = 280.0, math.radians(degrees) / 2
    width, height = round(2 * radius * math.sin(half)) + 12, round(radius * (1 - math.cos(half))) + 12
    true = Disc(width / 2, radius + 8, radius)
    pixels = retina(np.random.default_rng(2), width, height, true).astype(np.uint8)
    if found:
        assert error_of(find_disc(pixels), true) < 0.02
    else:
        assert word_of(pixels) == "whole frame"


def test_a_black_photograph_on_a_slide_has_no_disc() -> None:
    slide = np.full((400, 600, 3), 128, np.uint8)
    slide[50:350, 120:480] = 3
    assert word_of(slide) == "whole frame"


@pytest.mark.parametrize("border", [(255, 255, 255), (128, 128, 128), (30, 60, 160), (230, 200, 160)])
def test_a_border_of_any_colour_does_not_move_the_circle(border: tuple[int, int, int]) -> None:
    small = cv2.resize(photo(), (500, 500), interpolation=cv2.INTER_AREA)
    framed = np.pad(small, ((60, 90), (200, 40), (0, 0)))
    outside = np.ones(framed.shape[:2], bool)
    outside[60:560, 200:700] = False
    framed[outside] = border
    alone, inside = find_disc(small), find_disc(framed)
    assert astuple(inside) == pytest.approx((alone.x + 200, alone.y + 60, alone.radius), abs=1.0)


def test_the_same_montagehas_the_same_disc() -> None:
    pixels, _ = picture("frame in frame", 3)
    assert find_disc(pixels) == find_disc(pixels.copy())


@pytest.mark.parametrize("kind", [kind for kind in WITH_DISC if kind != "dark"])  # too few of its pixels are left to average noise
def test_a_crops_own_disc_is_the_one_that_it_was_made_for(kind: str) -> None:
    for number in range(6):
        pixels, _ = picture(kind, number)
        crop = crop_to_disc(pixels, find_disc(pixels), 256)
        assert error_of(find_disc(crop), Disc(127.5, 127.5, 128)) < 0.025


def test_the_benchmark_counts_what_is_right_of_each_kind(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(DiscsConfig(count=1, json=tmp_path / "discs.json"))
    rows = {row["kind"]: row for row in json.loads((tmp_path / "discs.json").read_text())}
    first = rows.pop("synthetic cameras")
    assert (first["pictures"], first["right"], first["false_discs"]) == (240, 240, 0)
    assert first["worst_error"] < 0.5
    assert list(rows) == list(KINDS)
    assert {(row["pictures"], row["right"]) for row in rows.values()} == {(1, 1)}
    assert "| two eyes | 1 | 100.0 % |" in capsys.readouterr().out
