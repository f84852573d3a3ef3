"""Augmentation: random parameters per sample, and one warp that applies all of them.

`parameters` draws them, `cpu` and `gpu` do what they say.
"""

from fastretina.loading.augment.parameters import IMAGENET_MEAN, IMAGENET_STD, Augment, WarpParameters, draw

__all__ = ["IMAGENET_MEAN", "IMAGENET_STD", "Augment", "WarpParameters", "draw"]
