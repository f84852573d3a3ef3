"""AMP is used where the hardware has it, and the user is told where it does not."""

from __future__ import annotations

import pytest
import torch

from fastretina.errors import UsageError
from fastretina.models import precision
from fastretina.models.precision import bf16_speedup, choose_device, choose_precision, cpu_bf16_instructions, device_name
from fastretina.models.resnet import build_model

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def test_without_amp_everything_is_float32():
    chosen = choose_precision(False, CPU)
    assert (chosen.dtype, chosen.name) == (None, "float32")
    with chosen.autocast():
        assert torch.nn.functional.linear(torch.ones(1, 2), torch.ones(1, 2)).dtype is torch.float32


@pytest.mark.parametrize(
    ("found", "instructions"),
    [
        ({"amx_bf16": True, "avx512_bf16": True}, "AMX-BF16"),
        ({"avx512_bf16": True}, "AVX512-BF16"),
        ({"avx2": True, "avx512_bf16": False}, None),
    ],
)
def test_a_cpu_trains_in_bfloat16_only_with_instructions_for_it(monkeypatch, found, instructions):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: found, raising=False)
    assert cpu_bf16_instructions() == instructions
    chosen = choose_precision(True, CPU)
    assert chosen.dtype is (torch.bfloat16 if instructions else None)
    assert (instructions or "no effect") in chosen.note
    assert "\n" not in chosen.note


@pytest.mark.parametrize(("ratio", "dtype"), [(1.8, torch.bfloat16), (0.36, None)])
def test_a_cpu_with_the_instructions_trains_in_bfloat16_only_where_that_is_faster(monkeypatch, ratio, dtype):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True}, raising=False)
    chosen = choose_precision(True, CPU, speedup=lambda: ratio)
    assert chosen.dtype is dtype
    assert f"{ratio:.1f} times as fast" in chosen.note
    for began in (torch.bfloat16, None):  # a run that goes on
        again = choose_precision(True, CPU, speedup=lambda: ratio, began=precision.Precision("cpu", began, "").name)
        assert again.dtype is began
    assert choose_precision(True, CPU, "bfloat16", speedup=lambda: ratio).dtype is torch.bfloat16


def test_the_trial_measures_both_formats_and_leaves_no_trace(monkeypatch):
    computed = []
    real = precision.Precision.autocast
    monkeypatch.setattr(precision.Precision, "autocast", lambda self: computed.append(self.name) or real(self))
    model = build_model("resnet18", 5, None)
    before, random = {name: tensor.clone() for name, tensor in model.state_dict().items()}, torch.get_rng_state()
    assert bf16_speedup(model, (1, 3, 16, 16)) > 0  # of one image, too, which BatchNorm alone would refuse
    assert computed == ["float32", "bfloat16"] * (1 + precision.TRIAL_ROUNDS)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.equal(torch.get_rng_state(), random)


def test_a_torch_that_cannot_tell_means_float32(monkeypatch):
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    assert choose_precision(True, CPU).dtype is None


@pytest.mark.parametrize(("has_bf16", "dtype"), [(True, torch.bfloat16), (False, torch.float16)])
def test_a_gpu_trains_in_bfloat16_or_else_in_scaled_float16(monkeypatch, has_bf16, dtype):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: has_bf16 or including_emulation)
    assert choose_precision(True, CUDA).dtype is dtype


def test_only_float16_scales_gradients():
    assert not precision.Precision("cpu", torch.bfloat16, "").scaler().is_enabled()
    assert not precision.Precision("cpu", None, "").scaler().is_enabled()
    assert precision.Precision("cpu", torch.float16, "").scaler().is_enabled()


def test_autocast_computes_in_the_chosen_format():
    with precision.Precision("cpu", torch.bfloat16, "").autocast():
        assert torch.nn.functional.linear(torch.ones(1, 2), torch.ones(1, 2)).dtype is torch.bfloat16


def test_asking_for_an_absent_gpu_is_a_usage_error(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_device("auto") == CPU
    with pytest.raises(UsageError, match="--device cuda"):
        choose_device("cuda")


def test_the_device_has_a_name_that_a_person_would_use():
    assert "thread" in device_name(CPU)
