"""When torch.compile is chosen, and that compiling changes nothing but the speed; on a CPU with backends that write no code."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from fastretina.models.resnet import build_model, freeze_backbone
from fastretina.training import build
from fastretina.training import compile as compiling
from fastretina.training.compile import StepForward, choose_compile, training_flops
from fastretina.training.config import TrainConfig
from fastretina.training.distributed import World

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


class TwoConvolutions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.second = nn.Conv2d(4, 5, 3)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.second(self.norm(self.first(images)).relu()).mean(dim=(2, 3))


@pytest.mark.parametrize(
    ("device", "steps", "batch_size", "capability", "mode", "says"),
    [
        (CUDA, 8780, 32, (9, 0), "default", "may save"),
        (CUDA, 200, 32, (9, 0), None, "off: may save 0 s of 200 steps and costs about 20 s"),
        (CUDA, 10**6, 4, (9, 0), "reduce-overhead", "CUDA graphs"),
        (CUDA, 8780, 32, (6, 1), None, "compute capability 7.0, this GPU has 6.1"),
        (CPU, 10**6, 32, None, None, "on cpu"),
    ],
)
def test_auto_weighs_what_compiling_saves_against_what_it_costs(device, steps, batch_size, capability, mode, says):
    choice = choose_compile("auto", device, build_model("resnet18"), 512, batch_size, steps, capability)
    assert choice.mode == mode
    assert says in choice.note
    assert "\n" not in choice.note


@pytest.mark.parametrize(("accumulate", "mode"), [(1, "reduce-overhead"), (2, "default")])
def test_auto_leaves_cuda_graphs_to_steps_of_one_micro_batch(accumulate, mode, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    settings = TrainConfig(compile="auto", batch_size=4 * accumulate, accumulate=accumulate)
    choice = build.compile_choice(settings, build_model("resnet18"), World(device=CUDA), 10**6)
    assert choice.mode == mode
    assert choice.note.startswith(mode)


def test_a_mode_by_name_is_obeyed_even_where_auto_would_not_choose_it():
    model = TwoConvolutions()
    assert choose_compile("max-autotune-no-cudagraphs", CPU, model, 8, 1, 1).mode == "max-autotune-no-cudagraphs"
    assert choose_compile("off", CUDA, model, 512, 256, 10**6, (9, 0)).mode is None


def test_flops_are_those_of_the_known_table():
    # A ResNet18's forward pass at 224 px is 3.64 GFLOP; training takes three times that, less the first layer's input gradient.
    model = build_model("resnet18", 1000)
    expected = 3 * 3.64e9 - 2 * 64 * 3 * 49 * 112 * 112
    assert training_flops(model, 224) == pytest.approx(expected, rel=0.01)
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_only_full_batches_are_compiled_and_only_once(backend):
    torch.manual_seed(0)
    model = TwoConvolutions()
    forward = StepForward(model, "default", batch_size=4, backend=backend)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert forward.warm_up((4, 3, 8, 8), torch.float32, CPU) > 0
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    compiled = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    for size in (4, 3, 4, 1, 2, 4):
        images = torch.randn(size, 3, 8, 8).contiguous(memory_format=torch.channels_last)
        model.eval()
        expected = model(images)
        torch.testing.assert_close(forward(images), expected)
        model.train()
        forward(images).sum().backward()
    # eval() made one more graph; the sizes made none.
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= compiled + 1
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("mode", "durations", "compile_seconds"),
    [("default", [10.0, 1.0], 9.0), ("reduce-overhead", [10.0, 4.0, 1.0], 9.0 + 3.0), ("default", [1.0, 2.0], 0.0)],
)
def test_the_warm_up_takes_the_steps_that_the_mode_needs_each_without_old_gradients(monkeypatch, mode, durations, compile_seconds):
    """A CUDA graph's gradients die when the next step begins, and a step that adds to them fails."""
    torch._dynamo.reset()
    model = nn.Sequential(TwoConvolutions(), nn.Dropout(0.5))
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    left_over, now = [], 0.0

    def backend(graph, inputs):
        def run(*given):
            nonlocal now
            now += durations[len(left_over)]
            left_over.append([name for name, parameter in model.named_parameters() if parameter.grad is not None])
            return graph(*given)

        return run

    monkeypatch.setattr(compiling, "time", SimpleNamespace(perf_counter=lambda: now))
    forward = StepForward(model, mode, batch_size=4, backend=backend)
    before, random = {name: value.clone() for name, value in model.state_dict().items()}, torch.get_rng_state()
    assert forward.warm_up((4, 3, 8, 8), torch.float32, CPU) == compile_seconds
    assert left_over == [[]] * len(durations)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random)
    assert all(parameter.grad is None for parameter in model.parameters())
    torch._dynamo.reset()


def test_the_warm_up_of_a_frozen_backbone_compiles_the_step_that_follows_and_leaves_it_frozen():
    torch._dynamo.reset()
    model = nn.Sequential(TwoConvolutions(), nn.Linear(5, 5))
    model.train()
    freeze_backbone(model, frozen=True)
    modes = [module.training for module in model.modules()]
    forward = StepForward(model, "default", batch_size=4, backend="aot_eager")
    forward.warm_up((4, 3, 8, 8), torch.float32, CPU)
    assert [module.training for module in model.modules()] == modes
    compiled = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    forward(torch.randn(4, 3, 8, 8).contiguous(memory_format=torch.channels_last)).sum().backward()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == compiled
    torch._dynamo.reset()


def test_without_a_mode_nothing_is_compiled():
    forward = StepForward(TwoConvolutions(), None, batch_size=4)
    assert forward.warm_up((4, 3, 8, 8), torch.float32, CPU) == 0.0
    assert forward(torch.zeros(4, 3, 8, 8)).shape == (4, 5)
