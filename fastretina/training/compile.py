"""Whether torch.compile pays, in which mode, and how long it took."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from fastretina.training.config import CompileSetting
from fastretina.training.distributed import without_sum

CAPABILITY = (7, 0)  # Triton, which torch.compile writes its kernels in, needs a GPU of that generation
# On the side of not compiling. On an H200 at 512 px: eager steps of a ResNet18 (batch 128) and a ResNet50 (64) made 3,366 and
# 993 images a second, 187 and 126 TFLOP/s, compiled ones 4,590 and 1,439, 27 and 31 % less time; compiling 20 and 53 convolutions
# took 20 and 48 s.
SAVING = 0.25  # share of an eager step's time
EAGER_TFLOPS = 190.0
SECONDS_PER_CONVOLUTION = 1.0  # of compiling, forward and backward
# Up to here an eager step's kernels take less time than launching them (about 600 launches of 5 us for a ResNet18), which
# a CUDA graph saves; above it, a graph only costs the copy of its input.
LAUNCH_BOUND_TFLOP = 0.3
WARM_UP_STEPS = 2  # the first compiles
GRAPH_WARM_UP_STEPS = 3  # the first compiles and runs eagerly, the second records the CUDA graphs, the third replays them


@dataclass(frozen=True)
class CompileChoice:
    """mode: torch.compile's, or None to run eagerly. note: one line that says why."""

    mode: str | None
    note: str


def training_flops(model: nn.Module, resolution: int) -> int:
    """Floating-point operations of training on one image, counted by torch over the forward and backward pass.

    A multiply-add is 2. Of a copy without memory, so that nothing is computed.
    """
    twin = copy.deepcopy(model).to("meta").eval()  # a batch of one has no variance for BatchNorm
    image = torch.zeros(1, 3, resolution, resolution, device="meta", dtype=next(twin.parameters()).dtype)
    with FlopCounterMode(display=False) as counter:
        torch.autograd.backward(twin(image).sum())
    return int(counter.get_total_flops())


def choose_compile(
    setting: CompileSetting,
    device: torch.device,
    model: nn.Module,
    resolution: int,
    batch_size: int,
    steps: int,
    capability: tuple[int, int] | None = None,
    accumulate: int = 1,
) -> CompileChoice:
    """Decide for `setting`: "auto", "off", or a mode of torch.compile by name, which is always obeyed.

    batch_size: images that one forward pass takes. steps: forward passes left in this run. capability: of the CUDA device; None
    asks it. accumulate: forward passes whose gradients add up; CUDA graphs are for one (see `config.check`).
    """
    if setting == "off":
        return CompileChoice(None, "off")
    if setting != "auto":
        return CompileChoice(setting, f"{setting}, as asked")
    if device.type != "cuda":
        return CompileChoice(None, f"off: on {device.type} it is not worth its compile time (--compile default asks for it)")
    capability = capability or torch.cuda.get_device_capability(device)
    if capability < CAPABILITY:
        needed, present = (".".join(map(str, version)) for version in (CAPABILITY, capability))
        return CompileChoice(None, f"off: needs compute capability {needed}, this GPU has {present}")
    per_step = training_flops(model, resolution) * batch_size / 1e12
    eager = steps * per_step / EAGER_TFLOPS
    costs = SECONDS_PER_CONVOLUTION * sum(isinstance(module, nn.Conv2d) for module in model.modules())
    estimate = f"may save {SAVING * eager:.0f} s of {steps:,} steps and costs about {costs:.0f} s"
    if SAVING * eager <= costs:
        return CompileChoice(None, f"off: {estimate}")
    if per_step <= LAUNCH_BOUND_TFLOP and accumulate == 1:
        why = f"CUDA graphs: steps of {per_step:.2f} TFLOP wait for launches"
        return CompileChoice("reduce-overhead", f"reduce-overhead ({why}): {estimate}")
    return CompileChoice("default", f"default: {estimate}")


class StepForward:
    """The forward pass of the training step: compiled for batches of one size, eager for the shorter last one.

    An epoch's remainder would otherwise compile all again, for one step an epoch, or make torch compile for sizes that vary,
    whose kernels are slower in every step.
    """

    def __init__(self, model: nn.Module, mode: str | None, batch_size: int, backend: str = "inductor") -> None:
        """mode: torch.compile's (its name is inductor's affair, other backends have none), or None: always eager."""
        self._model, self._batch_size = model, batch_size
        self._graphs = mode == "reduce-overhead"
        self._compiled: Callable[[Tensor], Tensor] | None = None
        if mode is not None:
            # dynamic=False: a second size must not make it give up what it knows of the first.
            options: dict[str, Any] = {"mode": mode} if backend == "inductor" else {}
            self._compiled = torch.compile(model, dynamic=False, backend=backend, **options)

    def __call__(self, images: Tensor) -> Tensor:
        """(B, C) logits of (B, 3, R, R) images."""
        if self._compiled is None or len(images) != self._batch_size:
            return self._model(images)  # type: ignore[no-any-return]
        if not self._graphs:
            return self._compiled(images)
        torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]
        # A CUDA graph's output is overwritten by its next replay, and who counts the answers reads them many steps later.
        return self._compiled(images).clone()

    def no_sync(self) -> AbstractContextManager[None]:
        """While entered, a DistributedDataParallel's gradients stay on their rank."""
        return without_sum(self._model)

    def warm_up(
        self,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        device: torch.device,
        autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> float:
        """Compile now, by two training steps (with CUDA graphs three) on zeros of the real shape, without an optimizer: so no
        epoch's clock holds it. The model must be in the mode that it is trained in.

        Returns the seconds that all steps took beyond as many of the last; 0 without compilation. The model's statistics and
        torch's random state stay as they are, gradients are cleared.
        """
        if self._compiled is None:
            return 0.0
        buffers = {name: buffer.clone() for name, buffer in self._model.named_buffers()}
        zeros = torch.zeros(shape, dtype=dtype, device=device).contiguous(memory_format=torch.channels_last)

        def step() -> float:
            # As the training loop does: gradients are outputs of a CUDA graph, whose memory the next step takes back. Adding to
            # them then is an error (pytorch#169545).
            self._model.zero_grad(set_to_none=True)
            started = time.perf_counter()
            with autocast():
                logits = self(zeros)
            torch.autograd.backward(logits.float().sum())
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            return time.perf_counter() - started

        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            seconds = [step() for _ in range(GRAPH_WARM_UP_STEPS if self._graphs else WARM_UP_STEPS)]
        self._model.zero_grad(set_to_none=True)
        with torch.no_grad():
            for name, buffer in self._model.named_buffers():
                buffer.copy_(buffers[name])
        return max(0.0, sum(seconds) - len(seconds) * seconds[-1])
