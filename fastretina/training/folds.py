"""What the runs of a cross-validation found together."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from fastretina.beton.reader import Beton
from fastretina.errors import RunError
from fastretina.metrics.predictions import Predictions
from fastretina.training.run_folder import RunFolder
from fastretina.training.state import load_state


def out_of_fold(runs: Sequence[RunFolder], whole: Beton) -> Predictions:
    """The answers for each image of `whole`, in its order, by the best model of the one fold that was not trained on it.

    runs: of all folds, finished; from their last.pt. CheckpointError where one is missing or corrupt, RunError where the folds'
    validation sets are not the images of `whole`, each once.
    """
    parts = [Predictions(**load_state(run.last)["progress"]["best_val"]) for run in runs]
    ids = torch.cat([part.ids for part in parts])
    if not np.array_equal(np.sort(ids.numpy()), np.sort(whole.ids)):
        raise RunError(
            f"{runs[0].path.parent}: the validation sets of its folds do not make up {whole.path}; begin anew in another --out"
        )
    order = torch.from_numpy(whole.index_of(ids.numpy()).argsort())
    answers = torch.cat([part.log_probabilities for part in parts])
    return Predictions(answers[order], torch.cat([part.labels for part in parts])[order], ids[order])
