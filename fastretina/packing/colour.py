"""Colours as sRGB, which is what a network is shown: profiles that say something else are applied, broken ones ignored."""

from __future__ import annotations

import io
from functools import lru_cache

import numpy as np
from PIL import Image, ImageCms

APPLIED = "colour profile applied"
NOT_APPLIED = "colour profile not applied"  # to a JPEG whose bytes pass through
BROKEN = "broken colour profile ignored"

_SAME = 2  # grey levels; a profile that moves no colour further is sRGB, whatever its name
_STEPS = (0, 64, 128, 192, 255)
_COLOURS = np.stack(np.meshgrid(_STEPS, _STEPS, _STEPS), axis=-1).reshape(1, -1, 3).astype(np.uint8)


def to_srgb(image: Image.Image, profile: bytes | None) -> tuple[Image.Image, tuple[str, ...]]:
    """An L, RGB or CMYK image as RGB, its ICC profile applied where that changes anything; and what is to be told.

    profile: b"" where there is none, None where it is known to be broken.
    """
    if not profile:
        return image.convert("RGB"), () if profile is not None else (BROKEN,)
    if image.mode == "RGB" and (told := _told(profile)) != (APPLIED,):
        return image, told
    try:
        converted = _convert(image, profile)
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError):  # of another colour space than the image's, too
        return image.convert("RGB"), (BROKEN,)
    return converted, (APPLIED,)


def of_pass_through(profile: bytes) -> tuple[str, ...]:
    """What is to be told of a JPEG that keeps its colours although it has this profile (b"": none)."""
    return (NOT_APPLIED,) if profile and _told(profile) else ()


@lru_cache(maxsize=32)  # one camera, one profile; it takes half a millisecond to find out
def _told(profile: bytes) -> tuple[str, ...]:
    """What there is to say of an RGB image's ICC profile once it is applied: nothing if it is sRGB."""
    try:
        found = np.asarray(_convert(Image.fromarray(_COLOURS), profile))
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError):
        return (BROKEN,)
    return () if np.abs(found.astype(int) - _COLOURS).max() <= _SAME else (APPLIED,)


def _convert(image: Image.Image, profile: bytes) -> Image.Image:
    converted = ImageCms.profileToProfile(
        image, ImageCms.ImageCmsProfile(io.BytesIO(profile)), ImageCms.createProfile("sRGB"), outputMode="RGB"
    )
    assert converted is not None  # it is, where the image is not converted in place
    return converted
