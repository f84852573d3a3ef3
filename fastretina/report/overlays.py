"""Where a model looked: Grad-CAM heat maps, and pictures of them beside the photographs.

Grad-CAM (Selvaraju et al., Grad-CAM: Visual Explanations from Deep Networks via Gradient-Based Localization, ICCV 2017, equations 1
and 2): the last convolution's feature maps, each weighted by the mean gradient of the explained output, summed; what is left above
zero speaks for that output. A map has one cell for 32 x 32 pixels of the input, so that it names a region, never a lesion's edge.
"""

from __future__ import annotations

import io
import os
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from pathlib import Path

import cv2
import matplotlib
import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from fastretina.errors import RunError, UsageError
from fastretina.models.gradcam import GradCam, gradcam_layer
from fastretina.models.grader import Batch, Grader
from fastretina.models.inference import undo_rotate_flip
from fastretina.report.page import percent
from fastretina.report.plots import denormalise
from fastretina.system.files import write_bytes

Pixels = npt.NDArray[np.uint8]
Heat = npt.NDArray[np.float32]

PANEL = 512  # px, the least side of each half of a picture
COLOURS = "viridis"  # perceptually uniform
OPACITY = 0.55  # of the hottest place: lesions show through
QUALITY = 92
EXTENSION = ".jpeg"
MAX_STEM = 230  # bytes, which leaves room for a number, .jpeg and write_atomically's .tmp in a file system's 255


class OverlayFolder:
    """The folder of --explain: an overlay for each image, under the image's relative name.

    path: made here. given: the folders and files that the images come from; an image below one of these folders keeps its path
    from there, any other its name alone.

    UsageError where `path` has files in it or lies in one of the folders; RunError where nothing can be written to it.
    """

    def __init__(self, path: Path, given: Sequence[Path]) -> None:
        self.path = path
        self._folders = {folder for folder in given if folder.is_dir()}
        self._taken: dict[str, int] = {}  # name without extension -> how many images have asked for it
        for folder in self._folders:
            if Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder)):
                raise UsageError(f"--explain {path}: lies in {folder}, so that overlays would be graded too; give another folder")
        try:
            path.mkdir(parents=True, exist_ok=True)
            if any(path.iterdir()):
                raise UsageError(f"--explain {path}: has files in it, which overlays might replace; give a new or an empty folder")
            with tempfile.TemporaryFile(dir=path):
                pass
        except OSError as error:
            raise RunError(f"--explain {path}: cannot be written to: {error.strerror}") from error

    def relative(self, image: Path) -> Path:
        """The image's path below the nearest folder given, or its name."""
        for folder in image.parents:
            if folder in self._folders:
                below = image.relative_to(folder)
                if ".." not in below.parts:  # of a file given as folder/../elsewhere
                    return below
        return Path(image.name)

    def place(self, image: Path) -> Path:
        """Where this image's overlay goes; never the same place twice: `10_left.jpeg`, then `10_left-2.jpeg`."""
        below = self.relative(image)
        # A folder x.jpeg would meet the overlay of an image x.png.
        folders = [part[:-1] + "_" if part.endswith(EXTENSION) else part for part in below.parts[:-1]]
        stem = str(Path(*folders, os.fsdecode(os.fsencode(below.stem)[:MAX_STEM])))
        name, number = stem, self._taken.get(stem, 0) + 1
        while number > 1 and (name := f"{stem}-{number}") in self._taken:
            number += 1
        self._taken[name] = 1
        self._taken[stem] = number
        return self.path / (name + EXTENSION)


def explainer_of(
    grader: Grader, path: Path, given: Sequence[Path], workers: int | None = None
) -> tuple[Grader, Callable[[Batch], None]]:
    """The grader to grade with instead, and what then writes the overlays of a batch that it has just graded to the new folder
    `path`. UsageError where that lies among the images that were `given`, or for an ensemble."""
    if len(grader.members) > 1:
        raise UsageError("--explain: shows where one model looked; give one checkpoint")
    member, classes = grader.members[0], grader.classes
    layer = gradcam_layer(member.info.arch, member.info.resolution)
    folder = OverlayFolder(path, given)
    model = GradCam(member.model, layer)
    head, threads = member.info.grading, workers or len(os.sched_getaffinity(0))

    def explain(batch: Batch) -> None:
        if not batch.images:
            return
        grades = batch.log_probabilities.argmax(dim=1)
        sure = batch.log_probabilities.amax(dim=1).exp().tolist()
        titles = [f"{classes.title(best)}, {percent(share)}" for best, share in zip(grades.tolist(), sure, strict=True)]
        heats = relative_heat(upright(model.heat(partial(head.target, grades=grades.to(grader.device))))).cpu().numpy()
        paths = [Path(one.name) for one in batch.photographs if not one.error]

        def draw(image: Path, place: Path, pixels: Pixels, heat: Heat, answer: str) -> None:
            try:
                place.parent.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise RunError(f"{place.parent}: cannot be made: {error.strerror}") from error
            write_bytes(place, picture(pixels, heat, answer, str(folder.relative(image))))

        places = [folder.place(image) for image in paths]
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(draw, paths, places, denormalise(next(iter(batch.images.values()))), heats, titles))

    return Grader([member._replace(model=model)], grader.device, grader.views), explain


