"""How far each parameter of a network lies from its head, for rates that fall with the depth."""

from __future__ import annotations

import re
from typing import Any

from torch import nn

from fastretina.errors import UsageError
from fastretina.models.heads import head_layer

_STAGE = re.compile(r"layer(\d)\.")  # of torchvision's ResNets


def layer_depths(model: nn.Module) -> dict[str, int]:
    """Layers between each parameter, by name, and the head, whose own depth is 0.

    Of a network of timm by its own groups: a ViT-B has 12 blocks at depths 1 (the last, with the norm after it) to 12, and its
    embeddings at 13, as in Bao et al., BEiT, 2021. Of torchvision's ResNets layer4 to layer1 are 1 to 4, the stem 5.
    UsageError for a network that does not say its layers.
    """
    names = [name for name, _ in model.named_parameters()]
    matcher: Any = getattr(model, "group_matcher", None)
    if matcher is not None:
        from timm.models import group_parameters

        numbers: dict[str, int] = group_parameters(model, matcher(coarse=False), reverse=True)
        return {name: max(numbers.values()) - numbers[name] for name in names}
    stages = {name: int(found[1]) for name in names if (found := _STAGE.match(name)) is not None}
    if not stages:
        raise UsageError(f"--layer-decay: a {type(model).__name__} does not say which layers it has; leave --layer-decay away")
    head = f"{head_layer(model)[0]}."
    top = max(stages.values()) + 1
    return {name: 0 if name.startswith(head) else top - stages.get(name, 0) for name in names}
