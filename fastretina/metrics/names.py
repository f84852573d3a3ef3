"""What the command line may choose the best epoch by. Imports no torch: --help should not wait for it."""

from __future__ import annotations

from typing import Literal

SelectionMetric = Literal["qwk", "accuracy", "balanced_accuracy", "macro_f1", "loss"]
