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

    Give --images and --labels (one table), or --class-folders (one folder a class), or --root and --split (the lab layout:
    SPLIT_img.csv and SPLIT_label.csv in ROOT).
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
    """One table of names and grades: comma, semicolon, tab or blanks between, with a header or without."""
    class_folders: Path | None = None
    """Instead of a table: a folder that holds one folder of images for each class, named like it."""
    image_column: str | None = None
    """Which column of --labels names the image; LEFT,RIGHT: two, one for each eye of the row's patient."""
    grade_column: str | None = None
    """Which column holds the grade; LEFT,RIGHT as for the images; none: pack images without grades, for prediction."""
    patient_column: str | None = None
    """Which column holds the patient: both eyes of a person belong together, in splits, intervals and fusion."""
    eye_column: str | None = None
    """Which column says which eye it is: left or right, L or R, OS or OD."""
    group_columns: str | None = None
    """Columns to keep for tables of subgroups, like camera,sex,site."""
    quality_column: str | None = None
    """Which column says whether an image can be graded; kept, and what --ungradable speaks of."""
    ungradable: str | None = None
    """Values that mean that an image cannot be graded, like 0,poor: of --quality-column, without that one of the grade itself.
    Such rows are left out and counted."""
    classes: str | None = None
    """What the classes are called, in ascending order: no,yes. auto: whatever the labels say. Default: the five grades of diabetic
    retinopathy, 0 to 4; two classes where all labels are 0 or 1."""
    referable: str | None = None
    """Which of --classes should see an ophthalmologist, by name, or none. Default: retinopathy from grade 2 on; the second
    of two."""
    class_order: Literal["auto", "ordinal", "nominal"] = "auto"
    """Whether each class is worse than the one before. auto: they are where they are numbers in sequence, more than two."""
    patient_pattern: str | None = None
    """Regular expression that finds the patient in an image's name (the first group, or a group called patient; one called eye is
    the eye). Default: <patient>_<left|right|L|R|OD|OS>."""
    follow_links: bool = False
    """Enter linked folders, and take linked files from anywhere."""
    splits: str | None = None
    """Divide the table, like train=0.7,val=0.1,test=0.2, into as many files: --out data/{split}.beton. By patient where patients
    are known, with the same share of every class, always in the same way."""
    split_seed: int = 0
    """Another seed of --splits is another division."""
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
    """Pack into N files instead of one, named like train-00000-of-00064.beton for --out train.beton; they appear when all are
    complete, and the disk needs room for them beside the older ones that they replace."""
    shard: str | None = None
    """K/N: pack only shard K (0 to N - 1) of N, the same samples as --shards N gives, so that many machines can share the work."""

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
