"""Pack fundus photographs and their grades into a .beton file; see --help."""

from fastretina.cli import run
from fastretina.convert import PackConfig, pack


def main(config: PackConfig) -> None:
    """Pack a folder of fundus photographs and their grades into one .beton file.

    Give either --root and --split (the lab layout: SPLIT_img.csv and SPLIT_label.csv in ROOT)
    or --images and --labels (Kaggle's layout: one CSV of image,level).
    """
    print(pack(config, progress=True))


if __name__ == "__main__":
    run(PackConfig, main)
