"""How much of a CUDA device's memory is free, how much training will take, and what keeps it to that."""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from fastretina.streams import current_stream, mark

OPTIMIZER_STATES = 2  # tensors that AdamW keeps for each parameter
STEPS_AHEAD = 2  # that the host may have queued, one of them running
# Beside what one step measures: fragments between blocks, cuDNN's workspaces for the last and shorter batch, the evaluation's.
STEP_MARGIN = 1.15


def device_available_bytes(device: torch.device) -> int:
    """Bytes of a CUDA device's memory that torch may still hand out: what is free, and what its allocator holds unused."""
    held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(torch.cuda.mem_get_info(device)[0]) + held


def training_bytes(
    model: nn.Module,
    images: tuple[int, ...],
    dtype: torch.dtype,
    device: torch.device,
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
    batches: int = STEPS_AHEAD + 2,
) -> int:
    """Device memory in bytes that training this model will take beside the model itself: the reserve of resident="auto".

    Measured: the peak of one forward and backward pass of a copy of the model over (B, 3, R, R) zeros of `dtype`; plus the
    optimizer's state and so many batches on their way. The model, its statistics and torch's random state stay as they are.
    0 on a CPU.
    """
    if device.type != "cuda":
        return 0
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    twin = copy.deepcopy(model).train()
    zeros = torch.zeros(images, dtype=dtype, device=device).contiguous(memory_format=torch.channels_last)
    with torch.random.fork_rng([device]):
        with autocast():
            answer: Tensor = twin(zeros)
        torch.autograd.backward(answer.float().sum())
    torch.cuda.synchronize(device)
    peak = torch.cuda.max_memory_allocated(device) - before
    parameters = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    batch = zeros.numel() * zeros.element_size()
    del twin, zeros, answer
    torch.cuda.empty_cache()
    return int(STEP_MARGIN * peak) + OPTIMIZER_STATES * parameters + batches * batch


class Pace:
    """Keeps the host from queueing more than STEPS_AHEAD steps on a CUDA device.

    A step that is launched in no time, as a CUDA graph is, would otherwise take batch after batch, each in memory of its own. The
    device never runs dry: the host waits for the last step but STEPS_AHEAD. On a CPU there is nothing to do.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._queued: deque[torch.cuda.Event] = deque()

    def step(self) -> None:
        """A step has been queued on the current stream."""
        event = mark(current_stream(self._device))
        if event is None:
            return
        self._queued.append(event)
        if len(self._queued) > STEPS_AHEAD:
            self._queued.popleft().synchronize()
