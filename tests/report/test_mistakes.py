"""The most confident mistakes: the right ones, in order, each with its own picture."""

from __future__ import annotations

import numpy as np
import pytest
import simplejpeg
import torch

from fastretina import open_beton, write_beton
from fastretina.beton.reader import Beton
from fastretina.grading import RETINOPATHY
from fastretina.metrics.predictions import Predictions
from fastretina.report.mistakes import SIDE, Mistake, confident_mistakes, mistakes_section, thumbnail


def answers(beton: Beton, wrong: dict[int, tuple[int, float]]) -> Predictions:
    """Right with 90 % everywhere, but for `wrong`: index -> (answer, probability)."""
    labels = torch.from_numpy(np.asarray(beton.labels).astype(np.int64))
    given, sure = labels.clone(), torch.full((len(labels),), 0.9)
    for index, (answer, probability) in wrong.items():
        given[index], sure[index] = answer, probability
    spread = ((1 - sure) / 4)[:, None].expand(-1, 5).clone()
    spread.scatter_(1, given[:, None], sure[:, None])
    return Predictions(spread.log(), labels, torch.from_numpy(np.asarray(beton.ids).astype(np.int64)))


def test_the_surest_mistakes_come_first_with_name_grades_and_their_own_picture(tiny_betons):
    with open_beton(tiny_betons.test) as beton:
        found = confident_mistakes(answers(beton, {3: (0, 0.5), 7: (4, 0.99), 11: (2, 0.7)}), beton, shown=2)
        names = [beton.names[7], beton.names[11]]
    assert [mistake.name for mistake in found] == names
    assert [(mistake.grade, mistake.predicted) for mistake in found] == [(2, 4), (1, 2)]
    assert [mistake.probability for mistake in found] == pytest.approx([0.99, 0.7], abs=1e-6)
    for mistake in found:
        original = simplejpeg.decode_jpeg((tiny_betons.test_images / f"{mistake.name}.jpeg").read_bytes())
        shown = simplejpeg.decode_jpeg(mistake.thumbnail)
        assert np.abs(shown.astype(int) - original).mean() < 8


def test_large_images_are_shrunken_and_keep_their_shape(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    pixels = np.full((600, 600, 3), (200, 60, 40), np.uint8)
    pixels[:, 300:] = (60, 200, 40)
    (folder / "1_left.jpeg").write_bytes(simplejpeg.encode_jpeg(pixels))
    (folder / "labels.csv").write_text("image,level\n1_left,0\n")
    write_beton(tmp_path / "one.beton", images=folder, labels=folder / "labels.csv", size=600, workers=1)
    with open_beton(tmp_path / "one.beton") as beton:
        assert simplejpeg.decode_jpeg(thumbnail(beton, 0)).shape == (SIDE, SIDE, 3)


def test_a_model_without_mistakes_has_no_such_section(tiny_betons):
    with open_beton(tiny_betons.test) as beton:
        assert mistakes_section(confident_mistakes(answers(beton, {}), beton), RETINOPATHY) is None


def test_names_cannot_put_markup_into_the_section():
    text = "".join(mistakes_section([Mistake('"><script>x</script>', 0, 1, 0.5, b"")], RETINOPATHY).parts)
    assert "<script" not in text
