"""Networks of timm: found by name, made for the resolution, with a head, maps to look at, and checkpoints like any other."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import timm
import torch
from torch import nn

from fastretina.compare import CompareConfig, plan
from fastretina.errors import CheckpointError, UsageError
from fastretina.loading.augment import IMAGENET_MEAN, IMAGENET_STD
from fastretina.models.checkpoint import CheckpointInfo, load_checkpoint, save_checkpoint
from fastretina.models.gradcam import GradCam, gradcam_layer
from fastretina.models.heads import head_layer
from fastretina.models.options import backbone_of
from fastretina.models.precision import bf16_speedup
from fastretina.models.resnet import build_model, freeze_backbone, load_initial
from fastretina.models.timm_backbones import check_growth
from fastretina.training.compile import training_flops
from fastretina.training.config import TrainConfig, check
from fastretina.training.sync_batchnorm import synchronise_batchnorm

pytestmark = pytest.mark.usefixtures("one_thread")
# timm's own tiny ones: 0.1 to 0.4 million parameters.
CONVOLUTIONAL, TRANSFORMER = "timm:test_efficientnet", "timm:test_vit"


@pytest.fixture
def without_timm(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)


def test_a_transformer_has_a_position_for_every_patch_of_the_training_s_resolution():
    model = build_model(TRANSFORMER, 3, resolution=96)
    assert model.pos_embed.shape == (1, 1 + (96 // 16) ** 2, 64)
    assert model.eval()(torch.zeros(2, 3, 96, 96)).shape == (2, 3)
    assert build_model(TRANSFORMER).pos_embed.shape == (1, 1 + (160 // 16) ** 2, 64)  # as timm made it


@pytest.mark.parametrize(
    ("arch", "resolution", "nearest"),
    [
        (TRANSFORMER, 100, "patches of 16 px do not divide it; the nearest that fit: 96, 112"),
        (TRANSFORMER, 8, "patches of 16 px do not divide it; the nearest that fit: 16"),
        ("timm:test_maxvit", 112, "must be divisible by window.*; the nearest that fit: 96, 128"),
    ],
)
def test_a_resolution_that_cannot_be_names_the_nearest_that_can(arch, resolution, nearest):
    with pytest.raises(UsageError, match=f"^--resolution {resolution}: {arch} cannot take it: .*{nearest}$"):
        build_model(arch, resolution=resolution)


def test_growing_is_for_networks_that_take_any_side():
    check_growth("resnet18", 32, 64)
    check_growth(CONVOLUTIONAL, 64, 96)
    check_growth(TRANSFORMER, 96, 96)
    with pytest.raises(UsageError, match=r"--grow-from 64: timm:test_vit is made for one resolution"):
        check_growth(TRANSFORMER, 64, 96)


@pytest.mark.parametrize(
    ("arch", "message"),
    [
        ("timm:convnext_tny", "did you mean timm:convnext_tiny or"),
        ("timm:vit_tiny_patch16_224.augreg", r"did you mean timm:vit_tiny_patch16_224\.augreg_in21k or"),
        ("timm:hf-hub:timm/resnet18", "timm .* has no 'hf-hub:timm/resnet18'"),  # nothing is looked for on a network
        ("resnet19", "did you mean resnet18 or .*Known: .*retfound, and timm:NAME"),
        ("efficientnet_b0", "known: resnet10, .*timm:NAME"),
    ],
)
def test_unknown_names_are_refused_with_those_that_are_close(arch, message, tiny_betons):
    with pytest.raises(UsageError, match=message):
        check(TrainConfig(train=tiny_betons.train, test=tiny_betons.test, arch=arch))
    with pytest.raises(UsageError, match=message):
        plan(CompareConfig(archs=f"resnet18,{arch}"))


def test_the_tag_of_its_weights_may_stand_in_a_name():
    assert backbone_of("timm:vit_tiny_patch16_224.augreg_in21k").builder == "timm:vit_tiny_patch16_224.augreg_in21k"


def test_without_the_extra_its_networks_are_refused_and_all_else_works(without_timm):
    for arch in (TRANSFORMER, "retfound"):
        with pytest.raises(UsageError, match=r"^--arch .*: needs timm:  pip install 'fastretina\[timm\]'"):
            build_model(arch)
    assert build_model("resnet18").fc.out_features == 5


@pytest.mark.parametrize("arch", ["timm:deit_tiny_distilled_patch16_224", "timm:resnetv2_50"])
def test_a_head_that_is_not_one_linear_layer_is_refused(arch):
    with torch.device("meta"), pytest.raises(UsageError, match=f"--arch {arch}: its head is a .*one linear layer"):
        build_model(arch)


@pytest.mark.parametrize(
    ("arch", "name"), [(CONVOLUTIONAL, "classifier"), (TRANSFORMER, "head"), ("timm:test_convnext", "head.fc")]
)
def test_the_head_is_what_timm_calls_the_classifier_and_stays_free_where_the_backbone_is_frozen(arch, name):
    model = build_model(arch, 4, resolution=64)
    found, head = head_layer(model)
    assert (found, head) == (name, model.get_classifier())
    assert head.out_features == 4
    assert not hasattr(model, "conv_stem") or model.conv_stem.weight.is_contiguous(memory_format=torch.channels_last)
    freeze_backbone(model.train(), True)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    model(torch.randn(2, 3, 64, 64)).sum().backward()
    assert {key for key, value in model.named_parameters() if value.grad is not None} == {f"{name}.weight", f"{name}.bias"}
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())  # BatchNorm's counts, too


@pytest.mark.parametrize(
    ("arch", "layer"), [(CONVOLUTIONAL, "bn2"), ("timm:test_convnext", "norm_pre"), ("timm:test_resnet", "layer4")]
)
def test_maps_are_those_of_the_last_features_before_the_pooling(arch, layer):
    torch.manual_seed(0)
    model, images = build_model(arch, resolution=64).eval(), torch.randn(2, 3, 64, 64)
    assert gradcam_layer(arch, 64) == layer
    with torch.no_grad():
        features, answers = model.forward_features(images), model(images)
    # The gradient of a logit with respect to the features, by timm's own way through its head.
    leaf = features.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(model.forward_head(leaf)[:, 1].sum(), leaf)
    expected = (gradient.mean(dim=(2, 3), keepdim=True) * features).sum(dim=1).relu()
    cam = GradCam(model, layer)
    assert torch.allclose(cam(images), answers, atol=1e-6)
    (heat,) = cam.heat(lambda outputs: outputs[:, 1])
    assert torch.allclose(heat, expected, atol=1e-6)


def test_the_layer_of_torchvision_s_networks_is_known():
    assert gradcam_layer("resnet18", 512) == "layer4"


@pytest.mark.parametrize("arch", [TRANSFORMER, "timm:swin_tiny_patch4_window7_224"])
def test_a_network_without_a_last_convolution_is_not_explained(arch):
    with pytest.raises(UsageError, match=f"^--explain: Grad-CAM weighs the maps of a last convolution, and {arch} has none"):
        gradcam_layer(arch, 64)


def test_the_trial_of_bfloat16_sees_the_side_that_a_transformer_is_made_for():
    assert bf16_speedup(build_model(TRANSFORMER, resolution=160), (2, 3, 160, 160)) > 0


def test_the_attention_is_counted_among_the_operations_of_training():
    model = build_model(TRANSFORMER, resolution=64)
    tokens, width, blocks = 17, 64, 6
    linear = (
        2 * tokens * (4 + 2 * 3) * width**2 * blocks
    )  # of a block: query, key, value and projection; an MLP of 3 times the width
    attention = 2 * 2 * tokens**2 * width * blocks
    patches = 2 * 16 * 16 * 16 * 3 * width  # whose input needs no gradient
    assert training_flops(model, 64) == pytest.approx(3 * (linear + attention) + 2 * patches, rel=0.001)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_synchronised_batchnorm_keeps_the_activation_that_timm_puts_into_it(device):
    model, images = build_model(CONVOLUTIONAL).eval(), torch.randn(2, 3, 32, 32)
    expected = model(images)
    converted = synchronise_batchnorm(model, torch.device(device))
    assert not any(type(module) is nn.BatchNorm2d or "BatchNormAct2d" in str(type(module)) for module in converted.modules())
    assert torch.equal(converted.eval()(images), expected)


def test_a_synchronised_batchnorm_of_one_rank_trains_as_timm_s_own(monkeypatch):
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda tensor: None)
    model, images = build_model(CONVOLUTIONAL).train(), torch.randn(4, 3, 32, 32)
    expected = model(images)
    assert torch.allclose(synchronise_batchnorm(model, torch.device("cpu")).train()(images), expected, atol=1e-3)


def saved(path: Path, arch: str, resolution: int) -> nn.Module:
    torch.manual_seed(1)
    model = build_model(arch, 5, resolution=resolution).eval()
    save_checkpoint(path, model, CheckpointInfo(arch, 5, resolution, IMAGENET_MEAN, IMAGENET_STD, 1, "float32", "qwk", "test"))
    return model


@pytest.mark.parametrize("arch", [CONVOLUTIONAL, TRANSFORMER])
def test_a_checkpoint_comes_back_at_its_resolution(arch, tmp_path):
    model, images = saved(tmp_path / "best.safetensors", arch, 96), torch.randn(2, 3, 96, 96)
    loaded, info = load_checkpoint(tmp_path / "best.safetensors")
    assert info.arch == arch
    with torch.no_grad():
        assert torch.equal(loaded(images), model(images))


def test_a_checkpoint_without_the_extra_says_what_to_install(tmp_path, request):
    path = tmp_path / "best.safetensors"
    saved(path, TRANSFORMER, 64)
    request.getfixturevalue("without_timm")
    with pytest.raises(CheckpointError, match=r"best\.safetensors: .*pip install 'fastretina\[timm\]'"):
        load_checkpoint(path)


def test_weights_of_another_resolution_have_their_positions_interpolated(tmp_path):
    before = saved(tmp_path / "small.safetensors", TRANSFORMER, 64)
    model = build_model(TRANSFORMER, 5, resolution=128)
    note = load_initial(model, TRANSFORMER, tmp_path / "small.safetensors", 128)
    assert note == f"{tmp_path / 'small.safetensors'} (position embedding interpolated from 4 × 4 to 8 × 8 patches)"
    # timm's own way to another side, whose result a model of timm computes with.
    before.set_input_size((128, 128))
    assert all(torch.equal(value, before.state_dict()[name]) for name, value in model.state_dict().items())
    torch.save(before.state_dict() | {"pos_embed": torch.zeros(1, 17, 96)}, tmp_path / "wider.pth")
    with pytest.raises(CheckpointError, match=r"pos_embed has shape \(1, 17, 96\), the model needs \(1, 65, 64\)"):
        load_initial(model, TRANSFORMER, tmp_path / "wider.pth", 128)


def test_timm_s_own_weights_are_fetched_by_timm_and_said_so(monkeypatch):
    torch.manual_seed(2)
    donor = timm.create_model("test_vit", img_size=96)
    real = timm.create_model

    def fetched(name, pretrained=False, **options):
        return donor if pretrained and options == {"img_size": 96} else real(name, **options)

    monkeypatch.setattr(timm, "create_model", fetched)
    model = build_model(TRANSFORMER, 5, resolution=96)
    assert load_initial(model, TRANSFORMER, "pretrained", 96) == "timm's test_vit.r160_in1k (its head of 1000 outputs left out)"
    assert torch.equal(model.blocks[3].mlp.fc1.weight, donor.blocks[3].mlp.fc1.weight)


def test_weights_that_cannot_be_had_are_an_error_not_a_start_from_scratch(monkeypatch):
    real = timm.create_model

    def unreachable(name, pretrained=False, **options):
        if pretrained:
            raise OSError("no network\nmore")
        return real(name, **options)

    monkeypatch.setattr(timm, "create_model", unreachable)
    with pytest.raises(CheckpointError, match=r"none for timm:test_vit \(no network\); fetch them elsewhere"):
        build_model(TRANSFORMER, weights="pretrained")
    with pytest.raises(UsageError, match=r"--weights IMAGENET1K_V1: not a .* file, nor 'pretrained', which are what timm:test_vit"):
        build_model(TRANSFORMER, weights="IMAGENET1K_V1")
    with pytest.raises(UsageError, match=r"--weights pretrained: not a .* file, which are what retfound may start from"):
        load_initial(build_model(TRANSFORMER), "retfound", "pretrained")


def test_folders_of_a_comparison_hold_no_colon():
    runs = plan(CompareConfig(archs=f"resnet18,{TRANSFORMER}", weights=f"none,{TRANSFORMER}=runs/{{arch}}/best.safetensors"))
    assert [run.name for run in runs] == ["resnet18-scratch", "timm-test_vit-scratch", "timm-test_vit-best"]
    assert runs[-1].config.weights == "runs/timm-test_vit/best.safetensors"
