"""Training runs: what they leave, how they stop, and that a resumed run is the undisturbed one, bit for bit."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import sklearn.metrics as oracle
import torch
import tyro

from fastretina.errors import RunError, Terminated, UsageError
from fastretina.grading import RETINOPATHY
from fastretina.metrics.predictions import Predictions, Scores
from fastretina.models import heads
from fastretina.models.checkpoint import load_checkpoint, read_info
from fastretina.models.resnet import build_model
from fastretina.train import main, run_command
from fastretina.training import build, loop
from fastretina.training.compile import StepForward
from fastretina.training.config import TrainConfig
from fastretina.training.data import decoding
from fastretina.training.progress import Progress
from fastretina.training.recorder import Recorder
from fastretina.training.signals import Signals, StopAsked
from fastretina.training.state import load_state, save_state
from tests.conftest import signals_kept

TIMINGS = {"images_per_second", "data_wait_seconds", "train_seconds", "epoch_seconds"}
STEPS = 5  # an epoch: 40 images, 8 at a time


pytestmark = pytest.mark.usefixtures("one_thread")


def config(tiny_betons, out: Path, **changes) -> TrainConfig:
    defaults = {"arch": "resnet10", "epochs": 3, "batch_size": 8, "resolution": 32, "lr": 1e-3, "seed": 7, "workers": 1}
    return TrainConfig(train=tiny_betons.train, test=tiny_betons.test, out=out, **{**defaults, "val_fraction": 0, **changes})


@pytest.fixture(scope="module")
def whole(tiny_betons, tmp_path_factory):
    """An undisturbed run of three epochs."""
    settings = config(tiny_betons, tmp_path_factory.mktemp("runs") / "whole")
    torch.set_num_threads(1)
    assert main(settings) == 0
    return settings


def rows(run: Path) -> list[dict[str, str]]:
    """results.csv without its timings."""
    with (run / "results.csv").open(newline="") as file:
        return [{key: value for key, value in row.items() if key not in TIMINGS} for row in csv.DictReader(file)]


def assert_same_run(one: Path, other: Path) -> None:
    first, second = (load_state(run / "last.pt") for run in (one, other))
    for key, value in first["model"].items():
        assert torch.equal(value, second["model"][key]), key
    for number, moments in first["optimizer"]["state"].items():
        assert all(torch.equal(value, second["optimizer"]["state"][number][name]) for name, value in moments.items())
    assert rows(one) == rows(other)
    assert (one / "predictions.csv").read_bytes() == (other / "predictions.csv").read_bytes()
    best = [load_checkpoint(run / "best.safetensors")[0].state_dict() for run in (one, other)]
    assert all(torch.equal(value, best[1][key]) for key, value in best[0].items())


def test_a_run_leaves_exactly_the_files_promised(whole):
    # What the state before the last needs, should the last be corrupt; the older best only where the last epoch was the best.
    spare = {"last.prev.pt", "best.prev.safetensors"}
    assert (whole.out / "last.prev.pt").is_file()
    assert {entry.name for entry in whole.out.iterdir()} - spare == {
        *("config.json", "results.csv", "metrics.json", "curves.png", "confusion_train.png", "confusion_test.png", "batch.png"),
        *("best.safetensors", "last.pt", "predictions.csv", "report.html", "card.md", ".lock"),
    }


def test_metrics_json_holds_what_the_predictions_say(whole):
    found = json.loads((whole.out / "metrics.json").read_text())
    with (whole.out / "predictions.csv").open(newline="") as file:
        table = list(csv.DictReader(file))
    grades, predicted = ([int(row[column]) for row in table] for column in ("grade", "predicted"))
    assert len(table) == 20
    assert found["best"]["accuracy"] == pytest.approx(oracle.accuracy_score(grades, predicted), abs=1e-6)
    assert found["best"]["qwk"] == pytest.approx(oracle.cohen_kappa_score(grades, predicted, weights="quadratic"), abs=1e-6)
    assert found["best"]["confusion"] == oracle.confusion_matrix(grades, predicted, labels=range(5)).tolist()
    assert sum(map(sum, found["train"]["last"]["confusion"])) == 40
    for which in (found["best"], found["last"], found["train"]["best"], found["train"]["last"]):
        assert {"accuracy", "balanced_accuracy", "qwk", "macro_f1", "per_class_recall", "confusion"} <= which.keys()
    for key in ("epoch_seconds", "images_per_second", "data_wait_seconds"):
        assert len(found[key]) == 3
        assert all(value >= 0 for value in found[key])
    assert found["amp_dtype"] == "float32"
    assert found["data"]["patients_in_train_and_test"] == 5
    assert {"torch", "torchvision", "numpy", "python", "fastretina"} <= found["versions"].keys()


def test_the_best_epoch_is_that_of_the_highest_kappa(whole):
    found = json.loads((whole.out / "metrics.json").read_text())
    kappas = [float(row["test_qwk"]) for row in rows(whole.out)]
    assert kappas[found["best_epoch"] - 1] == max(kappas)
    assert found["best"]["epoch"] == found["best_epoch"] == read_info(whole.out / "best.safetensors").epoch
    assert (found["selected_on"], found["selection_metric"]) == ("test", "qwk")


@pytest.mark.parametrize("val", [False, True])
def test_an_epoch_replaces_the_best_only_with_better_metrics_on_the_data_of_the_choice(val):
    """Right answers in 20, 90 and 50 % of the samples; with a validation set, the test metrics rise all the way."""
    labels = torch.arange(100) % 5

    def answers(share: float) -> Predictions:
        predicted = torch.where(torch.arange(100) < 100 * share, labels, labels.flip(0))
        return Predictions(torch.nn.functional.one_hot(predicted, 5).float().log_softmax(1), labels, labels)

    training = SimpleNamespace(
        progress=Progress(),
        schedule=SimpleNamespace(get_last_lr=lambda: [0.1]),
        classes=RETINOPATHY,
        config=TrainConfig(select_by="qwk"),
    )
    improved = []
    for share, on_test in ((0.2, 0.3), (0.9, 0.5), (0.5, 1.0)):
        training.progress.tally.add(1, torch.tensor(1.0), torch.arange(5), torch.arange(5), torch.arange(5))
        pair = (answers(on_test), answers(share)) if val else (answers(share), None)
        improved.append(loop._note_epoch(training, *pair, None, 1.0))
    assert improved == [True, True, False]
    assert training.progress.best_epoch == 2
    assert Scores.of(training.progress.best_test, RETINOPATHY).metrics == training.progress.history[1].test.metrics
    assert (training.progress.epoch, training.progress.batch) == (3, 0)


def test_the_colours_of_the_grades_are_learnt(whole):
    assert float(rows(whole.out)[-1]["train_loss"]) < float(rows(whole.out)[0]["train_loss"])
    assert max(float(row["train_accuracy"]) for row in rows(whole.out)) > 0.4


@pytest.mark.parametrize("steps", [2, STEPS, 2 * STEPS + 3], ids=["first epoch", "end of an epoch", "last epoch"])
def test_a_stopped_run_resumes_to_the_same_weights_bit_for_bit(whole, tmp_path, capsys, steps):
    settings = replace(whole, out=tmp_path / "run")
    assert main(replace(settings, stop_after_steps=steps)) == 0
    assert f"stopped after step {steps}" in capsys.readouterr().out
    assert main(settings) == 0
    assert "resuming" in capsys.readouterr().out
    assert_same_run(whole.out, settings.out)


def test_a_run_can_be_taken_up_in_another_folder(whole, tmp_path):
    first = replace(whole, out=tmp_path / "first")
    main(replace(first, stop_after_steps=STEPS + 2))
    main(replace(first, out=tmp_path / "second", resume=str(first.out / "last.pt")))
    assert_same_run(whole.out, tmp_path / "second")
    with pytest.raises(RunError, match="holds a run already"):
        main(replace(first, out=whole.out, resume=str(first.out)))


def test_a_finished_run_says_so_and_is_left_alone(whole, capsys):
    before = (whole.out / "last.pt").stat().st_mtime_ns
    assert main(whole) == 0
    assert "is finished" in capsys.readouterr().out
    assert (whole.out / "last.pt").stat().st_mtime_ns == before


def test_a_run_goes_on_in_the_number_format_that_it_began_in(whole, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True}, raising=False)
    monkeypatch.setattr(build, "bf16_speedup", lambda model, images: 2.0)
    settings = replace(whole, out=tmp_path / "run", amp=True, epochs=1)
    main(replace(settings, stop_after_steps=1))
    assert "bfloat16 (AVX512-BF16) is 2.0 times as fast" in capsys.readouterr().out
    monkeypatch.setattr(build, "bf16_speedup", lambda model, images: 0.5)
    main(settings)
    assert "bfloat16, as this run began" in capsys.readouterr().out
    assert json.loads((settings.out / "metrics.json").read_text())["amp_dtype"] == "bfloat16"


def test_a_run_goes_on_decoding_where_it_began_whatever_the_cores_of_the_machine(whole):
    gpu, model = SimpleNamespace(device=torch.device("cuda")), build_model("resnet18")
    settings = replace(whole, resolution=512)
    # 256 TFLOP/s, the fastest step that was measured, by 55.6 GFLOP an image.
    assert decoding(settings, model, gpu, None) == {"demand": pytest.approx(256e12 / 55.6e9, rel=0.01)}
    assert decoding(settings, model, gpu, {"decode": "cpu"}) == {"decode": "cpu"}
    assert decoding(settings, model, gpu, {"decode": "gpu"}) == {"demand": float("inf")}
    assert decoding(replace(settings, decode="gpu"), model, gpu, {"decode": "cpu"}) == {"decode": "gpu"}
    assert load_state(whole.out / "last.pt")["decode"] == "cpu"


def test_a_compiled_run_trains_as_the_eager_one(whole, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(build, "StepForward", partial(StepForward, backend="aot_eager"))  # which writes no code
    settings = replace(whole, out=tmp_path / "run", compile="default")
    main(replace(settings, stop_after_steps=STEPS + 1))
    said = capsys.readouterr().out
    assert "compile    default, as asked" in said
    assert said.count("compiled in ") == 1
    losses = [float(rows(run.out)[0]["train_loss"]) for run in (whole, settings)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    main(replace(settings, out=tmp_path / "auto", compile="auto", stop_after_steps=1))
    assert "compile    off: on cpu it is not worth its compile time" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "setting"),
    [([], "off"), (["--compile"], "auto"), (["--compile", "default"], "default"), (["--compile", "off"], "off")],
)
def test_the_word_after_compile_may_be_left_out(words, setting):
    assert tyro.cli(TrainConfig, args=[*words, "--epochs", "3"]).compile == setting


def test_another_word_after_compile_is_refused(capsys):
    with pytest.raises(SystemExit) as exit_:
        tyro.cli(TrainConfig, args=["--compile", "fast"])
    assert exit_.value.code == 2
    assert "max-autotune-no-cudagraphs" in capsys.readouterr().err


def test_the_folder_of_a_comparison_is_not_taken_for_a_run(whole, tmp_path):
    (tmp_path / "config.json").write_text('{"archs": "resnet18,resnet50"}')
    for resume in ("auto", "never", str(whole.out)):
        with pytest.raises(RunError, match="is the folder of a comparison"):
            main(replace(whole, out=tmp_path, resume=resume))


def test_resume_never_does_not_overwrite_a_run(whole):
    with pytest.raises(RunError, match="holds a run already"):
        main(replace(whole, resume="never"))


def test_other_settings_are_named_and_refused(whole):
    with pytest.raises(RunError, match=r"lr was 0\.001, now 0\.01, seed was 7, now 8"):
        main(replace(whole, lr=0.01, seed=8))


def test_more_epochs_go_on_from_the_last(tiny_betons, tmp_path):
    settings = config(tiny_betons, tmp_path / "run", epochs=1, schedule="constant")
    main(settings)
    main(replace(settings, epochs=2))
    assert [row["epoch"] for row in rows(settings.out)] == ["1", "2"]


def test_with_a_validation_set_the_choice_is_made_on_it(tiny_betons, tmp_path, capsys):
    settings = config(
        tiny_betons, tmp_path / "run", epochs=1, val=tiny_betons.train, schedule="onecycle", optimizer="sgd", augment="off"
    )
    main(settings)
    found = json.loads((settings.out / "metrics.json").read_text())
    assert found["selected_on"] == "val"
    assert sum(map(sum, found["val"]["best"]["confusion"])) == 40
    assert "on the validation set" in capsys.readouterr().out
    assert "on the TEST set" not in (settings.out / "report.html").read_text()


def test_the_second_phase_starts_from_the_best_weights_with_fresh_moments(tiny_betons, tmp_path, monkeypatch):
    seen = []
    load = Recorder.load_best

    def noted(recorder):
        load(recorder)
        best = load_checkpoint(recorder.run.best)[0].state_dict()
        equal = all(torch.equal(value, best[key]) for key, value in recorder.training.model.state_dict().items())
        seen.append((recorder.training.progress.epoch, equal))

    monkeypatch.setattr(Recorder, "load_best", noted)
    settings = config(tiny_betons, tmp_path / "run", epochs=2, schedule="two-phase")
    main(settings)
    assert seen == [(1, True)]
    assert load_state(settings.out / "last.pt")["optimizer"]["state"][0]["step"] == STEPS
    assert [float(row["lr"]) for row in rows(settings.out)] == pytest.approx([1e-4, 1e-4])


def test_a_loss_that_is_not_finite_stops_with_epoch_step_and_samples(tiny_betons, tmp_path, monkeypatch):
    settings = config(tiny_betons, tmp_path / "run", epochs=2)
    main(replace(settings, stop_after_steps=STEPS + 1))
    before = (settings.out / "last.pt").read_bytes()
    steps = []

    def not_finite(loss, logits, labels, total):
        steps.append(labels)
        value = torch.nn.functional.cross_entropy(logits, labels)
        return value * float("nan") if len(steps) == 2 else value

    monkeypatch.setattr(heads.Loss, "__call__", not_finite)
    with pytest.raises(RunError, match=rf"nan in epoch 2 at step {STEPS + 3}, sample ids \d+(, \d+){{7}}\."):
        main(settings)
    assert (settings.out / "last.pt").read_bytes() == before


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_and_exits_with_its_code_and_the_run_resumes_bit_for_bit(whole, tmp_path, number, code):
    settings = replace(whole, out=tmp_path / "run")
    # Slowed down, so that the signal finds it at work; nothing that it computes is changed.
    script = (
        "import sys, time; from fastretina.models import heads; from fastretina import train; real = heads.Loss.__call__\n"
        "def slow(*given):\n    time.sleep(0.3); print('step', flush=True); return real(*given)\n"
        "heads.Loss.__call__ = slow; train.run_command(sys.argv[1:])"
    )
    flags = [f"--{name.replace('_', '-')}={getattr(settings, name)}" for name in ("train", "test", "out", "epochs", "batch_size")]
    flags += [f"--{name}={getattr(settings, name)}" for name in ("arch", "resolution", "lr", "seed", "workers", "val_fraction")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-c", script, *flags], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )
    assert process.stdout is not None
    for line in process.stdout:
        if line == "step\n":
            break
    started = time.monotonic()
    process.send_signal(number)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == code, errors
    assert time.monotonic() - started < 5
    assert "Traceback" not in errors
    assert load_state(settings.out / "last.pt")["progress"]["step"] > 0
    if number == signal.SIGTERM:
        assert main(settings) == 0
        assert_same_run(whole.out, settings.out)


def test_the_first_signal_is_noted_and_the_second_stops_at_once(capsys):
    before = signal.getsignal(signal.SIGTERM)
    with Signals() as signals:
        signals.stop_if_asked()
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(StopAsked):
            signals.stop_if_asked()
        with pytest.raises(Terminated):
            os.kill(os.getpid(), signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) == before


@pytest.mark.parametrize("missing", ["train", "test", "val"])
def test_missing_data_is_a_usage_error_that_names_file_and_way_out(tiny_betons, tmp_path, missing):
    with pytest.raises(UsageError, match=r"absent\.beton"):
        main(replace(config(tiny_betons, tmp_path / "run"), **{missing: tmp_path / "absent.beton"}))
    assert not (tmp_path / "run").exists()


def test_the_test_set_is_not_taken_for_a_validation_set(tiny_betons, tmp_path):
    with pytest.raises(UsageError, match="is the test set"):
        main(config(tiny_betons, tmp_path / "run", val=tiny_betons.test))


def test_a_state_that_knows_a_setting_by_its_old_name_goes_on(tiny_betons, tmp_path):
    settings = config(tiny_betons, tmp_path / "run", epochs=1, stop_after_steps=2, backbone_lr=0.5)
    main(settings)
    state = load_state(settings.out / "last.pt")
    state["settings"]["trunk_lr"] = state["settings"].pop("backbone_lr")
    save_state(settings.out / "last.pt", state)
    main(replace(settings, stop_after_steps=None))
    assert load_state(settings.out / "last.pt")["settings"]["backbone_lr"] == 0.5
    assert load_state(settings.out / "last.pt")["progress"]["epoch"] == 1


def test_a_state_with_a_setting_that_is_gone_goes_on_only_where_it_did_nothing(tiny_betons, tmp_path):
    settings = config(tiny_betons, tmp_path / "run", epochs=1, stop_after_steps=2)
    main(settings)
    state = load_state(settings.out / "last.pt")
    state["settings"]["label_smoothing"] = 1.0
    save_state(settings.out / "last.pt", state)
    with pytest.raises(RunError, match=r"begun with other settings \(label_smoothing was 1\.0, now None\)"):
        main(replace(settings, stop_after_steps=None))
    state["settings"]["label_smoothing"] = 0.0
    save_state(settings.out / "last.pt", state)
    main(replace(settings, stop_after_steps=None))
    assert load_state(settings.out / "last.pt")["progress"]["epoch"] == 1


def test_the_bare_command_says_which_command_makes_the_data(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    with signals_kept(), pytest.raises(SystemExit) as end:
        run_command(["--amp"])
    assert end.value.code == 2
    assert "fastretina pack --root DIR --split train --out data/train.beton" in capfd.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("wrong", [{"epochs": 0}, {"batch_size": 0}, {"lr": 0.0}, {"lr": float("nan")}, {"stop_after_steps": 0}])
def test_settings_that_cannot_work_are_usage_errors(tiny_betons, tmp_path, wrong):
    with pytest.raises(UsageError):
        main(config(tiny_betons, tmp_path / "run", **wrong))


def test_weights_that_cannot_be_had_leave_no_run_that_looks_begun(tiny_betons, tmp_path):
    with pytest.raises(Exception, match=r"absent\.pth"):
        main(config(tiny_betons, tmp_path / "run", weights=str(tmp_path / "absent.pth")))
    assert not (tmp_path / "run" / "config.json").exists()
