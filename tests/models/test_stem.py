"""A ResNet's stem as a GPU likes it: torch's numbers, gradients and parameters. Here on a GPU, or with Triton's interpreter."""

from __future__ import annotations

import copy

import pytest
import torch
from devices import DEVICES
from torch import nn

from fastretina.models import stem
from fastretina.models.resnet import build_model

SIDES = [(32, 24), (33, 30), (6, 9), (1, 1), (2, 2)]
# Few rows, each of which the interpreter makes by itself; of 64 channels, more than a program's block in the widest.
POOLED = [(4, 36), (5, 6), (6, 9), (1, 1), (2, 2)]


@pytest.fixture(params=DEVICES)
def device(request, monkeypatch):
    if request.param == "cpu":  # with the interpreter it can do what it leaves to torch otherwise
        monkeypatch.setattr(stem, "_suits", lambda images: images.is_contiguous(memory_format=torch.channels_last))
    return request.param


def channels_last(*shape, device, dtype=torch.float32, values=None):
    images = torch.randn(shape, dtype=torch.float64) if values is None else torch.randint(-values, values, shape)
    return images.to(device=device, dtype=dtype).contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("sides", SIDES)
def test_the_convolution_of_blocks_is_that_of_pixels(device, sides):
    torch.manual_seed(0)
    images = channels_last(2, 3, *sides, device=device, dtype=torch.float64)
    plain = nn.Conv2d(3, 8, 7, 2, 3, bias=False, device=device, dtype=torch.float64)
    expected, found = plain(images), stem.space_to_depth_convolution(images, plain.weight)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    upstream = torch.randn_like(expected)
    (expected,), (found,) = (torch.autograd.grad(answer, plain.weight, upstream) for answer in (expected, found))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("channels", [64, 5])
@pytest.mark.parametrize("sides", POOLED)
def test_the_pooling_is_torchs_and_of_equals_the_first_gets_the_gradient(device, sides, channels, dtype):
    torch.manual_seed(0)
    images = channels_last(2, channels, *sides, device=device, dtype=dtype, values=3).requires_grad_()  # many equals
    expected, (found, _) = nn.functional.max_pool2d(images, 3, 2, 1), stem.max_pool(images)
    assert torch.equal(found, expected)
    upstream = channels_last(*expected.shape, device=device, dtype=dtype)
    (gradient,) = torch.autograd.grad(found, images, upstream)
    twin = images.detach().double().requires_grad_()
    (exact,) = torch.autograd.grad(nn.functional.max_pool2d(twin, 3, 2, 1), twin, upstream.double())
    # Summed in float32 and rounded once; the interpreter cuts bfloat16's digits off.
    torch.testing.assert_close(gradient.double(), exact, rtol=torch.finfo(dtype).eps, atol=1e-6)


def test_what_is_no_number_and_what_is_infinite_is_pooled_as_torch_does(device):
    images = channels_last(1, 4, 12, 12, device=device)
    images[0, 0, 3:9, 3] = float("nan")
    images[0, 1] = float("-inf")
    images[0, 2, 5] = float("inf")
    images.requires_grad_()
    on_cpu = images.detach().cpu().requires_grad_()  # on CUDA torch gives the gradient of windows of minus infinity elsewhere
    expected, (found, _) = nn.functional.max_pool2d(on_cpu, 3, 2, 1), stem.max_pool(images)
    assert torch.equal(found.cpu().nan_to_num(7.0), expected.nan_to_num(7.0))
    upstream = torch.arange(expected.numel(), dtype=torch.float32).view(expected.shape)
    (expected,) = torch.autograd.grad(expected, on_cpu, upstream)
    (found,) = torch.autograd.grad(found, images, upstream.to(device))
    assert torch.equal(found.cpu(), expected)


def test_torch_finds_the_pooling_well_registered(device):
    images = channels_last(1, 4, 6, 6, device=device).requires_grad_()
    # How it compiles is the next test's affair.
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(stem.max_pool, (images,), test_utils=checks)
    backward = channels_last(1, 4, 3, 3, device=device), stem.max_pool(images)[1], 6, 6
    torch.library.opcheck(stem.max_pool_backward, backward, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("compiled", [False, True])
def test_a_resnet_learns_the_same_with_it(device, compiled, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)  # it would round to ten bits, in another way for each shape
    torch.manual_seed(0)
    plain = build_model("resnet10").to(device)
    quicker = copy.deepcopy(plain)
    stem.accelerate_stem(quicker)
    assert isinstance(quicker.conv1, stem.SpaceToDepthConvolution)
    assert isinstance(quicker.maxpool, stem.HalvingMaxPool)
    assert quicker.state_dict().keys() == plain.state_dict().keys()
    images, labels = channels_last(3, 3, 64, 64, device=device), torch.tensor([0, 3, 4], device=device)
    # The graph whole, as StepForward would have it compiled; inductor takes minutes on a CPU.
    forward = torch.compile(quicker, dynamic=False, fullgraph=True, backend="aot_eager") if compiled else quicker
    losses = []
    for model in (plain, forward):
        loss = nn.functional.cross_entropy(model(images), labels)
        loss.backward()
        losses.append(loss.item())
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    for (name, one), other in zip(plain.named_parameters(), quicker.parameters(), strict=True):
        # The order of sums is another: seven digits of each, through eight layers of BatchNorm.
        assert (one.grad - other.grad).norm() <= 2e-3 * one.grad.norm(), name
    with torch.no_grad():
        torch.testing.assert_close(quicker.eval()(images), plain.eval()(images), rtol=1e-3, atol=1e-4)


def test_only_the_stem_of_a_torchvision_resnet_is_replaced():
    model = build_model("resnet50")
    weight = model.conv1.weight
    stem.accelerate_stem(model)
    assert model.conv1.weight is weight
    stem.accelerate_stem(model)  # again changes nothing
    assert model.conv1.weight is weight
    other = nn.Module()
    other.conv1 = nn.Conv2d(3, 8, 3, 2, 1, bias=False)
    other.maxpool = nn.MaxPool2d(2, 2)
    kept = other.conv1, other.maxpool
    stem.accelerate_stem(other)
    assert (other.conv1, other.maxpool) == kept
    images = torch.randn(1, 3, 32, 32).contiguous(memory_format=torch.channels_last)
    with torch.no_grad():  # on a CPU it is what it was
        assert torch.equal(model.eval().conv1(images), nn.functional.conv2d(images, weight, stride=2, padding=3))
