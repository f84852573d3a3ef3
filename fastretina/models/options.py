"""What the command line may say of backbones, heads and number formats. Imports no torch: --help should not wait for it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, NamedTuple

HeadName = Literal["softmax", "regression", "ordinal"]
ClassWeights = Literal["none", "sqrt", "balanced"]
AmpDtype = Literal["auto", "bfloat16", "float16"]
AmpChoice = Literal["auto", "on", "off"]


class Backbone(NamedTuple):
    """How to build a network and to look into it. Its head is the last of its linear layers.

    Attributes:
        builder: "module:function" that is called with `num_classes`; one of torchvision's has its weights, too.
        gradcam: the layer whose (B, C, h, w) output Grad-CAM weighs, the last before the pooling.
    """

    builder: str
    gradcam: str


BACKBONES: dict[str, Backbone] = {
    "resnet18": Backbone("torchvision.models:resnet18", gradcam="layer4"),
    "resnet34": Backbone("torchvision.models:resnet34", gradcam="layer4"),
    "resnet50": Backbone("torchvision.models:resnet50", gradcam="layer4"),
    "resnet101": Backbone("torchvision.models:resnet101", gradcam="layer4"),
    "resnet152": Backbone("torchvision.models:resnet152", gradcam="layer4"),
}

if TYPE_CHECKING:
    ArchName = str
else:  # what the command line takes
    ArchName = Literal[tuple(BACKBONES)]
