"""Random answers of a model that knows something, for tests of metrics."""

from __future__ import annotations

import numpy as np
import torch

from fastretina.metrics.predictions import Predictions


def answers(seed: int, count: int, digits: int | None = None, classes: int = 5) -> tuple[np.ndarray, np.ndarray]:
    """(N,) skewed labels and (N, C) probabilities that know something of them; few digits make tied scores."""
    rng = np.random.default_rng(seed)
    shares = {2: [0.8, 0.2], 5: [0.6, 0.1, 0.15, 0.1, 0.05]}.get(classes, rng.dirichlet(np.full(classes, 0.5)))
    labels = rng.choice(classes, size=count, p=shares)
    logits = rng.normal(0, 1, (count, classes)) + 1.5 * np.eye(classes)[labels]
    if digits is not None:
        logits = np.round(logits, digits)
    probabilities = np.exp(logits)
    return labels, probabilities / probabilities.sum(axis=1, keepdims=True)


def patients(count: int) -> list[str]:
    """Two images each."""
    return [str(n // 2) for n in range(count)]


def predictions(labels: np.ndarray, probabilities: np.ndarray, ids: np.ndarray | None = None) -> Predictions:
    """As a model gives them."""
    numbers = torch.arange(len(labels)) if ids is None else torch.from_numpy(ids)
    return Predictions(torch.from_numpy(probabilities).log().float(), torch.from_numpy(labels), numbers)


def stored(answered: Predictions) -> np.ndarray:
    """(N, C) float64 probabilities of answers, which keep float32 logarithms."""
    return answered.log_probabilities.double().exp().numpy()
