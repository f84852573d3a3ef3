"""What the command line may say of backbones, heads and number formats. Imports no torch: --help should not wait for it."""

from __future__ import annotations

import difflib
from importlib import import_module
from typing import Any, Literal, NamedTuple

from fastretina.errors import UsageError

HeadName = Literal["softmax", "regression", "ordinal"]
ClassWeights = Literal["none", "sqrt", "balanced"]
AmpDtype = Literal["auto", "bfloat16", "float16"]
AmpChoice = Literal["auto", "on", "off"]

TIMM = "timm:"
CLOSE = 4  # names in a message


class Backbone(NamedTuple):
    """How to build a network and to look into it. Its head is `heads.head_layer`.

    Attributes:
        builder: "module:function" that is called with `num_classes`, one of torchvision's has its weights, too; or "timm:NAME".
        gradcam: the layer whose (B, C, h, w) output Grad-CAM weighs, the last before the pooling; None: `gradcam.gradcam_layer`
            looks for it.
        options: timm's, beside the name.
        anew: a part of the backbone that a file to start from need not have, and that then begins as it is initialised.
    """

    builder: str
    gradcam: str | None = None
    options: tuple[tuple[str, Any], ...] = ()
    anew: str | None = None


BACKBONES: dict[str, Backbone] = {
    "resnet10": Backbone("fastretina.models.resnet:resnet10", gradcam="layer4"),
    "resnet18": Backbone("torchvision.models:resnet18", gradcam="layer4"),
    "resnet34": Backbone("torchvision.models:resnet34", gradcam="layer4"),
    "resnet50": Backbone("torchvision.models:resnet50", gradcam="layer4"),
    "resnet101": Backbone("torchvision.models:resnet101", gradcam="layer4"),
    "resnet152": Backbone("torchvision.models:resnet152", gradcam="layer4"),
    # Zhou et al., A foundation model for generalizable disease detection from retinal images, Nature 2023: a ViT-L/16 whose answer
    # is read from the mean of its patches' tokens. Its pretraining ends in `norm`, its fine-tuning drops that for a new `fc_norm`.
    "retfound": Backbone(f"{TIMM}vit_large_patch16_224", options=(("global_pool", "avg"),), anew="fc_norm"),
}


def is_arch(name: str) -> bool:
    """Whether a checkpoint or a flag may mean a backbone by this; which of timm's there are is not asked."""
    return name in BACKBONES or name.startswith(TIMM)


def backbone_of(arch: str) -> Backbone:
    """One of BACKBONES, or any network of timm by `timm:NAME`, with or without the tag of its weights.

    UsageError for a name that neither has, with those that are close; and where the extra is not installed.
    """
    backbone = BACKBONES.get(arch) or Backbone(arch)
    if not is_arch(arch):
        close = difflib.get_close_matches(arch, BACKBONES, CLOSE)
        meant = f"did you mean {' or '.join(close)}? Known" if close else "known"
        raise UsageError(f"unknown architecture {arch!r}; {meant}: {', '.join(BACKBONES)}, and timm:NAME for any network of timm")
    if not backbone.builder.startswith(TIMM):
        return backbone
    try:
        timm = import_module("timm")
    except ImportError as error:
        raise UsageError(f"--arch {arch}: needs timm:  pip install 'fastretina[timm]'  ({error})") from error
    name = backbone.builder.removeprefix(TIMM)
    plain, _, tag = name.partition(".")
    # Nothing but names that timm has registered: it would look for others, such as hf-hub:..., on the network.
    names = timm.list_models(f"{plain}.*", pretrained=True) if tag else timm.list_models()
    if name not in names:
        close = difflib.get_close_matches(name, names or timm.list_models(), CLOSE)
        close = close or difflib.get_close_matches(plain, timm.list_models(), CLOSE)
        meant = f"did you mean {' or '.join(TIMM + one for one in close)}?" if close else "timm.list_models() has them all"
        raise UsageError(f"unknown architecture {arch!r}: timm {timm.__version__} has no {name!r}; {meant}")
    return backbone


def folder_name(arch: str) -> str:
    """An architecture as part of a folder's name, which holds no colon."""
    return arch.replace(":", "-")
