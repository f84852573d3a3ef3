"""Pack fundus photographs and their grades into a .beton file; see --help. Without flags: both splits in data/."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from fastretina import cli
from fastretina.errors import UsageError
from fastretina.packing.config import PackConfig

LAB = Path("data")  # what is packed without flags


def main(config: PackConfig) -> None:
    from fastretina.packing.pack import pack  # with its libraries, which --help need not wait for

    print(pack(config, progress=True))


@dataclass(frozen=True)
class NoFlags:
    """What the command line without flags means."""


def pack_lab(_: NoFlags) -> None:
    """Both splits of data/, where the lab's four CSVs lie there. UsageError where they do not."""
    missing = [
        name for split in ("train", "test") for name in (f"{split}_img.csv", f"{split}_label.csv") if not (LAB / name).is_file()
    ]
    if missing:
        raise UsageError(
            f"without flags {LAB}/ is packed, which lacks {', '.join(missing)}. "
            "Give --images DIR --labels FILE --out all.beton for a table, --class-folders DIR --out all.beton for class folders, "
            "or --root DIR --split train --out train.beton; --help explains the flags"
        )
    for split in ("train", "test"):
        main(PackConfig(LAB / f"{split}.beton", root=LAB, split=split))


def run_command(argv: Sequence[str] | None = None, prog: str | None = None) -> NoReturn:
    words = sys.argv[1:] if argv is None else argv
    if words:
        cli.run(PackConfig, main, words, prog)
    cli.run(NoFlags, pack_lab, words, prog)


if __name__ == "__main__":
    run_command()
