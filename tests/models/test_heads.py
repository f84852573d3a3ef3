"""Heads turn outputs into probabilities whose largest is the answer; losses are those of the papers they are named for."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from fastretina.errors import UsageError
from fastretina.models.heads import HEADS, Decision, Loss, Ordinal, Regression, Softmax

COUNTS = [70, 10, 12, 5, 3]


def random_case(head: str, n: int = 64, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    outputs = 2 * torch.randn(n, HEADS[head](5).outputs, generator=generator)
    return outputs, torch.randint(0, 5, (n,), generator=generator)


@pytest.mark.parametrize("head", HEADS)
def test_probabilities_add_up_to_one_also_for_extreme_outputs(head):
    outputs, _ = random_case(head)
    for values in (outputs, 100 * outputs):
        found = HEADS[head](5).log_probabilities(values)
        assert found.shape == (64, 5)
        assert torch.allclose(found.exp().sum(1), torch.ones(64), atol=1e-5)
        assert torch.isfinite(found).all()


@pytest.mark.parametrize("scale", [0.01, 0.3, 5.0])
def test_a_regression_answers_with_the_number_of_thresholds_below_its_output(scale):
    thresholds = (-0.3, 0.9, 1.1, 3.7)
    outputs = torch.linspace(-2, 6, 997)[:, None]
    found = Regression(5).log_probabilities(outputs, Decision(thresholds, scale)).argmax(1)
    expected = np.searchsorted(thresholds, outputs[:, 0].numpy())
    assert found.tolist() == expected.tolist()


def test_a_regressions_probabilities_are_bayes_posteriors_of_normal_outputs():
    """Equal priors, mean k and variance 0.3 under grade k: thresholds at the half grades."""
    outputs = torch.linspace(-1, 5, 50)[:, None]
    density = torch.exp(-((outputs - torch.arange(5)) ** 2) / (2 * 0.3))
    found = Regression(5).log_probabilities(outputs, Decision((0.5, 1.5, 2.5, 3.5), 0.3)).exp()
    assert torch.allclose(found, density / density.sum(1, keepdim=True), atol=1e-5)


def test_a_fitted_regression_beats_the_half_grades_where_outputs_are_squeezed():
    torch.manual_seed(0)
    labels = torch.multinomial(torch.tensor(COUNTS, dtype=torch.float32), 1000, replacement=True)
    outputs = (0.4 * labels + 0.1 + 0.05 * torch.randn(1000))[:, None]  # all below 2: the half grades never say 3 or 4
    head = Regression(5)
    decision = head.fit(outputs, labels)
    assert (head.log_probabilities(outputs, decision).argmax(1) == labels).float().mean() > 0.97
    assert (head.log_probabilities(outputs).argmax(1) == labels).float().mean() < 0.9


def test_corn_gives_the_product_of_the_conditional_probabilities():
    outputs, _ = random_case("ordinal")
    found = Ordinal(5).log_probabilities(outputs).exp().double().numpy()
    conditional = outputs.double().sigmoid().numpy()
    for row, probabilities in zip(conditional, found, strict=True):
        above = [1.0, *np.cumprod(row), 0.0]
        assert probabilities == pytest.approx([above[k] - above[k + 1] for k in range(5)], abs=1e-6)


def test_corn_loss_is_that_of_the_paper():
    outputs, labels = random_case("ordinal")
    total, terms = 0.0, 0
    for row, label in zip(outputs.double().tolist(), labels.tolist(), strict=True):
        for k, logit in enumerate(row):
            if label >= k:  # the conditional training subset S_k
                probability = 1 / (1 + math.exp(-logit))
                total -= math.log(probability if label > k else 1 - probability)
                terms += 1
    assert float(Loss(Ordinal(5), COUNTS)(outputs, labels)) == pytest.approx(total / terms, rel=1e-5)


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("class_weights", ["sqrt", "balanced"])
def test_class_weights_have_a_mean_of_one_and_fall_with_the_count(head, class_weights):
    weights = Loss(HEADS[head](5), COUNTS, class_weights).weights
    assert weights is not None
    assert float((weights * torch.tensor(COUNTS)).sum() / sum(COUNTS)) == pytest.approx(1.0)
    expected = (COUNTS[0] / COUNTS[4]) ** (0.5 if class_weights == "sqrt" else 1.0)
    assert float(weights[4] / weights[0]) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("head", HEADS)
def test_a_weighted_loss_is_the_loss_of_images_repeated_so_often(head):
    """Weights in whole multiples, so that repetition can stand for them."""
    counts = [4, 1, 1, 1, 2]
    outputs, labels = random_case(head, 32)
    loss = Loss(HEADS[head](5), counts, "balanced")
    repeats = torch.tensor([1, 4, 4, 4, 2])[labels]
    rows = torch.arange(32).repeat_interleave(repeats)
    plain = Loss(HEADS[head](5), counts)
    assert float(loss(outputs, labels)) == pytest.approx(float(plain(outputs[rows], labels[rows])), rel=1e-5)


def test_logit_adjustment_learns_balanced_logits_from_skewed_labels():
    """With no information in the inputs the best plain logits are the log priors; adjusted ones are equal for all grades."""
    labels = torch.arange(5).repeat_interleave(torch.tensor(COUNTS))
    for tau, expected in ((0.0, torch.tensor(COUNTS) / 100), (1.0, torch.full((5,), 0.2))):
        logits = torch.zeros(5, requires_grad=True)
        loss = Loss(Softmax(5), COUNTS, logit_adjustment=tau)
        optimizer = torch.optim.LBFGS([logits], max_iter=200, tolerance_grad=1e-9)

        def closure(logits=logits, loss=loss, optimizer=optimizer):
            optimizer.zero_grad()
            value = loss(logits.expand(len(labels), 5), labels)
            value.backward()
            return value

        optimizer.step(closure)
        assert torch.allclose(logits.detach().softmax(0), expected, atol=1e-3)


@pytest.mark.parametrize("head", ["regression", "ordinal"])
def test_an_option_that_a_head_cannot_use_is_refused(head):
    with pytest.raises(UsageError, match="--head softmax"):
        Loss(HEADS[head](5), COUNTS, logit_adjustment=1.0)


def test_views_are_averaged_as_probabilities():
    outputs = torch.randn(8, 6, 5, generator=torch.Generator().manual_seed(3))
    assert torch.allclose(Softmax(5).answer(outputs).exp(), outputs.softmax(2).mean(0), atol=1e-6)


@pytest.mark.parametrize("head", HEADS)
def test_the_evidence_for_a_grade_grows_where_its_probability_does(head):
    outputs, grades = random_case(head)
    if head == "regression":
        grades = torch.full_like(grades, 4)
    outputs.requires_grad_()
    (slope,) = torch.autograd.grad(HEADS[head](5).target(outputs, grades).sum(), outputs)
    closer = (outputs + 0.05 * slope).detach()
    if head == "ordinal":  # at least this grade, or not above 0

        def probability(values):
            found = HEADS[head](5).log_probabilities(values).exp()
            return torch.stack([found[n, grade:].sum() if grade else found[n, 0] for n, grade in enumerate(grades.tolist())])
    else:

        def probability(values):
            return HEADS[head](5).log_probabilities(values).gather(1, grades[:, None])[:, 0]

    assert (probability(closer) >= probability(outputs.detach()) - 1e-6).all()
