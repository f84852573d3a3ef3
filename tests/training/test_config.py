"""What the options of a recipe do to a run, and that the test set has no part in any choice where there is validation data."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from fastretina import Loader, evaluate, write_beton
from fastretina.beton.reader import Beton
from fastretina.errors import UsageError
from fastretina.evaluate import EvaluateConfig
from fastretina.grading import all_known, patients_in_both
from fastretina.models.checkpoint import load_checkpoint, read_info
from fastretina.models.precision import Precision
from fastretina.report.run import RunPictures
from fastretina.train import main
from fastretina.training import build, loop, state
from fastretina.training.config import TrainConfig, check
from fastretina.training.distributed import World
from fastretina.training.signals import StopAsked
from fastretina.training.state import load_state

STEPS = 5


class Tiny(torch.nn.Sequential):
    """A network that trains in milliseconds, with a backbone that normalises and a head."""

    def __init__(self, outputs: int) -> None:
        super().__init__(
            torch.nn.Conv2d(3, 8, 5, stride=4), torch.nn.BatchNorm2d(8), torch.nn.ReLU(), torch.nn.AdaptiveAvgPool2d(1),
            torch.nn.Flatten(), torch.nn.Linear(8, outputs),
        )  # fmt: skip


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch):
    """Small networks, and no pictures at the end."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    monkeypatch.setattr(build, "build_model", lambda arch, outputs, **_: Tiny(outputs))
    monkeypatch.setattr(build, "load_initial", lambda *_: "given")
    monkeypatch.setattr(RunPictures, "finish", lambda pictures: None)
    yield
    torch.set_num_threads(before)


def config(tiny_betons, out: Path, **changes) -> TrainConfig:
    settings = {"epochs": 3, "batch_size": 8, "resolution": 32, "lr": 1e-2, "seed": 7, "workers": 1, "val_fraction": 0} | changes
    return TrainConfig(train=tiny_betons.train, test=tiny_betons.test, out=out, **settings)


def metrics(settings: TrainConfig) -> dict:
    return json.loads((settings.out / "metrics.json").read_text())


@pytest.mark.parametrize(
    "options",
    [
        {"head": "regression", "val_fraction": 0.3},
        {"head": "ordinal", "class_weights": "sqrt", "sampling": "balanced"},
        {"logit_adjustment": 1.0, "clip_norm": 1.0, "optimizer": "sgd"},
        {"ema": 0.9, "augment": "full", "class_weights": "balanced"},
        {"ema": 0.9, "schedule": "two-phase", "backbone_lr": 0.1},
        {"grow_from": 16, "sampling": "sqrt", "augment": "flips"},
    ],
    ids=str,
)
def test_a_run_with_any_options_resumes_to_the_same_weights_bit_for_bit(tiny_betons, tmp_path, options):
    whole = config(tiny_betons, tmp_path / "whole", **options)
    main(whole)
    parts = replace(whole, out=tmp_path / "parts")
    for steps in (2, 3, 4):
        main(replace(parts, stop_after_steps=steps))
    main(parts)
    states = [load_state(run.out / "last.pt") for run in (whole, parts)]
    for part in ("model", "average"):
        for key, value in (states[0][part] or {}).items():
            assert torch.equal(value, states[1][part][key]), key
    assert states[0]["progress"]["decision"] == states[1]["progress"]["decision"]
    assert (whole.out / "predictions.csv").read_bytes() == (parts.out / "predictions.csv").read_bytes()


def test_validation_images_are_taken_from_training_and_share_no_patient_with_it(tiny_betons, tmp_path, monkeypatch):
    seen = {}
    real = build.make_loader

    def noted(config, name, beton, *rest, **options):
        seen[name] = beton
        return real(config, name, beton, *rest, **options)

    monkeypatch.setattr(build, "make_loader", noted)
    settings = config(tiny_betons, tmp_path / "run", epochs=1, val_fraction=0.25)
    main(settings)
    found = metrics(settings)
    assert len(seen["train"]) + len(seen["val"]) == 40
    assert patients_in_both(all_known(seen["train"].patients), all_known(seen["val"].patients)) == 0
    assert found["selected_on"] == "val"
    assert sum(map(sum, found["val"]["best"]["confusion"])) == len(seen["val"])
    assert sum(map(sum, found["train"]["best"]["confusion"])) == len(seen["train"])


