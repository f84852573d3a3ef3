"""fastretina: fundus photographs from JPEG and CSV to a trained network, as fast as the hardware allows.

    from fastretina import Loader, build_model, open_beton, write_beton

Names are loaded on first use, so that packing tools and their worker processes never import torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from fastretina.errors import FastretinaError
from fastretina.version import __version__ as __version__

if TYPE_CHECKING:
    from fastretina.beton.open import open_beton
    from fastretina.beton.verify import verify_beton
    from fastretina.loading.augment import Augment
    from fastretina.loading.loader import Loader
    from fastretina.models.resnet import build_model
    from fastretina.packing.pack import write_beton

__all__ = ["Augment", "FastretinaError", "Loader", "build_model", "open_beton", "verify_beton", "write_beton"]

_HOME = {
    "Augment": "loading.augment",
    "Loader": "loading.loader",
    "build_model": "models.resnet",
    "open_beton": "beton.open",
    "verify_beton": "beton.verify",
    "write_beton": "packing.pack",
}


def __getattr__(name: str) -> object:
    if name in _HOME:
        return getattr(import_module(f"fastretina.{_HOME[name]}"), name)
    raise AttributeError(f"module 'fastretina' has no attribute {name!r}")
