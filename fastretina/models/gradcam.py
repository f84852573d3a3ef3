"""Grad-CAM heat maps: where a model looked."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

Target = Callable[[Tensor], Tensor]


class GradCam(nn.Module):
    """A model that answers as before and remembers what `heat` needs, in the same forward pass.

    The parameters of `model` are frozen and the graph begins at `layer`'s output: nothing before it is recorded, and the backward
    pass is that of the pooling and the head alone. Kept until `heat`: `layer`'s output of each pass (ResNet18 at 512 px, float32:
    0.5 MiB an image; ResNet50: 2 MiB).
    """

    def __init__(self, model: nn.Module, layer: str) -> None:
        """layer: whose output is weighed, `options.Backbone.gradcam`."""
        super().__init__()
        self.model = model.eval().requires_grad_(False)
        self._maps: list[Tensor] = []
        self._outputs: list[Tensor] = []
        model.get_submodule(layer).register_forward_hook(self._branch)

    def _branch(self, module: nn.Module, inputs: object, output: Tensor) -> Tensor:
        self._maps.append(output.detach().requires_grad_())
        return self._maps[-1].clone()  # which an activation may change in place, as DenseNet's does

    def forward(self, images: Tensor) -> Tensor:
        """(B, outputs) of (B, 3, R, R) images; gradients are on inside, whatever they are outside."""
        with torch.enable_grad():
            self._outputs.append(self.model(images))
        return self._outputs[-1].detach()

    def heat(self, target: Target) -> list[Tensor]:
        """A (B, h, w) float32 map, 0 or more, of each forward pass since the last call, which are forgotten.

        target: of the (B, outputs) float32 of one pass the (B,) numbers to explain, e.g. `heads.Head.target` for given grades.
        """
        maps, outputs = self._maps, self._outputs
        self._maps, self._outputs = [], []
        with torch.enable_grad():
            explained = torch.stack([target(output.float()).sum() for output in outputs]).sum()
        gradients = torch.autograd.grad(explained, maps)
        return [
            torch.einsum("bc,bchw->bhw", gradient.float().mean(dim=(2, 3)), map_.detach().float()).relu()
            for map_, gradient in zip(maps, gradients, strict=True)
        ]