@pytest.mark.parametrize("head", ["softmax", "regression"])
def test_poisoned_test_labels_change_neither_the_model_nor_the_choice_nor_the_thresholds(tiny_betons, tmp_path, head):
    """The same images with shuffled grades: all that training leaves, apart from the test metrics, is the same."""
    rows = (tiny_betons.test_images / "labels.csv").read_text().splitlines()
    names = [row.split(",")[0] for row in rows[1:]]
    grades = np.random.default_rng(3).permutation([row.split(",")[1] for row in rows[1:]])
    poisoned_csv = tmp_path / "poisoned.csv"
    poisoned_csv.write_text("\n".join([rows[0], *(f"{name},{grade}" for name, grade in zip(names, grades, strict=True))]) + "\n")
    poisoned = tmp_path / "poisoned.beton"
    write_beton(poisoned, images=tiny_betons.test_images, labels=poisoned_csv, size=64, workers=1)
    options = {"head": head, "val_fraction": 0.3, "schedule": "two-phase", "epochs": 6, "patience": 2}
    clean = config(tiny_betons, tmp_path / "clean", **options)
    main(clean)
    other = replace(clean, test=poisoned, out=tmp_path / "other")
    main(other)
    assert read_info(clean.out / "best.safetensors") == read_info(other.out / "best.safetensors")
    first, second = (load_state(run.out / "last.pt") for run in (clean, other))
    assert all(torch.equal(value, second["model"][key]) for key, value in first["model"].items())
    assert metrics(clean)["best_epoch"] == metrics(other)["best_epoch"]
    assert metrics(clean)["best"]["confusion"] != metrics(other)["best"]["confusion"]


def test_thresholds_are_fitted_only_where_there_is_validation_data(tiny_betons, tmp_path):
    plain = config(tiny_betons, tmp_path / "plain", head="regression", epochs=1)
    main(plain)
    assert read_info(plain.out / "best.safetensors").decision is None
    fitted = config(tiny_betons, tmp_path / "fitted", head="regression", epochs=1, val_fraction=0.3)
    main(fitted)
    decision = read_info(fitted.out / "best.safetensors").decision
    assert decision is not None
    assert list(decision.thresholds) == sorted(decision.thresholds)


@pytest.mark.parametrize("head", ["softmax", "regression", "ordinal"])
def test_evaluation_of_the_checkpoint_gives_the_metrics_of_the_run(tiny_betons, tmp_path, monkeypatch, head):
    monkeypatch.undo()
    monkeypatch.setattr(RunPictures, "finish", lambda pictures: None)
    settings = config(tiny_betons, tmp_path / "run", arch="resnet10", head=head, epochs=2, val_fraction=0.3, lr=1e-3)
    main(settings)
    evaluate.main(EvaluateConfig(settings.out / "best.safetensors", tiny_betons.test, out=tmp_path / "again", workers=1))
    again, before = json.loads((tmp_path / "again" / "metrics.json").read_text()), metrics(settings)["best"]
    assert again["confusion"] == before["confusion"]
    assert again["loss"] == pytest.approx(before["loss"], rel=1e-4)


def test_the_average_is_what_is_evaluated_and_kept(tiny_betons, tmp_path, monkeypatch):
    evaluated = []
    real = loop.run_model

    def noted(model, *rest, **more):
        evaluated.append({key: value.clone() for key, value in model.state_dict().items()})
        return real(model, *rest, **more)

    monkeypatch.setattr(loop, "run_model", noted)
    settings = config(tiny_betons, tmp_path / "run", epochs=1, ema=0.9)
    main(settings)
    state = load_state(settings.out / "last.pt")
    average = {key.removeprefix("module."): value for key, value in state["average"].items() if key.startswith("module.")}
    assert all(torch.equal(value, average[key]) for key, value in evaluated[0].items())
    assert not torch.equal(state["model"]["0.weight"], average["0.weight"])
    assert int(state["average"]["n_averaged"]) == STEPS


def test_a_frozen_backbone_stays_as_it_is_and_then_learns(tiny_betons, tmp_path):
    settings = config(tiny_betons, tmp_path / "run", epochs=2, freeze_epochs=1, weights="given.pth", batchnorm_images=0)
    torch.manual_seed(settings.seed)
    start = Tiny(5).state_dict()
    main(replace(settings, stop_after_steps=STEPS))
    frozen = load_state(settings.out / "last.pt")["model"]
    assert all(torch.equal(value, start[key]) for key, value in frozen.items() if not key.startswith("5."))
    assert not torch.equal(frozen["5.weight"], start["5.weight"])
    main(settings)
    free = load_state(settings.out / "last.pt")["model"]
    assert not torch.equal(free["0.weight"], start["0.weight"])
    assert int(free["1.num_batches_tracked"]) == STEPS


