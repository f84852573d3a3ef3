"""Networks in channels-last with a head for the grades, and which part of them learns."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

import torch
from torch import nn

from fastretina.errors import UsageError
from fastretina.models.heads import head_layer
from fastretina.models.options import BACKBONES
from fastretina.models.weights import load_backbone, read_weights, weights_file


def build_model(arch: str = "resnet18", num_classes: int = 5, weights: str | Path | None = None) -> nn.Module:
    """A backbone in channels-last with `num_classes` outputs, float32, on the CPU.

    Args:
        arch: one of `options.BACKBONES`.
        weights: None for torch's random initialisation (set the seed before); one of torchvision's names, such as
            `IMAGENET1K_V1`, fetched once by torch.hub; or a .pth/.safetensors file with torchvision's keys. A head
            of another size is replaced by a new one.
        num_classes: units of the last layer; see `fastretina.models.heads` for what they may mean.

    Input: (B, 3, H, W) float, normalised by `fastretina.loading.augment`'s mean and deviation. Output: (B, num_classes) logits.
    Raises UsageError for an unknown arch; CheckpointError for weights that cannot be had or do not fit: never a silent start
    from scratch.
    """
    if arch not in BACKBONES:
        raise UsageError(f"unknown architecture {arch!r}; known: {', '.join(BACKBONES)}")
    module, function = BACKBONES[arch].builder.split(":")
    model: nn.Module = getattr(import_module(module), function)(num_classes=num_classes)
    if weights is not None:
        path = weights_file(arch, weights)
        load_backbone(model, read_weights(path), path)
    return model.to(memory_format=torch.channels_last)


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
