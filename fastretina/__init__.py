"""fastretina: fundus photographs from JPEG and CSV to a trained ResNet, as fast as the hardware allows.

    from fastretina import Beton, Loader, build_model, write_beton

Names are loaded on first use, so that packing tools and their worker processes never import torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from fastretina.errors import FastretinaError

if TYPE_CHECKING:
    from fastretina.beton.reader import Beton
    from fastretina.loading.loader import Loader
    from fastretina.models.resnet import build_model
    from fastretina.packing.pack import write_beton

__version__ = "0.1.0"
__all__ = ["Beton", "FastretinaError", "Loader", "build_model", "write_beton"]

_HOME = {
    "Beton": "fastretina.beton.reader",
    "Loader": "fastretina.loading.loader",
    "build_model": "fastretina.models.resnet",
    "write_beton": "fastretina.packing.pack",
}


def __getattr__(name: str) -> object:
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    raise AttributeError(f"module 'fastretina' has no attribute {name!r}")
