"""--recipe: settings by name."""

from __future__ import annotations

import json
from dataclasses import asdict, fields
from functools import partial
from pathlib import Path

import pytest

from fastretina import cli
from fastretina.compare import CompareConfig
from fastretina.train import main
from fastretina.training.config import Recipe, TrainConfig, as_settings, flags_before
from fastretina.training.presets import PRESETS, recipe_in_words
from tests.training.test_settings import parsed


@pytest.mark.parametrize("kind", [TrainConfig, CompareConfig])
@pytest.mark.parametrize("name", PRESETS)
def test_a_recipe_sets_what_it_says_and_nothing_else(name, kind):
    found = asdict(parsed(kind, "--recipe", name))
    asked = {key: value for key, value in PRESETS[name].settings.items() if key in found}
    assert found == asdict(kind()) | {"recipe": name} | asked
    assert kind is CompareConfig or asked == dict(PRESETS[name].settings)


def test_every_recipe_differs_from_the_others_and_names_settings_of_all_commands_that_train():
    names = {field.name for field in fields(Recipe)}
    for preset in PRESETS.values():
        assert preset.settings.keys() <= names | {"arch"}  # which a comparison asks for by --archs
    assert len({json.dumps(dict(preset.settings)) for preset in PRESETS.values()}) == len(PRESETS)


def test_flags_override_a_recipe_wherever_they_stand():
    for words in (["--recipe", "fast", "--epochs", 2], ["--epochs", 2, "--recipe=fast"]):
        found = parsed(TrainConfig, *words)
        assert (found.recipe, found.epochs) == ("fast", 2)
        assert found.resolution == PRESETS["fast"].settings["resolution"]


def test_a_config_json_holds_all_settings_of_its_recipe_and_gives_them_back(tmp_path: Path):
    config = parsed(TrainConfig, "--recipe", "fast", "--epochs", 2)
    (tmp_path / "config.json").write_text(json.dumps(as_settings(config)))
    assert as_settings(parsed(TrainConfig, "--config", tmp_path / "config.json")) == as_settings(config)


def test_a_recipe_that_is_asked_for_overrides_that_of_the_file(tmp_path: Path):
    (tmp_path / "config.json").write_text(json.dumps(as_settings(parsed(TrainConfig, "--recipe", "fast", "--seed", 5))))
    found = parsed(TrainConfig, "--config", tmp_path / "config.json", "--recipe", "baseline")
    assert (found.recipe, found.epochs, found.seed) == ("baseline", PRESETS["baseline"].settings["epochs"], 5)


def test_an_unknown_recipe_is_wrong_usage_that_names_those_there_are(capsys):
    with pytest.raises(SystemExit) as end:
        parsed(TrainConfig, "--recipe", "slow")
    assert end.value.code == 2
    error = capsys.readouterr().err
    assert all(name in error for name in PRESETS)


def test_help_shows_what_each_recipe_sets(capsys):
    with pytest.raises(SystemExit):
        cli.run(TrainConfig, main, ["--help"], flags_before=partial(flags_before, TrainConfig))
    words = set(capsys.readouterr().out.replace("│", " ").replace(",", " ").split())
    for preset in PRESETS.values():
        assert {flag.split("=")[0] for flag in preset.flags} <= {word.split("=")[0] for word in words}


def test_a_run_says_which_settings_of_its_recipe_were_overridden():
    config = parsed(TrainConfig, "--recipe", "fast", "--epochs", 99)
    text = recipe_in_words("fast", asdict(config))
    assert text.endswith(", but --epochs=99")
    assert all(flag in text for flag in PRESETS["fast"].flags)
