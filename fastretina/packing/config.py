"""What a packing can be asked for. Imports neither numpy nor pandas, so that `--help` answers at once."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from fastretina.beton.jpeg import MAX_SIDE
from fastretina.beton.paths import MAX_SHARDS, parse_shard
from fastretina.errors import UsageError
from fastretina.packing.preprocessing import Contrast, Crop, Preparation


@dataclass(frozen=True)
class PackConfig:
    """Pack a folder of fundus photographs and their grades into one .beton file.

    Give either --root and --split (the lab layout: SPLIT_img.csv and SPLIT_label.csv in ROOT) or --images and --labels
    (Kaggle's layout: one CSV of image,level).
    """

    out: Path
    """The .beton to write. It appears only when complete, and replaces an older one only then."""
    root: Path | None = None
    """Lab layout: the folder with the CSV files; images in it, in its data folder or in another folder below."""
    split: str | None = None
    """Lab layout: train or test."""
    images: Path | None = None
    """The folder with the images, if it is not ROOT."""
    labels: Path | None = None
    """Kaggle's layout: the CSV file."""
    size: int = 512
    """Pixels a side of the square images in the .beton."""
    workers: int | None = None
    """Threads that read and processes that re-encode; default: the usable CPU cores. The output does not depend on it."""
    on_bad: Literal["error", "skip"] = "error"
    """What an unusable image does: stop, or be left out and listed in OUT.skipped.csv."""
    max_bad: str = "0.5%"
    """With --on-bad skip: stop after all if more images than this are bad (a percentage of the rows, or a count)."""
    check: bool = True
    """Decode every JPEG that passes through, too: one of which a part is lost, or that shows nothing (dark all over, of one colour)
    is a bad image. What is re-encoded is always checked. Without it packing is several times as fast."""
    verify: bool = False
    """The old name of --check, which is the default now."""
    crop: Crop = "none"
    """fundus: find the retina's disc and crop to its square, so that it fills every image whatever the camera. Re-encodes all."""
    contrast: Contrast = "none"
    """local: subtract the local average colour, so that no light or pigment but the detail is left. Re-encodes all."""
    shards: int | None = None
    """Pack into N files instead of one, named like train-00000-of-00064.beton for --out train.beton; each appears when complete."""
    shard: str | None = None
    """K/N: pack only shard K (0 to N - 1) of N, the same bytes as --shards N gives, so that many machines can share the work."""

    @property
    def preparation(self) -> Preparation:
        """What --crop and --contrast ask for."""
        return Preparation(self.crop, self.contrast)

    def validate(self) -> None:
        """UsageError naming a flag whose value cannot be; which flags go together is for the layouts of labels to say."""
        if not 16 <= self.size <= MAX_SIDE:
            raise UsageError(f"--size {self.size}: from 16 to {MAX_SIDE} pixels")
        if self.workers is not None and not 1 <= self.workers <= 1024:
            raise UsageError(f"--workers {self.workers}: from 1 to 1024")
        if self.on_bad not in ("error", "skip"):
            raise UsageError(f"--on-bad {self.on_bad}: error or skip")
        if self.verify and not self.check:
            raise UsageError("--verify and --no-check: give one of them")
        if self.shards is not None and (self.shard is not None or not 1 <= self.shards <= MAX_SHARDS):
            raise UsageError(f"--shards {self.shards}: from 1 to {MAX_SHARDS}, and not together with --shard")
        if self.shard is not None:
            parse_shard(self.shard)
        self.allowed_bad(1)
        try:
            _ = self.preparation
        except ValueError as error:
            raise UsageError(f"--{error}") from None

    def allowed_bad(self, rows: int) -> int:
        """How many of `rows` may be bad by --max-bad: "12" or "0.5%". Raises UsageError."""
        text = self.max_bad
        try:
            limit = float(text.removesuffix("%")) / 100 * rows if text.endswith("%") else int(text)
        except ValueError:
            limit = -1
        if not 0 <= limit < float("inf"):
            raise UsageError(f"--max-bad {text}: a percentage like 0.5% or a count like 12")
        return int(limit)
