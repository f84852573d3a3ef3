"""One training step of a ResNet as the trainer takes it, for whatever gives it batches."""

from __future__ import annotations

import time

import torch
from torch import Tensor

from fastretina.models.precision import choose_precision
from fastretina.models.resnet import build_model
from fastretina.system.cuda import Pace
from fastretina.system.tracing import span
from fastretina.training.compile import StepForward, training_flops

FORMATS = {"channels_last": torch.channels_last, "contiguous": torch.contiguous_format}


class TrainingStep:
    """bfloat16 autocast on CUDA, float32 on a CPU; SGD with momentum, fused.

    Attributes:
        dtype: of the images that it is to be given.
    """

    def __init__(
        self,
        arch: str,
        batch_size: int,
        resolution: int,
        device: torch.device,
        mode: str | None,
        memory_format: str = "channels_last",
    ) -> None:
        """mode: torch.compile's, None: eager. memory_format: of weights and images; a key of FORMATS."""
        torch.manual_seed(0)
        torch.backends.cudnn.benchmark = True
        self.device, self._format = device, FORMATS[memory_format]
        self._precision = choose_precision(device.type == "cuda", device, "bfloat16")
        self.dtype = self._precision.dtype or torch.float32
        self.model = build_model(arch).to(device=device, memory_format=self._format)  # type: ignore[call-overload]
        self._optimizer = torch.optim.SGD(self.model.parameters(), lr=1e-3, momentum=0.9, fused=True)
        self._forward = StepForward(self.model, mode, batch_size)
        self._pace = Pace(device)
        self._shape = batch_size, 3, resolution, resolution

    def warm_up(self) -> float:
        """Compile; the seconds that it took."""
        if self._format == torch.channels_last:
            return self._forward.warm_up(self._shape, self.dtype, self.device, self._precision.autocast)
        # StepForward's images are channels-last, and it would compile once more for others.
        batch, start = self.random_batch(), time.perf_counter()
        self(*batch).item()
        return time.perf_counter() - start

    def flops(self) -> int:
        """Floating-point operations of training on one image, counted without a device."""
        return training_flops(self.model, self._shape[-1])

    def laid_out(self, images: Tensor) -> Tensor:
        """The images in its memory format: themselves where they are."""
        return images.contiguous(memory_format=self._format)

    def random_batch(self) -> tuple[Tensor, Tensor]:
        """Images and labels of the right shape."""
        images = torch.randn(self._shape, device=self.device, dtype=self.dtype)
        return self.laid_out(images), torch.randint(0, 5, self._shape[:1], device=self.device)

    def __call__(self, images: Tensor, labels: Tensor) -> Tensor:
        """Queue one step; its loss, which nothing has waited for."""
        self._optimizer.zero_grad(set_to_none=True)
        with span("forward"), self._precision.autocast():
            loss = torch.nn.functional.cross_entropy(self._forward(self.laid_out(images)), labels)
        with span("backward"):
            loss.backward()  # type: ignore[no-untyped-call]
        with span("optimizer"):
            self._optimizer.step()
        self._pace.step()
        return loss.detach()
