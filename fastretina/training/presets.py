"""Named settings, `--recipe`: all that a run needs to be told besides its data. docs/recipe.md says what each gives, and why.

Imports no torch: --help should not wait for it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

RecipeName = Literal["baseline", "fast", "best", "tune"]


@dataclass(frozen=True)
class Preset:
    """title: what it is for, in a few words. settings: by their names in `config.Recipe`, and `arch`; the others have their
    defaults."""

    title: str
    settings: Mapping[str, Any]

    @property
    def flags(self) -> list[str]:
        """The flags that it stands for."""
        return [flag(name, value) for name, value in self.settings.items()]


def flag(name: str, value: Any) -> str:
    """A setting as it is given on a command line, in one word."""
    name = name.replace("_", "-")
    return f"--{name}={value}" if not isinstance(value, bool) else f"--{name}" if value else f"--no-{name}"


# What all but `baseline` have in common.
EVERY_GRADE: dict[str, Any] = {
    "amp": True,
    "batch_size": 16,
    "lr": 1e-3,
    "schedule": "onecycle",
    "sampling": "sqrt",
    "select_by": "loss",
}
FINE: dict[str, Any] = {**EVERY_GRADE, "resolution": 160, "ema": 0.99}
PRESETS: dict[RecipeName, Preset] = {
    "baseline": Preset(
        "what collapses to one grade: no rotation, a constant rate, the epoch chosen on the test set",
        {
            "resolution": 224,
            "epochs": 7,
            "augment": "off",
            "schedule": "constant",
            "class_weights": "sqrt",
            "val_fraction": 0.0,
            "batchnorm_images": 0,
        },
    ),
    "fast": Preset("a first look", {**EVERY_GRADE, "arch": "resnet10", "resolution": 160, "epochs": 5}),
    "best": Preset("longer and finer", {**FINE, "epochs": 10}),
    "tune": Preset("from another run's weights, or ImageNet's (--weights)", {**FINE, "epochs": 8}),
}


def presets_in_words() -> str:
    """Each with what it is for, and the flags that it stands for."""
    return "\n".join(f"{name}: {preset.title}: {' '.join(preset.flags)}" for name, preset in PRESETS.items())


def recipe_in_words(name: RecipeName, settings: Mapping[str, Any]) -> str:
    """A run's recipe and its flags, and those that the run's `settings` override."""
    preset = PRESETS[name]
    others = [flag(key, settings[key]) for key, value in preset.settings.items() if settings[key] != value]
    return f"{name} ({' '.join(preset.flags)})" + (f", but {' '.join(others)}" if others else "")
