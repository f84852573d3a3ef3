"""Check every sample of a .beton file: its checksum, and that it decodes to what the file says; see --help."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated

import tyro

from fastretina import cli
from fastretina.beton.verify import verify_beton


@dataclass(frozen=True)
class VerifyConfig:
    """Check every sample of a .beton file: its checksum, and that it decodes to what the file says.

    Prints index, name and reason of each bad sample, one a line, and exits with 1 if there is any.
    """

    file: Annotated[Path, tyro.conf.Positional]
    """The .beton file, or a pattern in quotes for its shards, "data/train-*.beton"."""
    workers: int | None = None
    """Threads; default: the usable CPU cores."""


def main(config: VerifyConfig) -> int:
    report = verify_beton(config.file, workers=config.workers, progress=True)
    print(report)
    return 1 if report.bad else 0


run_command = partial(cli.run, VerifyConfig, main)

if __name__ == "__main__":
    run_command()
