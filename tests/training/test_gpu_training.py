"""Training on a device: numbers that agree between formats, and nothing that grows. Tiny on a CPU, at length on a GPU."""

from __future__ import annotations

import gc
import os
import threading
from pathlib import Path

import psutil
import pytest
import torch
from devices import DEVICES, DeviceLoader, write_blocks
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.functional import cross_entropy
from torch.utils._python_dispatch import TorchDispatchMode

from fastretina import build_model, train
from fastretina.errors import RunError
from fastretina.models.heads import HEADS, Loss
from fastretina.models.precision import Precision
from fastretina.system.cuda import STEPS_AHEAD, Pace, training_bytes
from fastretina.training import loop
from fastretina.training.compile import StepForward
from fastretina.training.config import TrainConfig
from fastretina.training.optim import ExponentialAverage, build_optimizer
from fastretina.training.progress import Tally


def losses(device: str, dtype: torch.dtype | None, steps: int, mode: str | None = None) -> list[float]:
    """Losses of training a ResNet18 from one seed on noise that is new in each step, with a faint colour for each grade."""
    torch.manual_seed(0)
    size, side = (32, 256) if device == "cuda" else (16, 64)
    colours, labels = 0.2 * torch.randn(5, 3, 1, 1), torch.arange(size) % 5
    model = build_model("resnet18").to(device)
    optimizer = build_optimizer(model, "sgd", 1e-3 if device == "cuda" else 1e-4, 0.01)
    precision, forward = Precision(device, dtype, ""), StepForward(model, mode, size)
    scaler, found = precision.scaler(), []
    forward.warm_up((size, 3, side, side), torch.float32, torch.device(device), precision.autocast)
    for _ in range(steps):
        images = (torch.randn(size, 3, side, side) + colours[labels]).to(device, memory_format=torch.channels_last)
        optimizer.zero_grad(set_to_none=True)
        with precision.autocast():
            loss = cross_entropy(forward(images), labels.to(device))
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        found.append(loss.detach())
    return [float(loss) for loss in found]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_loses_as_float32_does(device, dtype):
    if device == "cpu" and dtype is torch.float16:
        pytest.skip("a CPU would only emulate it")
    steps = 50 if device == "cuda" else 4
    half, full = losses(device, dtype, steps), losses(device, None, steps)
    assert half != full
    assert sum(half) == pytest.approx(sum(full), rel=0.02)
    assert sum(half[steps // 2 :]) == pytest.approx(sum(full[steps // 2 :]), rel=0.02)


@pytest.mark.parametrize("device", [DEVICES[1]])
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_a_compiled_step_trains_as_the_eager_one(device, mode):
    compiled, eager = losses(device, torch.bfloat16, 20, mode), losses(device, torch.bfloat16, 20)
    assert compiled == pytest.approx(eager, rel=0.02)


@pytest.mark.parametrize("device", [DEVICES[1]])
@pytest.mark.parametrize("changes", [{}, {"ema": 0.9, "accumulate": 2, "clip_norm": 1.0, "head": "ordinal"}], ids=str)
def test_no_step_waits_for_the_device(tiny_betons, tmp_path, device, changes, monkeypatch):
    timed, steps = loop._timed, []

    def strict(batches, tally):
        for batch in timed(batches, tally):
            # The first steps allocate memory and choose convolutions; the last one reads what the epoch has given.
            torch.cuda.set_sync_debug_mode("error" if 2 < len(steps) < 18 else "default")
            steps.append(len(batch.ids))
            yield batch
        torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(loop, "_timed", strict)
    monkeypatch.setattr(loop, "READ_EVERY", 3)
    data = {"train": tiny_betons.train, "test": tiny_betons.test, "out": tmp_path / "run"}
    common = {"amp": True, "epochs": 1, "batch_size": 2, "resolution": 64, "device": device, "resident": "on", "val_fraction": 0}
    try:
        train.main(TrainConfig(**data, **common, **changes))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(steps) == 20


def fake_cuda(value: torch.Tensor) -> torch.Tensor:
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="cuda")


class Watch(TorchDispatchMode):
    """Notes operations for which a host with a GPU would wait: those that need a value, and copies that are not asynchronous."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        found = function(*args, **kwargs)
        tensors = [value for value in (*args, *kwargs.values(), found) if isinstance(value, torch.Tensor)]
        copied = "copy" in str(function) and len({value.device.type for value in tensors}) > 1
        if (copied and not kwargs.get("non_blocking")) or ("_local_scalar" in str(function) and tensors[0].is_cuda):
            self.waits.append(str(function))
        return found


@pytest.mark.parametrize("head", list(HEADS))
def test_nothing_of_a_step_asks_for_a_value_that_is_on_the_device(head):
    # Tensors without memory that say they are on a GPU: all of a step but the backward pass, which needs a device.
    head_of = HEADS[head](5)
    model, loss = build_model("resnet18", num_classes=head_of.outputs), Loss(head_of, [9, 3, 4, 2, 1], class_weights="sqrt")
    average = ExponentialAverage(model, 0.9)
    with FakeTensorMode():
        average.n_averaged = torch.tensor(0)
        for module in (*model.modules(), *average.module.modules()):
            for name, value in list(module._parameters.items()):
                module._parameters[name] = None if value is None else nn.Parameter(fake_cuda(value))
            for name, value in list(module._buffers.items()):
                module._buffers[name] = None if value is None else fake_cuda(value)
        loss.weights = fake_cuda(loss.weights)
        parameters = list(model.parameters())
        optimizer, tally = build_optimizer(model, "adamw", 1e-3, 0.01), Tally()
        images, labels = torch.empty(4, 3, 32, 32, device="cuda"), torch.empty(4, dtype=torch.int64, device="cuda")
        with Watch() as watch:
            for step in range(2):
                outputs = model(images)
                lost = loss(outputs, labels, loss.weight(labels))
                for parameter in parameters:
                    parameter.grad = torch.zeros_like(parameter)
                nn.utils.clip_grad_norm_(parameters, 1.0)
                optimizer.step()
                average.update_parameters(model)
                tally.add(step, lost, head_of.log_probabilities(outputs).argmax(dim=1), labels, labels)
    assert watch.waits == []


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("settings", [{"resident": "on"}, {"decode": "cpu"}, {"decode": "gpu"}], ids=str)
def test_epochs_leave_memory_threads_and_descriptors_flat(tmp_path, device, settings):
    if settings.get("decode") == "gpu":
        pytest.importorskip("nvidia.nvimgcodec")
    count, side, batch_size = (2048, 256, 128) if device == "cuda" else (3, 8, 2)
    path = write_blocks(tmp_path / "blocks.beton", count, side)
    with DeviceLoader(path, device=device, workers=2, batch_size=batch_size, resolution=side, **settings) as loader:
        usages = []
        for _ in range(10 if device == "cuda" else 6):
            for batch in loader:
                (batch.images.float().mean() * batch.labels.sum()).item()
            gc.collect()
            usages.append(usage(device))
    first, last = usages[3], usages[-1]
    assert last["threads"] == first["threads"]
    assert last["descriptors"] == first["descriptors"]
    assert last["rss"] - first["rss"] < 8e6
    assert last["device"] <= first["device"] + 2e6


def usage(device: str) -> dict[str, float]:
    process = psutil.Process()
    used = 0.0
    if device == "cuda":
        torch.cuda.synchronize()
        free, total = torch.cuda.mem_get_info()
        used = total - free
    return {
        "threads": threading.active_count(), "descriptors": len(list(Path("/proc/self/fd").iterdir())),
        "rss": process.memory_info().rss, "device": used,
    }  # fmt: skip


@pytest.mark.parametrize("device", [DEVICES[1]])
def test_the_reserve_covers_what_training_takes_and_leaves_the_model_alone(device):
    model = build_model("resnet18").to(device)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    random = torch.random.get_rng_state()
    precision = Precision(device, torch.bfloat16, "")
    shape = (32, 3, 256, 256)
    reserve = training_bytes(model, shape, torch.bfloat16, torch.device(device), precision.autocast)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.random.get_rng_state(), random)
    torch.cuda.reset_peak_memory_stats()
    start = torch.cuda.memory_allocated()
    optimizer = build_optimizer(model, "adamw", 1e-3, 0.01)
    images = torch.randn(shape, device=device, dtype=torch.bfloat16).contiguous(memory_format=torch.channels_last)
    for _ in range(3):
        with precision.autocast():
            loss = cross_entropy(model(images), torch.zeros(32, dtype=torch.int64, device=device))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    assert torch.cuda.max_memory_allocated() - start <= reserve


def test_the_host_waits_for_the_step_before_the_last_two_and_for_no_later_one(monkeypatch):
    waited = []

    class Event:
        made = 0

        def __init__(self, blocking, enable_timing):
            assert blocking
            assert not enable_timing

        def record(self, stream):
            assert stream == "the current one"
            self.number, Event.made = Event.made, Event.made + 1

        def synchronize(self):
            waited.append((Event.made - 1, self.number))

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: "the current one")
    pace = Pace(torch.device("cuda"))
    for _ in range(5):
        pace.step()
    assert waited == [(step, step - STEPS_AHEAD) for step in range(STEPS_AHEAD, 5)]
    Pace(torch.device("cpu")).step()
    assert Event.made == 5


def test_losses_read_late_are_those_of_the_call_before():
    tally, ids = Tally(), torch.tensor([7, 8])

    def add(step, loss):
        tally.add(step, torch.tensor(loss), torch.tensor([0, 1]), torch.tensor([0, 1]), ids)

    add(1, 1.0)
    tally.read(0, late=True)
    assert (tally.images, tally.noted()) == (0, 2)
    add(2, 3.0)
    tally.read(0, late=True)
    assert (tally.images, tally.loss, tally.noted()) == (2, 1.0, 4)
    tally.read(0)
    assert (tally.images, tally.loss, tally.noted()) == (4, 2.0, 4)
    tally.read(0)
    assert tally.images == 4
    add(3, float("nan"))
    tally.read(0, late=True)
    with pytest.raises(RunError, match=r"the loss is nan in epoch 1 at step 3, sample ids 7, 8"):
        tally.read(0, late=True)


def test_a_cpu_needs_no_reserve():
    assert training_bytes(build_model("resnet18"), (4, 3, 32, 32), torch.float32, torch.device("cpu")) == 0


@pytest.mark.parametrize("device", [DEVICES[1]])
def test_auto_decode_on_a_gpu_says_what_it_chose_and_why(tiny_betons, device):
    with DeviceLoader(tiny_betons.train, device=device, batch_size=16, resolution=64) as loader:
        assert "may decode" in loader.description, loader.description
        assert len([1 for _ in loader]) == 3
    assert os.environ.get("TRITON_INTERPRET") != "1"
