"""Pack fundus photographs and their grades into a .beton file; see --help."""

from __future__ import annotations

from collections.abc import Sequence

from fastretina import cli
from fastretina.packing.config import PackConfig


def main(config: PackConfig) -> None:
    """Pack a folder of fundus photographs and their grades into one .beton file.

    Give either --root and --split (the lab layout: SPLIT_img.csv and SPLIT_label.csv in ROOT)
    or --images and --labels (Kaggle's layout: one CSV of image,level).
    """
    from fastretina.packing.pack import pack  # with its libraries, which --help need not wait for

    print(pack(config, progress=True))


def run_command(argv: Sequence[str] | None = None) -> None:
    """The command line of this module; exits."""
    cli.run(PackConfig, main, argv)


if __name__ == "__main__":
    run_command()
