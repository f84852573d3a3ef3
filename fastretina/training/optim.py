"""Optimizer and learning-rate schedules. A schedule is a pure function of the step, so that a resumed run goes on exactly."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from fastretina.models.depth import layer_depths
from fastretina.models.heads import head_layer
from fastretina.training.config import OptimizerName, Recipe

DECAYED_MODULES = (nn.Conv2d, nn.Linear)
WARMUP_SHARE = 0.05  # of all steps, and one epoch at most: the cosine's climb from 1 % of the rate
FIRST_FACTOR = 0.01
ONECYCLE_RISE = 0.3  # torch.optim.lr_scheduler.OneCycleLR's defaults: pct_start,
ONECYCLE_DIV, ONECYCLE_FINAL_DIV = 25.0, 1e4  # div_factor, final_div_factor
SECOND_PHASE_FACTOR = 0.1


def parameter_groups(
    model: nn.Module, lr: float, weight_decay: float, backbone_lr: float = 1.0, layer_decay: float = 1.0
) -> list[dict[str, Any]]:
    """Groups by module type and layer: weights of convolutions and linear layers decay; biases and everything of norms do not.
    The last layer learns at `lr`, the backbone at `backbone_lr` times that: a pretrained backbone needs less than a new head; and
    each of its layers at `layer_decay` times the rate of the next (Clark et al., ELECTRA, 2020; Bao et al., BEiT, 2021)."""
    decayed = {id(module.weight) for module in model.modules() if isinstance(module, DECAYED_MODULES)}
    head = {id(parameter) for parameter in head_layer(model)[1].parameters()}
    depths = layer_depths(model) if layer_decay != 1.0 else {}
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        rate = lr if id(parameter) in head else lr * backbone_lr * layer_decay ** depths.get(name, 0)
        decay = weight_decay if id(parameter) in decayed else 0.0
        groups.setdefault((rate, decay), []).append(parameter)
    return [{"params": members, "lr": rate, "weight_decay": decay} for (rate, decay), members in groups.items()]


def build_optimizer(
    model: nn.Module, name: OptimizerName, lr: float, weight_decay: float, backbone_lr: float = 1.0, layer_decay: float = 1.0
) -> torch.optim.Optimizer:
    """AdamW, or SGD with Nesterov momentum 0.9; fused: one kernel for all parameters instead of several for each."""
    groups = parameter_groups(model, lr, weight_decay, backbone_lr, layer_decay)
    if name == "sgd":
        return torch.optim.SGD(groups, lr=lr, momentum=0.9, nesterov=True, fused=True)
    return torch.optim.AdamW(groups, lr=lr, fused=True)


class ExponentialAverage(AveragedModel):
    """A copy of a model that `update_parameters` moves towards it, weights and buffers, by 1 - d.

    d is the smaller of `decay` and (1 + n) / (10 + n), n updates after the start, so that the first, random weights are soon
    forgotten (as `num_updates` does in TensorFlow's ExponentialMovingAverage).
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        super().__init__(model, use_buffers=True)
        self.decay = decay

    @torch.no_grad()
    def update_parameters(self, model: nn.Module) -> None:
        """One update. The base class's would copy its counter to the device, and each time wait for all that is queued there."""
        updates = int(self.n_averaged)  # a buffer that stays on the CPU
        own, others = (itertools.chain(each.parameters(), each.buffers()) for each in (self.module, model))
        pairs = list(zip(own, others, strict=True))
        moved = [pair for pair in pairs if updates and pair[0].is_floating_point()]
        copied = [pair for pair in pairs if not (updates and pair[0].is_floating_point())]  # BatchNorm's counters, and all at first
        if moved:
            averaged, current = (list(part) for part in zip(*moved, strict=True))
            torch._foreach_lerp_(averaged, current, 1.0 - min(self.decay, (1 + updates) / (10 + updates)))
        if copied:
            averaged, current = (list(part) for part in zip(*copied, strict=True))
            torch._foreach_copy_(averaged, current)
        self.n_averaged += 1

    def restart(self, model: nn.Module) -> None:
        """Begin anew from `model`."""
        self.n_averaged.zero_()
        self.update_parameters(model)


def rate_factor(config: Recipe, steps_per_epoch: int) -> Callable[[int], float]:
    """A function from the step (from 0, counted over the whole run) to the factor on the learning rate, 0-1, for LambdaLR.

    cosine: linear warm-up over 5 % of the run (an epoch at most), then half a cosine to 0. two-phase: 1,
    then 0.1 from the second phase on.
    onecycle: torch's OneCycleLR without its change of momentum. constant: 1.
    """
    total = max(1, config.epochs * steps_per_epoch)
    if config.schedule == "cosine":
        warmup = min(steps_per_epoch, round(WARMUP_SHARE * total))
        return lambda step: _cosine(step, total, warmup)
    if config.schedule == "onecycle":
        return lambda step: _onecycle(step, total)
    last = math.inf if config.second_phase is None else config.second_phase * steps_per_epoch
    return lambda step: 1.0 if step < last else SECOND_PHASE_FACTOR


def _between(start: float, end: float, share: float) -> float:
    """Half a cosine from `start` to `end`; share: 0-1 of the way, more is the end."""
    return end + (start - end) / 2.0 * (1.0 + math.cos(math.pi * min(1.0, share)))


def _cosine(step: int, total: int, warmup: int) -> float:
    if step < warmup:
        return FIRST_FACTOR + (1.0 - FIRST_FACTOR) * step / warmup
    return _between(1.0, 0.0, (step - warmup) / max(1, total - warmup))


def _onecycle(step: int, total: int) -> float:
    peak = ONECYCLE_RISE * total - 1.0
    if step <= peak:
        return _between(1.0 / ONECYCLE_DIV, 1.0, step / peak)
    return _between(1.0, 1.0 / (ONECYCLE_DIV * ONECYCLE_FINAL_DIV), (step - peak) / max(1.0, total - 1.0 - peak))
