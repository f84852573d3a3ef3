"""ResNets by torchvision with a head for the grades, and the weights to start from, checked before use."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, get_args

import torch
import torchvision
from torch import nn

from fastretina.errors import UsageError
from fastretina.grading import NUM_CLASSES
from fastretina.models.weights import _weights_file, load_backbone, read_weights

ArchName = Literal["resnet18", "resnet34", "resnet50", "resnet101", "resnet152"]
ARCHS: tuple[str, ...] = get_args(ArchName)


def build_model(arch: str = "resnet18", num_classes: int = NUM_CLASSES, weights: str | Path | None = None) -> nn.Module:
    """A torchvision ResNet in channels-last with `num_classes` outputs, float32, on the CPU.

    Args:
        arch: one of ARCHS.
        weights: None for torch's random initialisation (set the seed before); one of torchvision's names, such as
            `IMAGENET1K_V1`, fetched once by torch.hub; or a .pth/.safetensors file with torchvision's keys. A head
            of another size is replaced by a new one.
        num_classes: units of the last layer; see `fastretina.models.heads` for what they may mean.

    Input: (B, 3, H, W) float, normalised by `fastretina.loading.augment`'s mean and deviation. Output: (B, num_classes) logits.
    Raises UsageError for an unknown arch; CheckpointError for weights that cannot be had or do not fit: never a silent start
    from scratch.
    """
    if arch not in ARCHS:
        raise UsageError(f"unknown architecture {arch!r}; known: {', '.join(ARCHS)}")
    model: nn.Module = torchvision.models.get_model(arch, weights=None, num_classes=num_classes)
    if weights is not None:
        path = _weights_file(arch, weights)
        load_backbone(model, read_weights(path), path)
    return model.to(memory_format=torch.channels_last)


def head_layer(model: nn.Module) -> nn.Linear:
    """The last linear layer, which gives the grades; all else is the backbone."""
    return [module for module in model.modules() if isinstance(module, nn.Linear)][-1]


def freeze_backbone(model: nn.Module, frozen: bool) -> None:
    """Whether all but the head stays as it is: no gradients, and BatchNorm neither learns nor counts. To call after
    `model.train()`."""
    head = head_layer(model)
    for parameter in model.parameters():
        parameter.requires_grad_(not frozen)
    head.requires_grad_(True)
    if frozen:
        model.eval()
        head.train()
