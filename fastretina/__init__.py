"""fastretina: fundus photographs from JPEG and CSV to a trained network, as fast as the hardware allows.

    from fastretina import Grader, Loader, build_model, open_beton, write_beton

Names are loaded on first use, so that packing tools and their worker processes never import torch.
"""

import os
import sys

# `python -m fastretina.train` has Python look into the current folder first, for every library: with a cv2.py, a json.py, even a
# __future__.py among somebody's photographs it would run that. So nothing else is imported before the folder is off the path; or at
# its end, where this package was found in it, for the worker processes that must find it too. While `-m` looks for its module,
# argv[0] holds the "-m", and orig_argv has the module's name in its place.
if sys.argv[0] == "-m" and sys.orig_argv[-len(sys.argv)].removeprefix("-m").startswith("fastretina."):
    try:
        _current = os.getcwd()  # noqa: PTH109  pathlib would be one of those that are looked for there
    except OSError:
        _current = ""  # it has been removed, and is not on the path
    if sys.path[0] == _current:  # not with PYTHONSAFEPATH
        del sys.path[0]
        if __path__[0] == f"{_current}/fastretina":
            sys.path.append(_current)

from importlib import import_module
from typing import TYPE_CHECKING

from fastretina.errors import FastretinaError
from fastretina.version import __version__ as __version__

if TYPE_CHECKING:
    from fastretina.beton.open import open_beton
    from fastretina.beton.verify import verify_beton
    from fastretina.loading.augment import Augment
    from fastretina.loading.loader import Loader
    from fastretina.models.grader import Grader
    from fastretina.models.resnet import build_model
    from fastretina.packing.pack import write_beton

__all__ = ["Augment", "FastretinaError", "Grader", "Loader", "build_model", "open_beton", "verify_beton", "write_beton"]

_HOME = {
    "Augment": "loading.augment",
    "Grader": "models.grader",
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
