"""Pack fundus photographs and their grades into a .beton file; see --help."""

from __future__ import annotations

from functools import partial

from fastretina import cli
from fastretina.packing.config import PackConfig


def main(config: PackConfig) -> None:
    from fastretina.packing.pack import pack  # with its libraries, which --help need not wait for

    print(pack(config, progress=True))


run_command = partial(cli.run, PackConfig, main)

if __name__ == "__main__":
    run_command()
