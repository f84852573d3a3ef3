"""Weights as others save them are unwrapped, what was done is told, and what does not fit is refused in words that help."""

from __future__ import annotations

import argparse
import collections
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fastretina import train
from fastretina.errors import CheckpointError
from fastretina.models.resnet import build_model, load_initial
from fastretina.training.config import TrainConfig

State = dict[str, torch.Tensor]


def state_of(arch: str, outputs: int = 5) -> State:
    """Each tensor holds a number of its own, which it stores once: the files are small."""
    with torch.device("meta"):
        empty = build_model(arch, outputs).state_dict()
    return {
        name: torch.tensor(number, dtype=value.dtype).expand(value.shape)
        for number, (name, value) in enumerate(empty.items(), start=1)
    }


R18 = state_of("resnet18")
BACKBONE = {name: value for name, value in R18.items() if not name.startswith("fc.")}
OTHER_HEAD = {"head.weight": torch.zeros(7, 512), "head.bias": torch.zeros(7)}


def behind(prefix: str, state: State = R18) -> State:
    return {prefix + name: value for name, value in state.items()}


def load(found: Any, folder: Path, arch: str = "resnet18", outputs: int = 5) -> tuple[nn.Module, str]:
    """The model, and what was told beside the file's name."""
    path = folder / "given.pth"
    torch.save(found, path)
    with torch.device("meta"):  # random weights take longer than all else here
        model = build_model(arch, outputs)
    for value in model.to_empty(device="cpu").state_dict().values():
        value.fill_(-1.0 if value.is_floating_point() else 0)  # what no weights to be loaded are, and counters as they begin
    before = {name: value.clone() for name, value in model.state_dict().items()}
    note = load_initial(model, arch, path).removeprefix(str(path)).strip(" ()")
    model.before = before  # type: ignore[assignment]
    return model, note


def assert_loaded(model: nn.Module, with_head: bool, state: State = R18) -> None:
    for name, value in model.state_dict().items():
        is_new = name.startswith("fc.") and not with_head
        assert torch.equal(value, model.before[name] if is_new else state[name].to(value.dtype)), name  # type: ignore[index]


@pytest.mark.parametrize(
    ("found", "note"),
    [
        (R18, ""),
        (collections.OrderedDict(R18), ""),
        (R18 | {"epoch": 3}, ""),
        (behind("module."), "unwrapped module."),
        (behind("_orig_mod.module."), "unwrapped _orig_mod.module."),
        (behind("module.backbone."), "unwrapped module.backbone."),
        ({"state_dict": R18, "epoch": 3, "arch": "resnet18"}, "unwrapped state_dict"),
        ({"state_dict": R18, "args": argparse.Namespace(lr=1.0, names=["x"])}, "unwrapped state_dict"),
        ({"model": {"state_dict": behind("model.net.")}}, "unwrapped model, state_dict, model.net."),
        ({"model_state": R18, "optimizer": {"state": {}}}, "unwrapped model_state"),
        ({"model": {"name": "resnet18"}, "weights": R18}, "unwrapped weights"),
        ({"state_dict": R18, "state_dict_ema": behind("module.")}, "unwrapped state_dict; left out: state_dict_ema"),
        ({"model_ema": behind("module."), "epoch": 3}, "unwrapped model_ema, module."),
        (behind("model.") | {"ema.conv1.weight": R18["conv1.weight"]}, "unwrapped model.; left out: ema"),
    ],
    ids=lambda value: "" if isinstance(value, dict) else value.replace(" ", "-") or "bare",
)
def test_known_wrappings_are_undone_and_told(tmp_path, found, note):
    model, told = load(found, tmp_path)
    assert told == note
    assert_loaded(model, with_head=True)


@pytest.mark.parametrize(
    ("found", "note"),
    [
        (BACKBONE, "no head"),
        (behind("encoder.", BACKBONE) | OTHER_HEAD, "unwrapped encoder.; no head; left out: head"),
        (behind("module.", BACKBONE | OTHER_HEAD), "unwrapped module.; no head; left out: module.head"),
        (BACKBONE | {"fc.1.weight": R18["fc.weight"], "fc.1.bias": R18["fc.bias"]}, "no head; left out: fc"),
        (state_of("resnet18", 1000), "its head of 1000 outputs left out"),
        (BACKBONE | {"fc.weight": R18["fc.weight"]}, "its head left out"),
    ],
    ids=["none", "another", "another behind the prefix", "of two layers", "of 1000", "without bias"],
)
def test_a_head_that_does_not_fit_stays_as_initialised_and_what_is_left_out_is_told(tmp_path, found, note):
    model, told = load(found, tmp_path)
    assert told == note
    assert_loaded(model, with_head=False)


def test_counters_that_old_files_lack_stay(tmp_path):
    model, told = load({name: value for name, value in R18.items() if not name.endswith("num_batches_tracked")}, tmp_path)
    assert told == ""
    assert int(model.bn1.num_batches_tracked) == 0
    assert torch.equal(model.fc.weight, R18["fc.weight"])


def test_half_precision_is_widened(tmp_path):
    model, told = load({name: value.half() for name, value in R18.items() if value.is_floating_point()}, tmp_path)
    assert told == ""
    assert model.conv1.weight.dtype == torch.float32
    assert torch.equal(model.conv1.weight, R18["conv1.weight"])