def upright(maps: Sequence[Tensor]) -> Tensor:
    """(B, h, h) mean of the views' maps, each rotated and flipped back: what test-time augmentation does with the probabilities."""
    return torch.stack([undo_rotate_flip(heat[:, None], view)[:, 0] for view, heat in enumerate(maps)]).mean(dim=0)


def relative_heat(maps: Tensor) -> Tensor:
    """(B, h, w) maps, 0 or more, by each one's maximum: 0-1; zero everywhere where nothing speaks for the answer."""
    highest = maps.amax(dim=(1, 2), keepdim=True)
    return torch.where(highest > 0, maps / highest, 0.0)


def overlay(pixels: Pixels, heat: Heat) -> Pixels:
    """(H, W, 3) RGB pixels as a red-free photograph under the (h, w) heat, 0-1: the hotter the more opaque.

    Red-free (the green channel in grey) shows lesions best and leaves all colour to the heat: yellow hardly shows on orange.
    """
    smooth = cv2.resize(heat, pixels.shape[1::-1], interpolation=cv2.INTER_LINEAR)[..., None]
    colours = matplotlib.colormaps[COLOURS](smooth[..., 0], bytes=True)[..., :3]
    opacity = OPACITY * smooth
    blended: Pixels = np.rint(pixels[..., 1:2] * (1.0 - opacity) + colours * opacity).astype(np.uint8)
    return blended


def picture(pixels: Pixels, heat: Heat, answer: str, name: str) -> bytes:
    """JPEG: the (R, R, 3) photograph with its name, and beside it its `overlay` with the (h, w) heat, 0-1, and the answer."""
    side = max(PANEL, len(pixels))
    gap, strip = side // 64, side // 7
    enlarged = cv2.resize(pixels, (side, side), interpolation=cv2.INTER_CUBIC).astype(np.uint8)
    canvas = Image.new("RGB", (2 * side + gap, side + strip), "black")
    canvas.paste(Image.fromarray(enlarged), (0, 0))
    canvas.paste(Image.fromarray(overlay(enlarged, heat)), (side + gap, 0))

    draw = ImageDraw.Draw(canvas)
    large, small = _font(side // 20), _font(side // 28)
    margin, first, second = side // 40, side + strip // 3, side + 3 * strip // 4
    draw.text((margin, first), _shortened(name, large, side - 2 * margin), "white", large, anchor="lm")
    draw.text((margin, second), f"as the network saw it, {len(pixels)} × {len(pixels)} px", "silver", small, anchor="lm")
    left = side + gap + margin
    draw.text((left, first), answer, "white", large, anchor="lm")
    draw.text((left, second), "Grad-CAM:  none", "silver", small, anchor="lm")
    bar = int(left + small.getlength("Grad-CAM:  none  ")), second - strip // 10
    ramp = matplotlib.colormaps[COLOURS](np.tile(np.linspace(0, 1, side // 4), (strip // 5, 1)), bytes=True)
    canvas.paste(Image.fromarray(ramp[..., :3]), bar)
    draw.text((bar[0] + side // 4, second), "  most, of this image", "silver", small, anchor="lm")
    buffer = io.BytesIO()
    canvas.save(buffer, "JPEG", quality=QUALITY, subsampling="4:4:4")
    return buffer.getvalue()


@cache
def _font(size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(Path(matplotlib.get_data_path(), "fonts/ttf/DejaVuSans.ttf"), size)


def _shortened(text: str, font: ImageFont.FreeTypeFont, width: int) -> str:
    """Printable, and without its beginning where the whole is wider than `width` pixels."""
    text = "".join(character if character.isprintable() else "?" for character in text)
    while font.getlength(text) > width:
        text = "…" + text[2 + len(text) // 16 :]
    return text
