"""Weight decay goes to the right parameters; schedules have the shapes that they are named for."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from fastretina.errors import UsageError
from fastretina.models.resnet import build_model
from fastretina.training.config import TrainConfig
from fastretina.training.optim import ExponentialAverage, build_optimizer, parameter_groups, rate_factor

SCHEDULES = ("cosine", "two-phase", "onecycle", "constant")


def test_only_weights_of_convolutions_and_linear_layers_decay():
    model = build_model("resnet18")
    groups = parameter_groups(model, 0.1, 0.05)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    kinds = {f"{name}.weight": module for name, module in model.named_modules()}
    decayed = {names[id(p)] for group in groups if group["weight_decay"] == 0.05 for p in group["params"]}
    assert decayed == {name for name, module in kinds.items() if isinstance(module, (nn.Conv2d, nn.Linear))}
    assert {group["weight_decay"] for group in groups} == {0.0, 0.05}
    assert sorted(names[id(p)] for group in groups for p in group["params"]) == sorted(names.values())
    assert {group["lr"] for group in groups} == {0.1}


def test_the_head_learns_at_the_full_rate_and_the_backbone_at_its_share():
    model = build_model("resnet18")
    optimizer = build_optimizer(model, "adamw", 0.1, 0.05, backbone_lr=0.2)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    rates = {names[id(p)]: group["lr"] for group in optimizer.param_groups for p in group["params"]}
    assert {name for name, rate in rates.items() if rate == 0.1} == {"fc.weight", "fc.bias"}
    assert {rate for name, rate in rates.items() if not name.startswith("fc.")} == {0.1 * 0.2}


def rates_by_name(model, **settings) -> dict[str, float]:
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {names[id(p)]: group["lr"] for group in parameter_groups(model, 0.1, 0.05, **settings) for p in group["params"]}


def test_the_rates_of_a_transformer_fall_with_every_block_from_the_head_to_the_patches():
    """As BEiT has it (Bao et al. 2021, optim_factory.py): its 6 blocks are layers 1 to 6, the embeddings 0, the rest 7."""
    rates = rates_by_name(build_model("timm:test_vit", resolution=32), backbone_lr=0.5, layer_decay=0.75)
    layers = {"cls_token": 0, "pos_embed": 0, "patch_embed": 0, "norm": 6}
    for name, rate in rates.items():
        parts = name.split(".")
        layer = 1 + int(parts[1]) if parts[0] == "blocks" else layers.get(parts[0])
        assert rate == pytest.approx(0.1 if parts[0] == "head" else 0.1 * 0.5 * 0.75 ** (7 - layer)), name


def test_the_rates_of_a_resnet_fall_with_every_stage():
    rates = rates_by_name(build_model("resnet18"), layer_decay=0.5)
    expected = {"fc": 0.1, "layer4": 0.05, "layer3": 0.025, "layer2": 0.0125, "layer1": 0.00625, "conv1": 0.003125, "bn1": 0.003125}
    assert rates == pytest.approx({name: expected[name.split(".")[0]] for name in rates})


def test_a_network_that_does_not_say_its_layers_has_no_layer_decay():
    assert set(rates_by_name(nn.Linear(4, 2), layer_decay=1.0).values()) == {0.1}
    with pytest.raises(UsageError, match="--layer-decay: a Linear does not say"):
        parameter_groups(nn.Linear(4, 2), 0.1, 0.05, layer_decay=0.75)


def test_an_average_lags_behind_noisy_weights_and_comes_closer_to_their_centre():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 1, bias=False), nn.BatchNorm1d(1))
    average = ExponentialAverage(model, decay=0.99)
    expected = None
    for update in range(300):
        with torch.no_grad():
            model[0].weight.copy_(1.0 + torch.randn(1, 8))
            model[1].running_mean.fill_(update)
            model[1].num_batches_tracked.fill_(update)
        average.update_parameters(model)
        share = 1 - min(0.99, (1 + update) / (10 + update))
        now = model[0].weight.detach().double()
        expected = now.clone() if expected is None else expected + share * (now - expected)
    assert torch.allclose(average.module[0].weight.detach().double(), expected, atol=1e-5)
    centre = torch.ones(1, 8)
    assert (average.module[0].weight - centre).norm() < 0.3 * (model[0].weight - centre).norm()
    assert average.module[1].num_batches_tracked == 299
    assert 150 < average.module[1].running_mean.item() < 299
    average.restart(model)
    assert torch.equal(average.module[0].weight, model[0].weight)


@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_optimizers_lower_the_loss(name):
    torch.manual_seed(0)
    model = nn.Linear(4, 2)
    optimizer = build_optimizer(model, name, 0.05, 0.01)
    inputs, targets = torch.randn(64, 4), torch.randint(0, 2, (64,))
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(inputs), targets)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]


def test_cosine_warms_up_peaks_once_and_ends_at_zero():
    factor = rate_factor(TrainConfig(schedule="cosine", epochs=10), steps_per_epoch=20)
    values = [factor(step) for step in range(201)]
    assert values[0] == pytest.approx(0.01)
    assert max(values) == values[10] == 1.0
    assert values[:11] == sorted(values[:11])
    assert values[10:] == sorted(values[10:], reverse=True)
    assert values[200] == pytest.approx(0.0, abs=1e-12)


def test_warm_up_is_no_longer_than_an_epoch():
    factor = rate_factor(TrainConfig(schedule="cosine", epochs=100), steps_per_epoch=3)
    assert factor(3) == 1.0


@pytest.mark.parametrize("total", [1, 2, 7, 50, 333])
def test_onecycle_is_that_of_torch(total):
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    oracle = (
        torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1.0, total_steps=total, cycle_momentum=False) if total > 3 else None
    )
    factor = rate_factor(TrainConfig(schedule="onecycle", epochs=1), total)
    for step in range(total):
        if oracle is not None:
            assert factor(step) == pytest.approx(optimizer.param_groups[0]["lr"], abs=1e-9)
            optimizer.step()
            if step < total - 1:
                oracle.step()
        assert 0 < factor(step) <= 1


def test_two_phase_drops_to_a_tenth_where_the_second_phase_begins():
    assert [TrainConfig(schedule="two-phase", epochs=epochs).second_phase for epochs in (1, 2, 5, 10)] == [None, 1, 3, 5]
    assert TrainConfig(schedule="cosine", epochs=10).second_phase is None
    factor = rate_factor(TrainConfig(schedule="two-phase", epochs=5), steps_per_epoch=4)
    assert [factor(step) for step in (0, 11, 12, 19)] == [1.0, 1.0, 0.1, 0.1]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_restored_schedule_goes_on_with_the_same_rates(schedule):
    def fresh():
        optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.3)
        return optimizer, LambdaLR(optimizer, rate_factor(TrainConfig(schedule=schedule, epochs=4), 5))

    def rates(optimizer, scheduler, steps):
        found = []
        for _ in range(steps):
            found.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            scheduler.step()
        return found

    optimizer, scheduler = fresh()
    whole = rates(optimizer, scheduler, 20)
    optimizer, scheduler = fresh()
    begun = rates(optimizer, scheduler, 7)
    other, resumed = fresh()
    other.load_state_dict(optimizer.state_dict())
    resumed.load_state_dict(scheduler.state_dict())
    assert begun + rates(other, resumed, 13) == whole


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_rates_past_the_planned_end_stay_defined(schedule):
    factor = rate_factor(TrainConfig(schedule=schedule, epochs=2), 3)
    assert all(0 <= factor(step) <= 1 for step in range(20))
