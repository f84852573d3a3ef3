"""What is done to a photograph's picture on its way into a .beton, beyond making it square; the same for training and grading.

A .beton's provenance and a checkpoint both say it, so that a model is never shown pictures prepared otherwise than those it
learned from. Imports no library: the packing workers come here, and `--help`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

from fastretina.errors import BetonError, UsageError

if TYPE_CHECKING:
    from fastretina.beton.reader import Beton

Crop = Literal["none", "fundus"]
Contrast = Literal["none", "local"]


@dataclass(frozen=True)
class Preparation:
    """crop: to the square of the retina's disc. contrast: the local average colour subtracted. ValueError: no such choice."""

    crop: Crop = "none"
    contrast: Contrast = "none"

    def __post_init__(self) -> None:
        for name, value, choices in (("crop", self.crop, get_args(Crop)), ("contrast", self.contrast, get_args(Contrast))):
            if value not in choices:
                raise ValueError(f"{name} {value!r}: {' or '.join(choices)}")

    def __bool__(self) -> bool:
        """Whether anything is done at all: then no image's bytes pass through."""
        return self != UNPREPARED

    def __str__(self) -> str:
        """In words, "crop fundus and contrast local": what the packer counts such images as."""
        return " and ".join(f"{name} {value}" for name, value in asdict(self).items() if value != "none") or "no preparation"

    @property
    def flags(self) -> str:
        """As the packer's command line wants it."""
        return " ".join(f"--{name} {value}" for name, value in asdict(self).items())


UNPREPARED = Preparation()


def preparation_of(beton: Beton) -> Preparation:
    """How the images of a .beton were prepared; files of other makers count as unprepared. BetonError: unknown to this version."""
    stored: Any = beton.provenance.get("preparation", {})
    try:
        return Preparation(**stored)
    except (TypeError, ValueError) as error:
        raise BetonError(f"{beton.path}: prepared in a way that this version does not know ({error})") from None


def common_preparation(betons: Mapping[str, Beton]) -> Preparation:
    """How all these files (by what they are for: train, test, val) were prepared. UsageError naming two that differ."""
    (name, first), *others = betons.items()
    expected = preparation_of(first)
    for other, beton in others:
        if (found := preparation_of(beton)) != expected:
            raise UsageError(
                f"--{name} {first.path} was packed with {expected.flags}, --{other} {beton.path} with {found.flags}; "
                "pack one of them again with the flags of the other"
            )
    return expected
