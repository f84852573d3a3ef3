"""Cross-validation, `fastretina train --folds 5`: five runs in sub-folders of one, and what they find together.

Each fold is an ordinary run, which trains on four fifths of --train and chooses its epoch and thresholds on the last fifth; all
are measured on the same test set. fold-2 alone, on a machine of a cluster: `--folds 5 --fold 2 --out runs/x/fold-2`; the command
for all of them then finds it finished.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from fastretina import evaluate, several
from fastretina.errors import UsageError
from fastretina.several import PlannedRun
from fastretina.system.json_text import read_json
from fastretina.training.config import TrainConfig, as_settings, check, fold_name
from fastretina.training.run_folder import RunFolder

if TYPE_CHECKING:
    from fastretina.beton.reader import Beton


def train_folds(config: TrainConfig) -> int:
    """Train all folds that are not finished, and write folds.csv, folds.json and report.html. Errors are those of a run, and
    RunError where one failed. Returns the exit code."""
    from fastretina.report.compared import ComparedRun
    from fastretina.report.folded import Folded, terminal_table, write_folds
    from fastretina.system.files import write_json
    from fastretina.training.data import open_data

    several.refuse_ranks(
        f"--folds {config.folds} is not for torchrun: train each fold by torchrun ... --folds {config.folds} --fold 1 and so on, "
        "with --out DIR/fold-1; this command without torchrun then makes the report in DIR"
    )
    if config.resume != "auto" or config.stop_after_steps is not None:
        raise UsageError("--resume and --stop-after-steps are for one run: give --fold too, or leave them away")
    check(config)
    runs = plan(config)
    several.check_all(runs)
    folder = RunFolder(config.folder)
    with several.locked(folder, f"{config.folds} folds", runs), ExitStack() as stack:
        for run in runs:
            with ExitStack() as checked:
                data = open_data(run.config, checked)
                several.refuse_other_data(run, data)
                if not several.finished(run):
                    several.check_model(run.config, data["train"])
        settings = as_settings(config) | {"out": str(folder.path)}
        write_json(folder.config, settings)

        def read(run: PlannedRun) -> ComparedRun:
            return ComparedRun.read(run.folder, run.config.arch, run.config.weights)

        done, failed = several.train_all(runs, read, lambda done: write_folds(folder, Folded(done, config.folds), settings))
        several.raise_failed(failed, runs)
        data = open_data(config, stack)
        found = Folded(done, config.folds, _out_of_fold(folder, runs, data["train"]), _ensemble(config, folder, runs, data["test"]))
        write_folds(folder, found, settings)
        print("\n" + "\n".join(terminal_table(found)))
        print(f"report: {folder.report}", flush=True)
    return 0


def _out_of_fold(folder: RunFolder, runs: Sequence[PlannedRun], whole: Beton) -> dict[str, Any]:
    """Metrics of the answers for each image of the training set by the model that did not learn from it, and out_of_fold.csv."""
    from fastretina.metrics.data import assess
    from fastretina.metrics.predictions import Scores, write_predictions
    from fastretina.training.folds import out_of_fold

    answers = out_of_fold([run.folder for run in runs], whole)
    write_predictions(folder.file("out_of_fold.csv"), answers, whole.names_of(answers.ids.numpy()))
    scores, assessment = Scores.of(answers, whole.classes), assess(answers, whole, whole.classes)
    return {"images": len(whole), **scores.as_dict(), **assessment.as_dict()}


def _ensemble(config: TrainConfig, folder: RunFolder, runs: Sequence[PlannedRun], test: Beton) -> dict[str, Any]:
    """What `fastretina evaluate` says of all folds' models together, in the folder `ensemble`: its metrics.json."""
    from fastretina.models.grader import Grader

    out = folder.file("ensemble")
    print(f"\nthe mean of the probabilities of {len(runs)} models, on the test set", flush=True)
    asked = evaluate.EvaluateConfig(
        checkpoint=folder.path,
        data=config.test_file or config.train,
        out=out,
        batch_size=config.batch_size,
        device=config.device,
        decode=config.decode,
        workers=config.workers,
    )
    evaluate.main(asked, Grader.load([run.folder.best for run in runs], device=config.device), test)
    return dict(read_json(out / "metrics.json"))


def plan(config: TrainConfig) -> list[PlannedRun]:
    """The run of each fold, in a sub-folder of the folder of all."""
    numbers = range(1, config.folds + 1)
    return [PlannedRun(f"fold {number}", replace(config, fold=number, out=config.folder / fold_name(number))) for number in numbers]
