"""Train a network to grade fundus photographs.

    fastretina train --amp                                  # data/train.beton, data/test.beton, the defaults of --help
    fastretina train --train train.beton --test test.beton --arch resnet50 --epochs 25 --out runs/r50
    torchrun --nproc-per-node 8 -m fastretina.train --amp --batch-size 256 --scale-lr --sync-batchnorm

Ctrl-C and SIGTERM save first; the same command then goes on where it stopped.
"""

from __future__ import annotations

from contextlib import ExitStack, closing
from functools import partial

from fastretina import cli
from fastretina.models.options import folder_name
from fastretina.training.config import TrainConfig, as_settings, check, flags_from
from fastretina.training.run_folder import RunFolder


def main(config: TrainConfig) -> int:
    # What imports torch, scipy and matplotlib comes now: --help is there before them.
    from fastretina.report import terminal
    from fastretina.report.run import RunPictures
    from fastretina.system.files import write_json
    from fastretina.training import build, data, distributed, recorder, state, tensorboard
    from fastretina.training.loop import fit

    folder = RunFolder(config.out or f"runs/{folder_name(config.arch)}-{config.resolution}px-seed{config.seed}")
    settings = as_settings(config) | {"out": str(folder.path)}
    with distributed.joined(config.device, compiling=config.compile != "off") as world, ExitStack() as stack:
        check(config)
        world.decided(lambda: stack.enter_context(folder.locked()))
        sets = data.open_data(config, stack)
        data.require_same(sets, world)
        saved, reported = world.decided(
            lambda: (state.resume_state(folder, config.resume, settings, sets), state.is_reported(folder))
        )
        if saved is not None and reported and build.is_over(config, saved):
            if world.is_main:
                print(
                    f"{folder.path}: this run of {saved['progress']['epoch']} epochs is finished; see {folder.report}. "
                    "More --epochs go on, another --out begins anew."
                )
            return 0
        run = build.build_run(config, settings, folder, world, saved, sets, stack)
        training, info = run.training, run.info
        pictures = RunPictures(folder, info, training.progress, training.head.objective)
        after_epoch = [pictures.after_epoch, lambda record: print(terminal.epoch_line(record, config.epochs), flush=True)]
        callbacks = recorder.Recorder(folder, info, training, run.describe, pictures.first_batch, after_epoch)

        def begin() -> None:
            callbacks.catch_up()
            if config.tensorboard:
                tracker = tensorboard.Tracker(folder.path, training.progress.epoch + 1)
                stack.enter_context(closing(tracker))
                after_epoch.append(lambda record: tracker.epoch(record.row()))
            write_json(folder.config, settings)
            print(terminal.header(config, run, folder), flush=True)

        world.decided(begin)
        finished = fit(training, callbacks)
        if not world.is_main:
            return 0
        if training.profiler.table:
            print(f"{training.profiler.table}\ntimeline: {folder.path / 'profile.json.gz'}", flush=True)
        pictures.finish()
        print(terminal.last_lines(training.progress, info, folder, finished), flush=True)
    return 0


run_command = partial(cli.run, TrainConfig, main, flags_from=partial(flags_from, TrainConfig))

if __name__ == "__main__":
    run_command()
