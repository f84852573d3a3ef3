"""What the command line may say of heads and number formats. Imports no torch: --help should not wait for it."""

from __future__ import annotations

from typing import Literal

HeadName = Literal["softmax", "regression", "ordinal"]
ClassWeights = Literal["none", "sqrt", "balanced"]
AmpDtype = Literal["auto", "bfloat16", "float16"]
AmpChoice = Literal["auto", "on", "off"]
