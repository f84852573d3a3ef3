"""Train a network to grade fundus photographs.

    fastretina train --amp                                  # data/train.beton, data/test.beton, the defaults of --help
    fastretina train --train train.beton --test test.beton --arch resnet50 --epochs 25 --out runs/r50
    fastretina train --folds 5 --out runs/x                 # five runs, runs/x/fold-1 and so on, and what they find together
    torchrun --nproc-per-node 8 -m fastretina.train --amp --batch-size 256 --scale-lr --sync-batchnorm

Ctrl-C and SIGTERM save first; the same command then goes on where it stopped.
"""

from __future__ import annotations

from functools import partial

from fastretina import cli
from fastretina.training.config import TrainConfig, flags_before


def main(config: TrainConfig) -> int:
    if config.all_folds:
        from fastretina.folds import train_folds

        return train_folds(config)
    from fastretina import one_run

    return one_run.main(config)


run_command = partial(cli.run, TrainConfig, main, flags_before=partial(flags_before, TrainConfig))

if __name__ == "__main__":
    run_command()
