"""Settings from a run's config.json and from flags that other libraries' users type."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest

from fastretina import cli
from fastretina.compare import CompareConfig
from fastretina.training.config import Recipe, TrainConfig, as_settings, flags_before

# One other than the default of every kind: paths, numbers, words, switches, and what may be missing.
SETTINGS = TrainConfig(
    train=Path("a b.beton"), val=Path("v-*.beton"), epochs=3, lr=0.1, backbone_lr=0.2, clip_norm=1.0, amp=True, scale_lr=True,
    compile="default", arch="resnet50", weights="-odd.pth", out=Path("runs/there"), patience=4, seed=-1, sampling="sqrt",
)  # fmt: skip


def parsed(kind: type[Recipe], *words: object) -> Recipe:
    """The settings that the command line `words` stands for. SystemExit where it is refused."""
    found: list[Recipe] = []
    with pytest.raises(SystemExit) as end:
        cli.run(kind, found.append, [str(word) for word in words], flags_before=partial(flags_before, kind))
    if end.value.code:
        raise end.value
    return found[0]


def saved(folder: Path, settings: dict[str, object]) -> Path:
    (folder / "config.json").write_text(json.dumps(settings))
    return folder / "config.json"


@pytest.mark.parametrize(
    "settings",
    [SETTINGS, TrainConfig(), CompareConfig(archs="resnet18", out=Path("c"), train=Path("x"))],
    ids=["set", "default", "compare"],
)
def test_a_config_json_given_back_is_the_same_run(tmp_path, settings):
    again = parsed(type(settings), "--config", saved(tmp_path, as_settings(settings)))
    assert as_settings(again) == as_settings(settings)


def test_flags_override_the_file_wherever_they_stand_and_what_it_lacks_is_the_default(tmp_path):
    file = saved(tmp_path, {"epochs": 3, "lr": 0.1, "amp": True, "val": "v.beton"})
    for words in (["--epochs", 5, "--no-amp", f"--config={file}"], [f"--config={file}", "--epochs", 5, "--no-amp"]):
        found = parsed(TrainConfig, *words)
        assert as_settings(found) == as_settings(TrainConfig(epochs=5, lr=0.1, amp=False, val=Path("v.beton")))


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ('{"epochs": 3, "batchsize": 8}', "batchsize"),
        ('{"config": "other.json"}', "config"),
        ('{"epochs": "ten"}', "--epochs"),
        ('{"epochs": true}', "epochs"),
        ('{"amp": "yes"}', "amp"),
        ("[1]", "config.json"),
        ("{", "config.json"),
    ],
)
def test_a_file_that_holds_something_else_is_wrong_usage_that_names_it(tmp_path, capsys, content, named):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(SystemExit) as end:
        parsed(TrainConfig, "--config", tmp_path / "config.json")
    assert end.value.code == 2
    assert named in capsys.readouterr().err


def test_a_file_that_is_missing_is_wrong_usage(tmp_path):
    with pytest.raises(SystemExit) as end:
        parsed(TrainConfig, "--config", tmp_path / "absent.json")
    assert end.value.code == 2


def test_settings_of_older_runs_keep_their_meaning(tmp_path):
    assert parsed(TrainConfig, "--config", saved(tmp_path, {"trunk_lr": 0.5})).backbone_lr == 0.5


def test_a_setting_of_older_runs_that_is_gone_may_only_be_what_did_nothing(tmp_path, capsys):
    assert parsed(TrainConfig, "--config", saved(tmp_path, {"label_smoothing": 0.0, "lr": 0.5})).lr == 0.5
    with pytest.raises(SystemExit) as end:
        parsed(TrainConfig, "--config", saved(tmp_path, {"label_smoothing": 0.1}))
    assert end.value.code == 2
    error = " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert "config.json: label_smoothing: no setting of this command" in error


@pytest.mark.parametrize(
    ("alias", "flag", "value"),
    [
        ("--output", "--out", "there"),
        ("--img-size", "--resolution", 64),
        ("--clip-grad", "--clip-norm", 2.0),
        ("--grad-accum-steps", "--accumulate", 2),
        ("--sync-bn", "--sync-batchnorm", None),
        ("--model-ema-decay", "--ema", 0.9),
        ("--trunk-lr", "--backbone-lr", 0.1),
    ],
)
def test_flags_of_other_names_mean_the_same(alias, flag, value):
    first, second = (parsed(TrainConfig, name, *([] if value is None else [value])) for name in (alias, flag))
    assert first == second != TrainConfig()
