"""Grad-CAM heat maps: where a model looked."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from fastretina.errors import UsageError
from fastretina.models.options import backbone_of
from fastretina.models.resnet import build_model

Target = Callable[[Tensor], Tensor]


def gradcam_layer(arch: str, resolution: int) -> str:
    """The name of the layer whose (B, C, h, w) output Grad-CAM weighs in an `arch` for images of `resolution` px: the last before
    the pooling, found by a pass through a network without memory. UsageError where the last features are no such maps."""
    if (known := backbone_of(arch).gradcam) is not None:
        return known
    with torch.device("meta"):
        model: nn.Module = build_model(arch, resolution=resolution).eval()
        outputs: dict[str, Tensor] = {}
        for name, module in model.named_modules():
            module.register_forward_hook(lambda _, given, output, name=name: outputs.update({name: output}))
        features: Tensor = model.forward_features(torch.zeros(1, 3, resolution, resolution))  # type: ignore[operator]
    # A transformer's are (B, tokens, C), or with windows (B, h, w, C). Hooks run from the inside out: the last is the outermost.
    maps = features.ndim == 4 and features.shape[1] != features.shape[2] == features.shape[3]
    layers = [name for name, output in outputs.items() if output is features] if maps else []
    if not layers:
        raise UsageError(
            f"--explain: Grad-CAM weighs the maps of a last convolution, and {arch} has none to look at; leave --explain away, or "
            "train a convolutional network"
        )
    return layers[-1]


class GradCam(nn.Module):
    """A model that answers as before and remembers what `heat` needs, in the same forward pass.

    The parameters of `model` are frozen and the graph begins at `layer`'s output: nothing before it is recorded, and the backward
    pass is that of the pooling and the head alone. Kept until `heat`: `layer`'s output of each pass (ResNet18 at 512 px, float32:
    0.5 MiB an image; ResNet50: 2 MiB).
    """

    def __init__(self, model: nn.Module, layer: str) -> None:
        """layer: whose output is weighed, see `gradcam_layer`."""
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
