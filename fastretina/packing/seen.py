"""Whether there is anything to see in a picture: what shows nothing has no grade, whatever its table says."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from fastretina.errors import JpegError

# Grey levels of 256. Where 99 % of the pixels are below it nothing was photographed: the darkest photograph with a visible retina
# lights far more than 1 % of its frame (the disc is 8 % of the frame at the very least), and far above the noise of a sensor.
DARK = 16
# Grey levels between all but the darkest and the lightest 1 % of the pixels, in the channel that varies most. An empty page varies
# by 0, with the noise of JPEG by 2. A retina varies by more than 4 from its vessels alone, also where it fills the frame.
FLAT = 4
_RARE = 0.01  # the share of pixels that may differ: a date burnt into a corner, dust
# Pixels that are looked at. Both ask for a share of them, which 4,096 give within 0.2 %, so that a corner of text stays a corner.
_ENOUGH = 1 << 14


def check_seen(pixels: npt.NDArray[np.uint8]) -> None:
    """JpegError where an RGB picture, uint8 (H, W, 3), is dark all over or of one colour. Takes some 30 microseconds."""
    step = max(1, math.isqrt(pixels.shape[0] * pixels.shape[1] // _ENOUGH))
    channels = [np.ascontiguousarray(pixels[::step, ::step, channel]).ravel() for channel in range(3)]
    brightest = np.maximum(np.maximum(channels[0], channels[1]), channels[2])
    rare = int(_RARE * brightest.size)
    if np.count_nonzero(brightest >= DARK) <= rare:
        raise JpegError("nothing to see: the picture is dark all over")
    for channel in channels:
        low, high = np.partition(channel, (rare, channel.size - 1 - rare))[[rare, channel.size - 1 - rare]].tolist()
        if high - low >= FLAT:
            return
    raise JpegError("nothing to see: the picture is of one colour all over")
