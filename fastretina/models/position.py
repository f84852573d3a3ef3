"""What a vision transformer's weights need before they fit: positions for another resolution, a part that begins anew."""

from __future__ import annotations

import math
from dataclasses import replace

from torch import nn

from fastretina.models.wrappings import Stored, backbone_names, is_known

POSITIONS = "pos_embed"


def fitted(model: nn.Module, stored: Stored, anew: str | None = None) -> tuple[Stored, list[str]]:
    """`stored` with its position embeddings interpolated to the model's grid of patches (bicubic, as timm does it), and with the
    model's own initial values of the part `anew` where it has none; and what was done, in words. Whatever cannot fit stays."""
    own, tensors, notes = model.state_dict(), dict(stored.tensors), []
    grid = getattr(getattr(model, "patch_embed", None), "grid_size", None)
    if grid is not None and POSITIONS in own:
        for name, theirs in stored.tensors.items():
            prefix = name.removesuffix(POSITIONS)
            others = own[POSITIONS].shape[1] - grid[0] * grid[1]  # tokens before the patches': the class's, registers
            side = math.isqrt(max(0, theirs.shape[1] - others)) if theirs.ndim == 3 else 0
            fits = side > 0 and side**2 == theirs.shape[1] - others and theirs.shape[2] == own[POSITIONS].shape[2]
            if not name.endswith(POSITIONS) or not is_known(prefix) or not fits or theirs.shape == own[POSITIONS].shape:
                continue
            from timm.layers.pos_embed import resample_abs_pos_embed

            tensors[name] = resample_abs_pos_embed(theirs, list(grid), [side, side], num_prefix_tokens=others)
            notes.append(f"position embedding interpolated from {side} × {side} to {grid[0]} × {grid[1]} patches")
    if anew is not None:
        names = [name for name in own if name.startswith(f"{anew}.")]
        first = next(name for name in backbone_names(model) if name not in names)
        for prefix in [name.removesuffix(first) for name in stored.tensors if name.endswith(first)]:
            if not any(name.startswith(f"{prefix}{anew}.") for name in stored.tensors):
                tensors |= {prefix + name: own[name] for name in names}
                notes.append(f"{anew} begins anew")
    return replace(stored, tensors=tensors), notes