def test_gradients_are_clipped_to_the_norm(tiny_betons, tmp_path, monkeypatch):
    """Plain steps of size lr times the gradient cannot move the weights further than lr times the norm."""
    monkeypatch.setattr(build, "build_optimizer", lambda model, *_: torch.optim.SGD(model.parameters(), lr=1.0))
    settings = config(tiny_betons, tmp_path / "run", epochs=1, clip_norm=1e-3, schedule="constant")
    torch.manual_seed(settings.seed)
    start = Tiny(5).state_dict()
    main(settings)
    moved = load_state(settings.out / "last.pt")["model"]
    weights = [key for key in start if key.endswith(("weight", "bias"))]
    distance = torch.stack([(moved[key] - start[key]).norm() for key in weights]).norm()
    assert 0 < distance <= STEPS * 1e-3 * (1 + 1e-4)


def test_the_resolution_grows_at_half_time_and_the_order_of_samples_is_the_same(tiny_betons, tmp_path, monkeypatch):
    def ids_and_sides(**options) -> tuple[list[list[int]], list[int]]:
        ids, sides = [], []
        real = loop.Tally.add
        forward = Tiny.forward

        def noted(tally, step, *rest):
            ids.append(rest[-1].tolist())
            real(tally, step, *rest)

        def looked(self, images):
            if torch.is_grad_enabled():
                sides.append(images.shape[-1])
            return forward(self, images)

        with monkeypatch.context() as patch:
            patch.setattr(loop.Tally, "add", noted)
            patch.setattr(Tiny, "forward", looked)
            main(config(tiny_betons, tmp_path / str(options), epochs=4, **options))
        return ids, sides

    plain, fixed = ids_and_sides()
    grown, sides = ids_and_sides(grow_from=16)
    assert plain == grown
    assert fixed == [32] * 4 * STEPS
    assert sides == [16] * 2 * STEPS + [32] * 2 * STEPS


def test_patience_ends_the_run_after_epochs_without_a_better_one_and_it_stays_ended(tiny_betons, tmp_path, capsys, monkeypatch):
    settings = config(tiny_betons, tmp_path / "run", epochs=30, patience=2, lr=1e-12, select_by="accuracy", val_fraction=0.3)
    main(settings)
    found = metrics(settings)
    assert (found["best_epoch"], found["last_epoch"], found["finished"]) == (1, 3, True)
    monkeypatch.setattr(state, "is_reported", lambda run: True)
    main(settings)
    assert "is finished" in capsys.readouterr().out
    main(replace(settings, patience=3))
    assert metrics(settings)["last_epoch"] == 4


def test_a_profile_of_some_steps_is_written_and_changes_nothing(tiny_betons, tmp_path, capsys):
    plain = config(tiny_betons, tmp_path / "plain", epochs=4)
    profiled = replace(plain, out=tmp_path / "profiled", profile=3)
    main(plain)
    main(profiled)
    assert (plain.out / "predictions.csv").read_bytes() == (profiled.out / "predictions.csv").read_bytes()
    table = (profiled.out / "profile.txt").read_text()
    for name in ("3 steps", "wait", "forward", "backward", "optimizer", "conv"):
        assert name in table
    assert table.strip() in capsys.readouterr().out
    assert (profiled.out / "profile.json.gz").is_file()
    assert not (plain.out / "profile.txt").exists()


@pytest.mark.parametrize("metric", ["accuracy", "balanced_accuracy", "macro_f1", "loss", "qwk"])
def test_the_best_epoch_is_chosen_by_the_metric_asked_for(tiny_betons, tmp_path, metric):
    settings = config(tiny_betons, tmp_path / "run", epochs=6, select_by=metric, val_fraction=0.4, lr=3e-2)
    main(settings)
    table = [row.split(",") for row in (settings.out / "results.csv").read_text().splitlines()]
    column = table[0].index(f"val_{metric}")
    values = [float(row[column] or "-inf") * (-1 if metric == "loss" else 1) for row in table[1:]]
    assert values[metrics(settings)["best_epoch"] - 1] == max(values)


@pytest.mark.parametrize(
    "wrong",
    [
        {"val_fraction": 0.6}, {"val_fraction": -0.1}, {"ema": 1.0}, {"clip_norm": 0.0}, {"patience": 0},
        {"profile": -1},
        {"grow_from": 64}, {"freeze_epochs": 1}, {"backbone_lr": -1.0}, {"logit_adjustment": 1.0, "head": "ordinal"},
        {"compile": "reduce-overhead", "accumulate": 2},
    ],
    ids=str,
)  # fmt: skip
def test_options_that_cannot_work_are_usage_errors(tiny_betons, tmp_path, wrong):
    with pytest.raises(UsageError):
        main(config(tiny_betons, tmp_path / "run", **wrong))