def test_counters_that_were_averaged_change_nothing(tmp_path):
    model, told = load({name: value.float() for name, value in R18.items()}, tmp_path)
    assert told == ""
    assert int(model.bn1.num_batches_tracked) == 0
    assert torch.equal(model.fc.weight, R18["fc.weight"])


@pytest.mark.parametrize("wrapped", [R18, behind("module.backbone."), {"state_dict": R18}])
@pytest.mark.parametrize("arch", ["resnet34", "resnet50"])
def test_weights_of_another_architecture_say_of_which(tmp_path, wrapped, arch):
    with pytest.raises(
        CheckpointError, match=rf"given\.pth: not the weights of a {arch}: it lacks .*those of a resnet18 \(--arch resnet18\)$"
    ):
        load(wrapped, tmp_path, arch)


@pytest.mark.parametrize("arch", ["resnet34", "resnet50"])
def test_weights_of_a_larger_architecture_say_of_which(tmp_path, arch):
    with pytest.raises(CheckpointError, match=rf"a resnet18: it also has layer.*those of a {arch} \(--arch {arch}\)$"):
        load(state_of(arch), tmp_path)


@pytest.mark.parametrize(
    ("found", "message"),
    [
        ({"model": R18, "net": R18}, r"holds weights more than once: model, net\. Save those that you mean .*\['model'\]"),
        ({"model_ema": R18, "state_dict_ema": R18}, r"more than once: state_dict_ema, model_ema"),
        (R18 | behind("backbone."), r"holds a whole resnet18 more than once, behind '' and 'backbone\.'"),
        (
            behind("student.backbone."),
            r"the first student\.backbone\.conv1\.weight, .*A whole resnet18 stands behind student\.backbone\.",
        ),
        (
            {"encoder.blocks.0.weight": torch.zeros(2)},
            r"lacks conv1\.weight and 99 more \(1 tensors, the first encoder\.blocks.*module\.",
        ),
        (R18 | {"layer1.0.se.weight": torch.zeros(2)}, r"it also has layer1\.0\.se\.weight"),
        (
            R18 | {"conv1.weight": torch.zeros(64, 3, 3, 3)},
            r"conv1\.weight has shape \(64, 3, 3, 3\), the model needs \(64, 3, 7, 7\)",
        ),
        (R18 | {"bn1.bias": torch.zeros(64, dtype=torch.int8)}, r"bn1\.bias is torch\.int8.*plain torch\.float32"),
        (R18 | {"bn1.bias": torch.zeros(64).to_sparse()}, r"bn1\.bias is torch\.float32, torch\.sparse_coo"),
        (
            {"student": R18, "teacher": R18},
            r"holds no tensors by name, but the keys student, teacher\. A dictionary .* state_dict, model,",
        ),
        ([R18["conv1.weight"]], r"holds no tensors by name, but a list"),
        (torch.zeros(3), r"but a Tensor"),
        ({}, r"holds no tensors by name"),
    ],
)
def test_what_cannot_be_told_apart_or_does_not_fit_is_refused_in_words_of_our_own(tmp_path, found, message):
    with pytest.raises(CheckpointError, match=rf"given\.pth: .*{message}") as raised:
        load(found, tmp_path)
    assert "\n" not in str(raised.value)


def test_a_file_that_holds_itself_comes_to_an_end(tmp_path):
    found: dict[str, Any] = {}
    found["model"] = found
    with pytest.raises(CheckpointError, match="no tensors by name"):
        load(found, tmp_path)


class Foreign:
    """Something of the program that saved it."""


def test_objects_of_other_programs_are_named_with_the_way_out(tmp_path):
    with pytest.raises(
        CheckpointError, match=r"holds an object of \S*test_wrappings\.Foreign, .*torch\.save\(model\.state_dict\(\), FILE\)$"
    ):
        load({"state_dict": R18, "config": Foreign()}, tmp_path)


class InBag:
    """Runs something when a careless reader makes it, out of the attributes of a Namespace."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.path),)


class Setter:
    """A Namespace that is to be filled by a method of the file's choice."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return argparse.Namespace, (), {"__setstate__": os.mkdir, "path": str(self.path)}


@pytest.mark.parametrize("attack", [lambda path: argparse.Namespace(x=InBag(path)), Setter])
def test_a_namespace_holds_nothing_that_runs(tmp_path, attack):
    with pytest.raises(CheckpointError, match=r"holds an object of \S*mkdir"):
        load({"state_dict": R18, "args": attack(tmp_path / "attacked")}, tmp_path)
    assert not (tmp_path / "attacked").exists()


def test_what_may_be_read_is_again_as_it_was(tmp_path):
    load({"state_dict": R18, "args": argparse.Namespace()}, tmp_path)
    assert argparse.Namespace not in torch.serialization.get_safe_globals()


def test_a_run_says_how_it_understood_its_weights(tiny_betons, tmp_path, capsys, one_thread, undrawn):
    path, state = tmp_path / "others.pth", build_model("resnet18").state_dict()
    torch.save({"state_dict": {f"module.{name}": value for name, value in state.items() if not name.startswith("fc.")}}, path)
    sizes = {"epochs": 1, "batch_size": 40, "resolution": 32, "workers": 1}
    settings = TrainConfig(train=tiny_betons.train, test=tiny_betons.test, out=tmp_path / "run", weights=str(path), **sizes)
    assert train.main(settings) == 0
    assert f"\nweights    {path} (unwrapped state_dict, module.; no head)\n" in capsys.readouterr().out
