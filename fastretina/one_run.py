"""Train one run: what `fastretina train` does, and a comparison or the folds of a cross-validation for each of theirs."""

from __future__ import annotations

import hashlib
from contextlib import ExitStack, closing

from fastretina.system.json_text import read_json
from fastretina.training.config import TrainConfig, as_settings, check
from fastretina.training.run_folder import RunFolder


def main(config: TrainConfig) -> int:
    # What imports torch, scipy and matplotlib comes now: --help is there before them.
    from fastretina.report import terminal
    from fastretina.report.run import RunPictures
    from fastretina.system.files import write_json
    from fastretina.system.malloc import keep_freed_memory
    from fastretina.training import build, data, distributed, recorder, state, tensorboard
    from fastretina.training.loop import fit

    folder = RunFolder(config.folder)
    settings = as_settings(config) | {"out": str(folder.path)}
    with distributed.joined(config.device, compiling=config.compile != "off") as world, ExitStack() as stack:
        check(config)
        if world.device.type == "cpu":
            keep_freed_memory()
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
        _write_card(folder)
        pictures.finish()
        print(terminal.last_lines(training.progress, info, folder, finished), flush=True)
    return 0


def _write_card(folder: RunFolder) -> None:
    """The model card of the best checkpoint; before any epoch there is none."""
    from fastretina.models.card import card
    from fastretina.models.checkpoint import read_info
    from fastretina.system.files import write_bytes

    if folder.best.is_file():
        digest = hashlib.sha256(folder.best.read_bytes()).hexdigest()
        text = card(read_info(folder.best), read_json(folder.metrics), digest)
        write_bytes(folder.card, text.encode(errors="backslashreplace"))