def test_cuda_graphs_with_accumulation_are_refused_with_the_way_out_and_each_alone_is_not(tiny_betons, tmp_path):
    graphs, parts = {"compile": "reduce-overhead"}, {"accumulate": 2}
    with pytest.raises(UsageError, match=r"--compile reduce-overhead with --accumulate 2: .* use --compile default, or leave"):
        check(config(tiny_betons, tmp_path / "run", **graphs, **parts))
    for accepted in (graphs, parts, {"compile": "default"} | parts, {"compile": "auto"} | parts):
        check(config(tiny_betons, tmp_path / "run", **accepted))


@pytest.mark.parametrize(("accumulate", "sizes", "last"), [(1, [9], [4]), (2, [5, 4], [2, 2])])
def test_cudnn_tries_its_algorithms_on_sizes_of_full_batches_and_on_no_others(
    tiny_betons, tmp_path, monkeypatch, accumulate, sizes, last
):
    seen: dict[str, list[tuple[int, bool]]] = {"train": [], "test": []}
    forward = Tiny.forward

    def looked(self, images):
        seen["train" if self.training else "test"].append((len(images), torch.backends.cudnn.benchmark))
        return forward(self, images)

    monkeypatch.setattr(Tiny, "forward", looked)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)  # what a run leaves behind is none of the other tests' business
    main(config(tiny_betons, tmp_path / "run", epochs=2, batch_size=9, accumulate=accumulate))
    estimated = [(32, False)]  # BatchNorm's statistics
    epoch = 4 * [(size, True) for size in sizes] + [(size, False) for size in last] + estimated
    assert seen == {"train": 2 * epoch, "test": 2 * [(9, False), (9, False), (2, False)]}
    assert torch.backends.cudnn.benchmark


@pytest.mark.parametrize("before", [False, True])
def test_an_evaluation_leaves_cudnns_setting_as_it_was_even_where_it_fails(tiny_betons, monkeypatch, before):
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", before)
    seen = []

    def stop():
        seen.append(torch.backends.cudnn.benchmark)
        if len(seen) == 4:
            raise StopAsked

    with Loader(tiny_betons.test, batch_size=9, train=False, resolution=16, workers=1) as loader:
        loop.run_model(Tiny(5), loader, Precision("cpu", None, ""), "graded", stop=stop)
        assert torch.backends.cudnn.benchmark is before
        with pytest.raises(StopAsked):
            loop.run_model(Tiny(5), loader, Precision("cpu", None, ""), "graded", stop=stop)
    assert seen == [False] * 4
    assert torch.backends.cudnn.benchmark is before


@pytest.mark.parametrize("size", [1, 2, 3])
def test_a_full_batch_is_what_the_loader_gives_each_rank(tiny_betons, tmp_path, size):
    settings = config(tiny_betons, tmp_path / "run", batch_size=10)
    for rank in range(size):
        with Loader(tiny_betons.train, batch_size=10, resolution=16, workers=1, rank=rank, world_size=size) as loader:
            assert {len(batch.ids) for batch in loader} == {build.full_batch(settings, World(rank, size))}


def test_a_selection_of_a_file_reads_the_same_samples_and_names_bad_ones_by_their_place_in_the_file(tiny_betons):
    with Beton(tiny_betons.train) as whole:
        positions = np.array([7, 3, 30])
        some = whole.select(positions)
        assert [bytes(some.jpeg(i)) for i in range(3)] == [bytes(whole.jpeg(int(i))) for i in positions]
        assert list(some.names) == [whole.names[int(i)] for i in positions]
        assert some.ids.tolist() == whole.ids[positions].tolist()
        again = some.select(np.array([2, 0]))
        assert again.sample_error(1, "bad").index == 7
        assert again.sample_error(0, "bad").name == whole.names[30]
        some.close()
        assert bytes(whole.jpeg(7)) == bytes(again.jpeg(1))


def test_a_head_of_another_kind_takes_over_the_backbone_of_a_checkpoint(tiny_betons, tmp_path, monkeypatch):
    monkeypatch.undo()
    monkeypatch.setattr(RunPictures, "finish", lambda pictures: None)
    first = config(tiny_betons, tmp_path / "first", arch="resnet10", epochs=1, lr=1e-3)
    main(first)
    second = replace(first, out=tmp_path / "second", lr=1e-9, head="ordinal", weights=str(first.out / "best.safetensors"))
    main(second)
    before, after = (load_checkpoint(run.out / "best.safetensors")[0] for run in (first, second))
    assert torch.allclose(before.conv1.weight, after.conv1.weight, atol=1e-6)
    assert after.fc.out_features == 4
