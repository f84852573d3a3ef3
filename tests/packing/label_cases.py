"""What the tests of label tables share: a folder of empty images, a table, and what is read from them."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from fastretina.packing.config import PackConfig
from fastretina.packing.labels.registry import layout_of
from fastretina.packing.labels.table import LabelTable

OUT = Path("out.beton")  # not written
FIVE = tuple(f"{n}_left.jpeg" for n in range(5))


def images(root: Path, names: Iterable[str] = FIVE) -> Path:
    """A folder with empty files of these names."""
    for name in names:
        path = root / "img" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return root / "img"


def read_table(root: Path, text: str | bytes, missing_ok: bool = False, **flags: Any) -> LabelTable:
    """What a table of this content in `root` says about the images in `root`/img."""
    (root / "all.csv").write_bytes(text if isinstance(text, bytes) else text.encode())
    config = PackConfig(OUT, images=root / "img", labels=root / "all.csv", **flags)
    return layout_of(config).read(config, missing_ok or config.on_bad == "skip")


def read_folders(folder: Path, **flags: Any) -> LabelTable:
    """What class folders say."""
    config = PackConfig(OUT, class_folders=folder, **flags)
    return layout_of(config).read(config, config.on_bad == "skip")


def rows(table: LabelTable) -> dict[str, int]:
    """The class of each image by its name."""
    return dict(zip(table.names, table.grades.tolist(), strict=True))
