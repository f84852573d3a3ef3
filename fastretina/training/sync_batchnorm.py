"""BatchNorm over the global batch of several ranks: torch's own on CUDA; the same here for CPUs, which torch's refuses (2.14 too).

Without it no number of gloo ranks could be shown to train as one, since every ResNet here has BatchNorm (docs/scaling.md).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


class _Sum(torch.autograd.Function):
    """The sum of a tensor over all ranks. Its gradient is the sum of theirs: each rank's loss depends on every rank's tensor."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        total = tensor.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        total = gradients[0].clone()
        dist.all_reduce(total)
        return total


class CpuSyncBatchNorm(nn.BatchNorm2d):
    """BatchNorm2d whose training statistics are those of all ranks' images together. (B, C, H, W) in and out; B may be 0.

    Parameters and buffers are those of BatchNorm2d, under the same names.
    """

    def __init__(self, features: int, eps: float, momentum: float | None) -> None:
        super().__init__(features, eps, momentum)
        # What timm's BatchNormAct2d does with the normalised values.
        self.drop: nn.Module = nn.Identity()
        self.act: nn.Module = nn.Identity()

    def forward(self, input: Tensor) -> Tensor:
        if not self.training:
            return self._finished(super().forward(input))
        values = input.float()
        size = values.new_tensor([values.numel() // values.shape[1]])
        # Two sums, not one of squares less the square of the mean: where the deviation is small that cancels in float32.
        sums = _Sum.apply(torch.cat([values.sum(dim=(0, 2, 3)), size]))
        count = sums[-1].detach()
        mean = sums[:-1] / count
        centred = values - mean[:, None, None]
        variance = _Sum.apply(centred.square().sum(dim=(0, 2, 3))) / count
        with torch.no_grad():
            assert self.running_mean is not None
            assert self.running_var is not None
            assert self.num_batches_tracked is not None
            self.num_batches_tracked += 1
            # None: the plain average of all batches.
            momentum = 1.0 / int(self.num_batches_tracked) if self.momentum is None else self.momentum
            self.running_mean.lerp_(mean, momentum)
            self.running_var.lerp_(variance * (count / (count - 1)), momentum)
        scale = (variance + self.eps).rsqrt() * self.weight
        output: Tensor = centred * scale[:, None, None] + self.bias[:, None, None]
        return self._finished(output.to(input.dtype))

    def _finished(self, output: Tensor) -> Tensor:
        finished: Tensor = self.act(self.drop(output))
        return finished


def synchronise_batchnorm(model: nn.Module, device: torch.device) -> nn.Module:
    """Replace every BatchNorm2d of the model by one that is synchronised over all ranks; weights and statistics stay."""
    if device.type == "cuda":
        convert: Any = nn.SyncBatchNorm.convert_sync_batchnorm
        if hasattr(model, "pretrained_cfg"):  # of timm, whose BatchNorm may hold an activation
            from timm.layers.norm_act import convert_sync_batchnorm as convert
        converted: nn.Module = convert(model)
        return converted
    for name, module in model.named_children():
        if isinstance(module, nn.BatchNorm2d):
            replacement = CpuSyncBatchNorm(module.num_features, module.eps, module.momentum)
            replacement.drop = getattr(module, "drop", replacement.drop)
            replacement.act = getattr(module, "act", replacement.act)
            replacement.load_state_dict(module.state_dict())
            setattr(model, name, replacement)
        else:
            synchronise_batchnorm(module, device)
    return model
