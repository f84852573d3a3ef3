"""Test-time augmentation: which eight views there are, and that averaging over them helps a model that some of them mislead."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from fastretina.models.heads import Softmax
from fastretina.models.inference import MAX_VIEWS, rotate_flip, undo_rotate_flip, view_outputs
from fastretina.models.precision import Precision

FLOAT32 = Precision("cpu", None, "")


def symmetries(image: np.ndarray) -> set[bytes]:
    """The square's symmetries of an (n, n) image, each once, by index arithmetic: the signed permutations of two coordinates."""
    last = len(image) - 1
    row, column = np.indices(image.shape)
    flipped = [(row if not up else last - row, column if not left else last - column) for up in (0, 1) for left in (0, 1)]
    return {image[pair].tobytes() for one, other in flipped for pair in ((one, other), (other, one))}


class Recorder(nn.Module):
    """Keeps what it is shown."""

    def __init__(self) -> None:
        super().__init__()
        self.shown: list[Tensor] = []

    def forward(self, images: Tensor) -> Tensor:
        self.shown.append(images.clone())
        return images.new_zeros(len(images), 2)


def test_a_model_sees_each_of_the_eight_symmetries_once():
    image = np.random.default_rng(0).random((5, 5)).astype(np.float32)
    model = Recorder()
    view_outputs(model, torch.from_numpy(image).expand(1, 3, 5, 5), FLOAT32, views=MAX_VIEWS)
    shown = [np.ascontiguousarray(images[0, 0].numpy()).tobytes() for images in model.shown]
    assert len(shown) == 8
    assert set(shown) == symmetries(image)
    assert shown[0] == image.tobytes()


def test_rotation_and_flip_of_every_view_can_be_undone():
    images = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(0))
    for view in range(MAX_VIEWS):
        assert torch.equal(undo_rotate_flip(rotate_flip(images, view), view), images)


class Misled(nn.Module):
    """Reads the grade off channel 0, unless the brightest pixel of channel 1 is in the top left: then it answers another grade."""

    def forward(self, images: Tensor) -> Tensor:
        side = images.shape[-1]
        grades = images[:, 0].mean(dim=(1, 2)).round().long()
        brightest = images[:, 1].flatten(1).argmax(dim=1)
        misled = (brightest // side < side // 2) & (brightest % side < side // 2)
        answers = torch.where(misled, (grades + 1) % 5, grades)
        return 2.0 * nn.functional.one_hot(answers, 5).float()


def test_averaged_over_all_views_a_model_is_right_more_often():
    generator = torch.Generator().manual_seed(0)
    grades = torch.randint(5, (400,), generator=generator)
    images = torch.zeros(400, 3, 6, 6)
    images[:, 0] = grades[:, None, None]
    images[torch.arange(400), 1, torch.randint(6, (400,), generator=generator), torch.randint(6, (400,), generator=generator)] = 1

    def accuracy(views: int) -> float:
        answers = Softmax(5).answer(view_outputs(Misled(), images, FLOAT32, views))
        return float((answers.argmax(dim=1) == grades).float().mean())

    # A spot is in the top left in one photograph of four, and in two views of eight of every photograph.
    assert 0.68 < accuracy(1) < 0.82
    assert accuracy(8) == 1.0
