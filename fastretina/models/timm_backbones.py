"""Networks of timm as backbones: at the resolution of the training, with a linear layer as their head.

Networks with a position for every patch, or with windows, are made for one side of the image; the others take any.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from fastretina.errors import CheckpointError, UsageError
from fastretina.models.options import TIMM, Backbone, backbone_of

REACH = 16  # how many steps away a side that fits is looked for,
STEP = 32  # px each, where the size of the patches is not known


def build_timm(arch: str, num_classes: int, resolution: int | None = None) -> nn.Module:
    """A network of timm, float32, initialised at random, with a linear layer of `num_classes` outputs.

    arch: `retfound`, or `timm:NAME`. resolution: side of the images in px; None: what timm made it for.
    UsageError where the network cannot take it, with the nearest that it can, or where its head is not one linear layer.
    """
    backbone = backbone_of(arch)
    side = default_side(backbone) if resolution is None else resolution
    check_side(arch, backbone, side)
    model: nn.Module = _make(backbone, side, num_classes=num_classes)
    ask: Any = getattr(model, "get_classifier", None)
    head = None if ask is None else ask()
    if not isinstance(head, nn.Linear):
        raise UsageError(
            f"--arch {arch}: its head is a {type(head).__name__}, and one linear layer is needed; take another network"
        )
    return model


def check_side(arch: str, backbone: Backbone, side: int, flag: str = "--resolution") -> None:
    """UsageError where the network cannot take images of `side` px, with the nearest sides that it can."""
    why = _refusal(backbone, side)
    if why is None:
        return
    step = _patch(_on_meta(backbone, default_side(backbone))) or STEP
    below = (other for other in range((side - 1) // step * step, 0, -step))
    above = (other for other in range((side // step + 1) * step, side + step * REACH, step))
    fitting = [next((other for other in sides if _refusal(backbone, other) is None), None) for sides in (below, above)]
    found = [str(other) for other in fitting if other is not None] or [str(default_side(backbone))]
    raise UsageError(f"{flag} {side}: {arch} cannot take it: {why}; the nearest that fit: {', '.join(found)}")


def check_growth(arch: str, grow_from: int | None, resolution: int) -> None:
    """UsageError where --grow-from asks for sides that a network of timm cannot have both."""
    if grow_from in (None, resolution):
        return
    backbone = backbone_of(arch)
    if not backbone.builder.startswith(TIMM):
        return
    assert grow_from is not None
    if _config(backbone).fixed_input_size:
        raise UsageError(f"--grow-from {grow_from}: {arch} is made for one resolution; leave --grow-from away")
    check_side(arch, backbone, grow_from, "--grow-from")


def sees_one_side(model: nn.Module) -> bool:
    """Whether a network takes images of the side alone that it was made for."""
    config = getattr(model, "pretrained_cfg", None)  # of every network of timm
    return bool(config and config.get("fixed_input_size"))


def default_side(backbone: Backbone) -> int:
    """The side, px, that timm's weights of a network were trained at."""
    return int(_config(backbone).input_size[-1])


def pretrained(arch: str, resolution: int | None) -> tuple[dict[str, torch.Tensor], str]:
    """timm's own weights of a network, made to fit the resolution (px) by timm, and what they are called. Fetched once.

    CheckpointError where there are none, or they cannot be fetched.
    """
    backbone = backbone_of(arch)
    try:
        donor = _make(backbone, resolution or default_side(backbone), pretrained=True)
    except Exception as error:  # of its hub: OSErrors, httpx's own, RuntimeErrors where there are no weights
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CheckpointError(
            f"--weights pretrained: timm has, or can fetch, none for {arch} ({reason}); fetch them elsewhere and give their "
            "file as --weights"
        ) from error
    config = donor.pretrained_cfg
    return donor.state_dict(), f"timm's {config['architecture']}.{config['tag']}".rstrip(".")


def _make(backbone: Backbone, side: int, **options: Any) -> Any:
    import timm

    if _config(backbone).fixed_input_size:
        options["img_size"] = side
    return timm.create_model(backbone.builder.removeprefix(TIMM), **dict(backbone.options), **options)


def _config(backbone: Backbone) -> Any:
    import timm

    return timm.get_pretrained_cfg(backbone.builder.removeprefix(TIMM))


def _on_meta(backbone: Backbone, side: int) -> Any:
    """The network without memory, in which nothing is computed."""
    with torch.device("meta"):
        return _make(backbone, side).eval()


def _refusal(backbone: Backbone, side: int) -> str | None:
    """Why the network does not take images of this side, px; None where it does. A third of a second for a ViT-L/16 on one core."""
    try:
        model = _on_meta(backbone, side)
        patch = _patch(model)
        if patch and side % patch:  # timm would leave out what is over, on two of the four sides
            return f"its patches of {patch} px do not divide it"
        model(torch.zeros(1, 3, side, side, device="meta"))
    except (RuntimeError, AssertionError, ValueError, TypeError, IndexError, ZeroDivisionError) as error:
        return (str(error).strip() or f"it fails ({type(error).__name__})").splitlines()[0]
    return None


def _patch(model: nn.Module) -> int | None:
    """The side of the patches, px, that the image is cut into at first; None where it is not, or the network does not say."""
    embedding: Any = getattr(model, "patch_embed", None)
    return int(embedding.patch_size[0]) if getattr(embedding, "grid_size", None) else None  # others' patches overlap
