"""Networks in channels-last with a head for the grades, what they start from, and which part of them learns."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

import torch
from torch import nn
from torchvision.models.resnet import BasicBlock, ResNet

from fastretina.errors import CheckpointError
from fastretina.models.heads import head_layer
from fastretina.models.options import BACKBONES, TIMM, backbone_of
from fastretina.models.position import fitted
from fastretina.models.timm_backbones import build_timm, pretrained
from fastretina.models.weights import PRETRAINED, read_weights, weights_file
from fastretina.models.wrappings import PREFIXES, Stored, backbone_names, differing, is_known, load_behind, prefixes_of


def build_model(
    arch: str = "resnet18", num_classes: int = 5, weights: str | Path | None = None, resolution: int | None = None
) -> nn.Module:
    """A backbone in channels-last with `num_classes` outputs, float32, on the CPU.

    Args:
        arch: one of `options.BACKBONES`, or `timm:NAME`.
        weights: None for torch's random initialisation (set the seed before); or what `load_initial` takes.
        num_classes: units of the last layer; see `fastretina.models.heads` for what they may mean.
        resolution: H and W of the images, px, which a network with positions or windows is made for; None: what timm made it for.
            A ResNet takes any.

    Input: (B, 3, H, W) float, normalised by `fastretina.loading.augment`'s mean and deviation. Output: (B, num_classes) logits.
    Raises UsageError for an unknown arch, and for a resolution that it cannot take; CheckpointError for weights that cannot be had
    or do not fit: never a silent start from scratch.
    """
    module, function = backbone_of(arch).builder.split(":")
    if f"{module}:" == TIMM:
        model = build_timm(arch, num_classes, resolution)
    else:
        model = getattr(import_module(module), function)(num_classes=num_classes)
    if weights is not None:
        load_initial(model, arch, weights, resolution)
    return model.to(memory_format=torch.channels_last)


def resnet10(num_classes: int) -> ResNet:
    """A ResNet18 with one block instead of two in each of its four stages: half of the work, and 4.9 instead of 11.2 million
    parameters. torchvision has none of this depth, and nobody's weights to start from are as common."""
    return ResNet(BasicBlock, [1, 1, 1, 1], num_classes=num_classes)


def load_initial(model: nn.Module, arch: str, weights: str | Path, resolution: int | None = None) -> str:
    """Copy weights to start from into a model of `arch`. Returns the file, and how it was understood, in words.

    weights: one of torchvision's names, such as `IMAGENET1K_V1`, fetched once by torch.hub; for `timm:NAME` `pretrained`, which
    timm fetches; or a .pth/.safetensors file with torchvision's or timm's names of the tensors, also behind the prefixes and in the
    containers of `wrappings`. The backbone must be all there, but for what `options.Backbone.anew` names; a position embedding
    of another resolution is interpolated. The head stays as it is where the file has none, or one of another size; what is
    beside them is left out. resolution: what the model was built for, px.

    Raises CheckpointError for weights that cannot be had or do not fit, and says which architecture they would.
    """
    path: str | Path
    if weights == PRETRAINED and arch.startswith(TIMM) and not Path(weights).exists():
        tensors, path = pretrained(arch, resolution)
        stored = Stored(tensors)
    else:
        path = file = weights_file(arch, weights)
        stored = read_weights(file)
    stored, remarks = fitted(model, stored, backbone_of(arch).anew)
    everywhere = prefixes_of(model, stored)
    known = [prefix for prefix in everywhere if is_known(prefix)]
    if len(known) > 1:
        choice = " and ".join(repr(prefix) for prefix in known)
        raise CheckpointError(f"{path}: holds a whole {arch} more than once, behind {choice}: save the one that you mean by itself")
    reason = differing(model, stored.behind(known[0])) if known else _misfit(model, stored)
    if reason is None:
        note = "; ".join(filter(None, [load_behind(model, stored, known[0]), *remarks]))
        return f"{path} ({note})" if note else str(path)
    others = [other for other in BACKBONES if other != arch and _fits(other, stored)]
    if others:
        way_out = f"They are those of a {' or '.join(others)} (--arch {others[0]})"
    elif everywhere and not known:
        way_out = f"A whole {arch} stands behind {' and '.join(everywhere)}: save that part by itself"
    else:
        names = "timm's" if backbone_of(arch).builder.startswith(TIMM) else "torchvision's"
        way_out = (
            f"{names} names of the tensors of a {arch} are expected (--arch), as they are or behind any of "
            f"{', '.join(f'{prefix}.' for prefix in PREFIXES)}"
        )
    raise CheckpointError(f"{path}: not the weights of a {arch}: {reason} ({stored}). {way_out}")


def _misfit(model: nn.Module, stored: Stored) -> str:
    """What is missing, or else too much, behind the known prefix that has most of the model's names."""
    own, all_own = backbone_names(model), model.state_dict().keys()
    parts = {name.split(".")[0] for name in own}
    prefixes = {name.removesuffix(own[0]) for name in stored.tensors if name.endswith(own[0])}
    tried = [stored.behind(prefix).keys() for prefix in sorted({"", *filter(is_known, prefixes)})]
    best = max(tried, key=lambda names: len(names & all_own))
    if missing := [name for name in own if name not in best]:
        return f"it lacks {missing[0]}" + (f" and {len(missing) - 1} more" if len(missing) > 1 else "")
    return f"it also has {next(name for name in best if name not in all_own and name.split('.')[0] in parts)}"


def _fits(arch: str, stored: Stored) -> bool:
    if BACKBONES[arch].builder.startswith(TIMM):  # may not be installed, and has no resolution here
        return False
    with torch.device("meta"):
        model = build_model(arch)
    return any(is_known(one) and differing(model, stored.behind(one)) is None for one in prefixes_of(model, stored))


def freeze_backbone(model: nn.Module, frozen: bool) -> None:
    """Whether all but the head stays as it is: no gradients, and BatchNorm neither learns nor counts. To call after
    `model.train()`."""
    _, head = head_layer(model)
    for parameter in model.parameters():
        parameter.requires_grad_(not frozen)
    head.requires_grad_(True)
    if frozen:
        model.eval()
        head.train()
