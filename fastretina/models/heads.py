"""What the network's last layer means: its loss, and the probabilities of the classes.

Three heads. `softmax` knows of no order; where the classes are grades, `regression` predicts the grade as a number, which
thresholds divide, and `ordinal` predicts for each grade whether the disease is worse. Losses and answers use no synchronisation
with the device.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, logsigmoid, nll_loss

from fastretina.errors import UsageError
from fastretina.grading import Classes
from fastretina.metrics.thresholds import fit_thresholds
from fastretina.models.options import ClassWeights, HeadName

SMALLEST_PROBABILITY = 1e-12
DEFAULT_SCALE = 0.25  # of a regression without validation data: a standard deviation of half a grade
SCALES = (0.01, 10.0)  # of a regression: between these
# Temperatures: between these. Of a few images that are all right the best would be 0, which is surer than anybody can be.
TEMPERATURES = (0.2, 20.0)
TRIED, ROUNDS = 33, 3  # scales in a round, each between the neighbours of the best before; the last two are 0.2 % apart


@dataclass(frozen=True)
class Decision:
    """How the network's outputs become probabilities, fitted on validation data.

    Attributes:
        thresholds: between the grades of the regression head's number y; () for the other heads.
        scale: of the regression head below; of the others the temperature, which divides their logarithms of probabilities
            (Guo et al., On Calibration of Modern Neural Networks, ICML 2017, section 4.2). It changes no answer.

    Regression: p(k) is proportional to exp((k y - t_1 - ... - t_k) / scale). For a normal y with mean k and variance `scale` under
    grade k these are Bayes' posteriors; the thresholds t hold the priors. Whatever the scale, the most probable grade is the number
    of (ascending) thresholds below y.
    """

    thresholds: tuple[float, ...]
    scale: float


class Head(ABC):
    """The meaning of a last layer. `name` as on the command line; `objective`: what training makes small, in words; `outputs`: how
    many units it has for `num_classes` classes; `needs_order`: whether it makes sense for grades alone; `scale`, `scales`: that of
    a Decision where nothing was fitted, and between which it is looked for."""

    name: HeadName
    objective: str
    needs_order = True
    scale, scales = 1.0, TEMPERATURES

    def __init__(self, num_classes: int) -> None:
        self.num_classes = self.outputs = num_classes

    @abstractmethod
    def log_probabilities(self, outputs: Tensor, decision: Decision | None = None) -> Tensor:
        """(..., C) float32 log-probabilities of the grades from (..., outputs) of the network. `decision`: see `fit`."""

    @abstractmethod
    def target(self, outputs: Tensor, grades: Tensor) -> Tensor:
        """(B,) differentiable evidence in (B, outputs) for (B,) grades: what an explanation takes the gradient of."""

    def fit(self, outputs: Tensor, labels: Tensor) -> Decision:
        """What is fitted on validation data, their (N, outputs) and (N,) true grades: the thresholds, if the head has any; then the
        scale of the lowest cross-entropy."""
        thresholds, labels = self.fit_thresholds(outputs, labels), labels.to(outputs.device)
        low, high = self.scales
        for _ in range(ROUNDS):
            tried = torch.logspace(math.log10(low), math.log10(high), TRIED, dtype=torch.float64).tolist()
            losses = [float(nll_loss(self.log_probabilities(outputs, Decision(thresholds, scale)), labels)) for scale in tried]
            best = min(range(TRIED), key=losses.__getitem__)
            low, high = tried[max(best - 1, 0)], tried[min(best + 1, TRIED - 1)]
        return Decision(thresholds, tried[best])

    def fit_thresholds(self, outputs: Tensor, labels: Tensor) -> tuple[float, ...]:
        """Those of a Decision, of (N, outputs) and (N,) true grades."""
        return ()

    def uncalibrated(self, decision: Decision | None) -> Decision | None:
        """The same decision with the scale of one that was not fitted."""
        return None if decision is None else replace(decision, scale=self.scale)

    def rescaled(self, log_probabilities: Tensor, decision: Decision) -> Tensor:
        """(N, C) log-probabilities that this decision gave of one view, as its `uncalibrated` would have given them."""
        return (log_probabilities * (decision.scale / self.scale)).log_softmax(dim=-1)

    def answer(self, outputs: Tensor, decision: Decision | None = None) -> Tensor:
        """(N, C) float32 log-probabilities from (V, N, outputs): the mean of the probabilities of V views of each image."""
        found = self.log_probabilities(outputs, decision)
        return found[0] if len(found) == 1 else found.logsumexp(dim=0) - math.log(len(found))


class Softmax(Head):
    """One logit a class."""

    name: HeadName = "softmax"
    objective = "cross-entropy"
    needs_order = False

    def log_probabilities(self, outputs: Tensor, decision: Decision | None = None) -> Tensor:
        logits = outputs.float() if decision is None else outputs.float() / decision.scale
        return logits.log_softmax(dim=-1)

    def target(self, outputs: Tensor, grades: Tensor) -> Tensor:
        return outputs.gather(1, grades[:, None])[:, 0]


class Regression(Head):
    """One number, the grade. Without validation data the thresholds lie half-way between the grades."""

    name: HeadName = "regression"
    objective = "squared error"
    scale, scales = DEFAULT_SCALE, SCALES

    def __init__(self, num_classes: int) -> None:
        super().__init__(num_classes)
        self.outputs = 1

    def log_probabilities(self, outputs: Tensor, decision: Decision | None = None) -> Tensor:
        grades = torch.arange(self.num_classes, dtype=torch.float32, device=outputs.device)
        if decision is None:
            # The sums of 0.5, 1.5, ..., made on the device: in training each step would wait for a copy of them.
            offsets, scale = grades.square() / 2, DEFAULT_SCALE
        else:
            offsets, scale = torch.tensor([0.0, *decision.thresholds], device=outputs.device).cumsum(dim=0), decision.scale
        return ((grades * outputs.float() - offsets) / scale).log_softmax(dim=-1)

    def target(self, outputs: Tensor, grades: Tensor) -> Tensor:
        return outputs[:, 0]

    def fit_thresholds(self, outputs: Tensor, labels: Tensor) -> tuple[float, ...]:
        """Those of the highest QWK."""
        return tuple(fit_thresholds(outputs[:, 0].double().cpu().numpy(), labels.cpu().numpy(), self.num_classes))


class Ordinal(Head):
    """CORN: logit k says whether the grade is above k, given that it is above k - 1 (Shi, Cao and Raschka, Deep neural networks
    for rank-consistent ordinal regression based on conditional probabilities, Pattern Anal Appl 2023, section 3)."""

    name: HeadName = "ordinal"
    objective = "cross-entropy of the steps"

    def __init__(self, num_classes: int) -> None:
        super().__init__(num_classes)
        self.outputs = num_classes - 1

    def log_probabilities(self, outputs: Tensor, decision: Decision | None = None) -> Tensor:
        # P(grade > k), k = -1 ... C - 1: one at first, zero in the end, falling in between.
        above = logsigmoid(outputs.float()).cumsum(dim=-1).exp()
        ones = torch.ones_like(above[..., :1])
        exact = torch.cat([ones, above], dim=-1) - torch.cat([above, torch.zeros_like(ones)], dim=-1)
        found = exact.clamp_min(SMALLEST_PROBABILITY).log()
        return found if decision is None else (found / decision.scale).log_softmax(dim=-1)

    def target(self, outputs: Tensor, grades: Tensor) -> Tensor:
        """The evidence that the grade is at least this one; for grade 0 that it is not above."""
        steps = torch.arange(self.outputs, device=outputs.device)
        reached = (outputs * (steps < grades[:, None])).sum(dim=1)
        return torch.where(grades == 0, -outputs[:, 0], reached)


def head_layer(model: nn.Module) -> tuple[str, nn.Linear]:
    """The linear layer that a head reads, and its name; all else is the backbone. What timm calls the classifier; of other networks
    the last linear layer."""
    linear = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    ask: Any = getattr(model, "get_classifier", None)
    return linear[-1] if ask is None else next(pair for pair in linear if pair[1] is ask())


HEADS: dict[HeadName, type[Head]] = {"softmax": Softmax, "regression": Regression, "ordinal": Ordinal}


def head_for(name: HeadName, classes: Classes) -> Head:
    """The head of this name for these classes. UsageError where it needs an order that they do not have."""
    if HEADS[name].needs_order and not classes.ordinal:
        raise UsageError(
            f"--head {name}: needs grades, each worse than the one before, and the classes {', '.join(classes)} have no order; use "
            "--head softmax, or pack with --class-order ordinal where they have one"
        )
    return HEADS[name](len(classes))


class Loss:
    """The training loss of a head: the mean over images, weighted by `weight`."""

    def __init__(
        self, head: Head, counts: Sequence[int], class_weights: ClassWeights = "none", logit_adjustment: float = 0.0
    ) -> None:
        """
        Args:
            counts: training images by grade.
            class_weights: of each image's loss, 1 / count (balanced) or 1 / sqrt(count), scaled to a mean of 1 over the images.
            logit_adjustment: tau; the logits get tau log(prior) while training, so that without it they favour no grade (Menon et
                al., Long-tail learning via logit adjustment, ICLR 2021, equation 10). Softmax alone.

        Raises UsageError for what the head cannot use.
        """
        if not isinstance(head, Softmax) and logit_adjustment:
            raise UsageError(
                f"--logit-adjustment: is for --head softmax, not {head.name}; --class-weights and --sampling suit every head"
            )
        self.head = head
        images = torch.tensor(counts, dtype=torch.float64)
        present = images.clamp_min(1.0)  # a grade without images has no part in any loss; its weight only must be finite
        power = {"none": 0.0, "sqrt": -0.5, "balanced": -1.0}[class_weights]
        weights = present**power
        self.weights = None if class_weights == "none" else (weights * images.sum() / (weights * images).sum()).float()
        self.offsets = (logit_adjustment * (present / images.sum()).log()).float() if logit_adjustment else None

    def to(self, device: torch.device) -> Loss:
        """Move the weights to the device; returns itself."""
        self.weights = None if self.weights is None else self.weights.to(device)
        self.offsets = None if self.offsets is None else self.offsets.to(device)
        return self

    def weight(self, labels: Tensor) -> Tensor:
        """What (B,) grades count in the mean, a scalar: images, or their class weights; CORN counts decisions, not images."""
        weights = self._weights(labels)
        if isinstance(self.head, Ordinal):
            weights = weights * (labels + 1).clamp_max(self.head.outputs)
        return weights.sum()

    def _weights(self, labels: Tensor) -> Tensor:
        return torch.ones_like(labels, dtype=torch.float32) if self.weights is None else self.weights[labels]

    def __call__(self, outputs: Tensor, labels: Tensor, total: Tensor | None = None) -> Tensor:
        """The part that (B, outputs) of images with (B,) grades have in the mean loss, a scalar; B may be 0.

        total: the `weight` of all images that the mean is taken over, where these are a part of them: the parts add up to it.
        """
        total = self.weight(labels) if total is None else total
        outputs = outputs.float()
        if isinstance(self.head, Softmax):
            logits = outputs if self.offsets is None else outputs + self.offsets
            return cross_entropy(logits, labels, self.weights, reduction="sum") / total
        weights = self._weights(labels)
        if isinstance(self.head, Regression):
            return (weights * (outputs[:, 0] - labels).square()).sum() / total
        steps = torch.arange(self.head.outputs, device=labels.device)
        asked = (labels[:, None] >= steps) * weights[:, None]
        wrong = binary_cross_entropy_with_logits(outputs, (labels[:, None] > steps).float(), reduction="none")
        return (wrong * asked).sum() / total
