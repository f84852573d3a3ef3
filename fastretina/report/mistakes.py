"""The mistakes that a model is surest of, with their pictures: where labels are doubtful, or the model looks at the wrong thing."""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np
import simplejpeg
import torch

from fastretina.beton.reader import Beton
from fastretina.grading import Classes
from fastretina.loading.decode.cpu import decode, decoded_size
from fastretina.metrics.predictions import Predictions
from fastretina.report.page import Section, image, percent, remark

SHOWN = 12
SIDE = 220  # px, the longer side of a thumbnail: about 6 KB each


@dataclass(frozen=True)
class Mistake:
    """An image graded wrong. probability: of that wrong answer, 0-1. thumbnail: a JPEG, SIDE px at most."""

    name: str
    grade: int
    predicted: int
    probability: float
    thumbnail: bytes


def confident_mistakes(answers: Predictions, beton: Beton, shown: int = SHOWN) -> list[Mistake]:
    """The `shown` mistakes with the highest probabilities, highest first, among a model's answers for the images of `beton`."""
    predicted = answers.predicted
    probabilities = answers.log_probabilities.double().exp().gather(1, predicted[:, None])[:, 0]
    wrong = torch.nonzero(predicted != answers.labels).flatten()
    surest = wrong[probabilities[wrong].argsort(descending=True, stable=True)][:shown].tolist()
    found = []
    for row, index in zip(surest, beton.index_of(answers.ids[surest].numpy()).tolist(), strict=True):
        grades = int(answers.labels[row]), int(predicted[row])
        found.append(Mistake(beton.names[index], *grades, float(probabilities[row]), thumbnail(beton, index)))
    return found


def thumbnail(beton: Beton, index: int) -> bytes:
    """Sample `index` (0 to N - 1) as a JPEG whose longer side is SIDE px, or as large as it is. Raises as `decode` does."""
    width, height = decoded_size(int(beton.widths[index]), int(beton.heights[index]), SIDE)
    pixels = np.empty((height, width, 3), np.uint8)
    decode(beton, index, pixels, SIDE)
    scale = SIDE / max(pixels.shape[:2])
    if scale < 1:
        height, width = (max(1, round(side * scale)) for side in pixels.shape[:2])
        pixels = cv2.resize(pixels, (width, height), interpolation=cv2.INTER_AREA).astype(np.uint8)
    encoded: bytes = simplejpeg.encode_jpeg(pixels, quality=85)
    return encoded


def mistakes_section(mistakes: Sequence[Mistake], classes: Classes) -> Section | None:
    """The section of a report; none without mistakes."""
    if not mistakes:
        return None
    items = []
    for mistake in mistakes:
        true, given = classes.title(mistake.grade), classes.title(mistake.predicted)
        shown = image(mistake.thumbnail, f"Fundus photograph {mistake.name}: {true}, called {given}", "jpeg")
        answer = html.escape(f"is {true}, called {given}")
        caption = f"<b>{html.escape(mistake.name)}</b><br>{answer} ({percent(mistake.probability)})"
        items.append(f"<li><figure>{shown}<figcaption>{caption}</figcaption></figure></li>")
    text = (
        "Those wrong answers on the test set that the model was surest of, with the probability it gave them. Look for "
        f"photographs whose {classes.noun} in the data set is doubtful, and for what misleads the model."
    )
    return Section("Most confident mistakes", [remark(text), f'<ul class="thumbs">{"".join(items)}</ul>'])
