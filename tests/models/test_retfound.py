"""RETFound's published files: pretrained ones without a head, fine-tuned ones, at any resolution. The layout is that of its
repository (github.com/rmaphoh/RETFound_MAE: models_mae.py, models_vit.py, util/misc.py's save_model); the values are random."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.functional import interpolate

from fastretina.errors import CheckpointError, UsageError
from fastretina.models.gradcam import gradcam_layer
from fastretina.models.heads import head_layer
from fastretina.models.options import BACKBONES
from fastretina.models.position import fitted
from fastretina.models.resnet import build_model, load_initial
from fastretina.models.weights import read_weights
from fastretina.models.wrappings import backbone_names, prefixes_of

pytestmark = pytest.mark.usefixtures("one_thread")
State = dict[str, torch.Tensor]
SMALL = (("depth", 2), ("embed_dim", 32), ("num_heads", 2))


def layers(prefix: str, depth: int, width: int) -> dict[str, tuple[int, ...]]:
    """Of the blocks of a vision transformer, as timm 0.3.2 and MAE name them."""
    shapes: dict[str, tuple[int, ...]] = {}
    for number in range(depth):
        sizes = {
            "attn.qkv": (3 * width, width),
            "attn.proj": (width, width),
            "mlp.fc1": (4 * width, width),
            "mlp.fc2": (width, 4 * width),
        }
        for name, size in {"norm1": (width,), **sizes, "norm2": (width,)}.items():
            shapes |= {f"{prefix}.{number}.{name}.weight": size, f"{prefix}.{number}.{name}.bias": size[:1]}
    return shapes


def mae(depth: int, width: int) -> dict[str, tuple[int, ...]]:
    """The shapes of a pretrained file of 224 px, the decoder among them."""
    tokens, deep = 1 + (224 // 16) ** 2, 512 if width == 1024 else 16
    shapes: dict[str, tuple[int, ...]] = {"cls_token": (1, 1, width), "pos_embed": (1, tokens, width), "mask_token": (1, 1, deep)}
    shapes |= {
        "decoder_pos_embed": (1, tokens, deep),
        "patch_embed.proj.weight": (width, 3, 16, 16),
        "patch_embed.proj.bias": (width,),
    }
    shapes |= layers("blocks", depth, width) | {"norm.weight": (width,), "norm.bias": (width,)}
    shapes |= {"decoder_embed.weight": (deep, width), "decoder_embed.bias": (deep,)} | layers("decoder_blocks", 1, deep)
    shapes |= {"decoder_norm.weight": (deep,), "decoder_norm.bias": (deep,)}
    return shapes | {"decoder_pred.weight": (768, deep), "decoder_pred.bias": (768,)}


def published(model: State, folder: Path) -> Path:
    """As `save_model` leaves it."""
    about = Namespace(model="mae_vit_large_patch16", epochs=800, blr=1e-3, device="cuda", distributed=True, output_dir="./output")
    optimizer = {"state": {0: {"step": 1, "exp_avg": torch.zeros(3)}}, "param_groups": [{"lr": 1e-4, "params": [0]}]}
    path = folder / "RETFound_cfp_weights.pth"
    torch.save({"model": model, "optimizer": optimizer, "epoch": 799, "scaler": {"scale": 65536.0}, "args": about}, path)
    return path


def load(state: State, folder: Path, resolution: int = 64) -> tuple[nn.Module, str, State]:
    """The model, what was told beside the file's name, and what the model was before."""
    path = published(state, folder)
    model = build_model("retfound", 5, resolution=resolution)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    return model, load_initial(model, "retfound", path, resolution).removeprefix(str(path)).strip(" ()"), before


@pytest.fixture
def small(monkeypatch) -> State:
    """RETFound with two narrow blocks, and the values of a pretrained file for it."""
    monkeypatch.setitem(BACKBONES, "retfound", BACKBONES["retfound"]._replace(options=(("global_pool", "avg"), *SMALL)))
    torch.manual_seed(0)
    return {name: torch.randn(shape) for name, shape in mae(2, 32).items()}


def test_a_pretrained_file_is_read_and_its_positions_fit_the_resolution(small, tmp_path):
    model, note, before = load(small, tmp_path)
    assert note == (
        "unwrapped model; no head; left out: mask_token, decoder_pos_embed, norm and 4 more; "
        "position embedding interpolated from 14 × 14 to 4 × 4 patches; fc_norm begins anew"
    )
    cls, patches = small["pos_embed"].split([1, 196], dim=1)
    grid = patches.reshape(1, 14, 14, 32).permute(0, 3, 1, 2)
    resized = interpolate(grid, (4, 4), mode="bicubic", antialias=True).permute(0, 2, 3, 1).reshape(1, 16, 32)
    for name, value in model.state_dict().items():
        own = name.startswith(("fc_norm.", "head."))
        expected = torch.cat([cls, resized], dim=1) if name == "pos_embed" else before[name] if own else small[name]
        assert torch.equal(value, expected), name


def test_its_answer_is_of_the_mean_of_the_patches_tokens(small, tmp_path):
    """models_vit.py: x = x[:, 1:, :].mean(dim=1); outcome = self.fc_norm(x); then the head."""
    model, note, _ = load(small, tmp_path, 224)
    assert "interpolated" not in note
    torch.nn.init.normal_(model.fc_norm.weight)
    images = torch.randn(2, 3, 224, 224)
    with torch.no_grad():
        tokens = model.eval().patch_embed(images)
        tokens = torch.cat([model.cls_token.expand(2, -1, -1), tokens], dim=1) + model.pos_embed
        for block in model.blocks:
            tokens = block(tokens)
        assert torch.allclose(model(images), model.head(model.fc_norm(tokens[:, 1:].mean(dim=1))), atol=1e-5)


@pytest.mark.parametrize(("outputs", "note"), [(5, "unwrapped model"), (2, "unwrapped model; its head of 2 outputs left out")])
def test_a_fine_tuned_file_has_its_own_norm_and_its_head_where_it_fits(small, tmp_path, outputs, note):
    state = {name: value for name, value in small.items() if not name.startswith(("norm", "mask", "decoder"))}
    state |= {"fc_norm.weight": torch.randn(32), "fc_norm.bias": torch.randn(32)}
    state |= {"head.weight": torch.randn(outputs, 32), "head.bias": torch.randn(outputs)}
    model, told, before = load(state, tmp_path, 224)
    assert told == note
    assert torch.equal(model.fc_norm.weight, state["fc_norm.weight"])
    assert torch.equal(head_layer(model)[1].weight, state["head.weight"] if outputs == 5 else before["head.weight"])


@pytest.mark.parametrize("missing", ["blocks.1.mlp.fc2.weight", "pos_embed", "patch_embed.proj.bias"])
def test_all_else_of_the_backbone_must_be_there(small, tmp_path, missing):
    del small[missing]
    with pytest.raises(CheckpointError, match=f"not the weights of a retfound: it lacks {missing}.*timm's names of the tensors"):
        load(small, tmp_path)


def test_in_other_backbones_nothing_begins_anew(tmp_path):
    model = build_model("timm:test_vit", resolution=64)
    state = {name: value for name, value in model.state_dict().items() if not name.startswith("norm.")}
    torch.save(state, tmp_path / "without.pth")
    with pytest.raises(CheckpointError, match=r"it lacks norm\.weight and 1 more"):
        load_initial(model, "timm:test_vit", tmp_path / "without.pth")


def test_it_has_no_last_convolution_to_explain(small):
    with pytest.raises(UsageError, match="retfound has none to look at"):
        gradcam_layer("retfound", 64)


def test_the_published_shapes_are_those_of_the_network_at_512_px(tmp_path):
    """ViT-L/16 on the meta device; each tensor of the file is one number that is stored once."""
    state = {name: torch.tensor(1.0).expand(shape) for name, shape in mae(24, 1024).items()}
    with torch.device("meta"):
        model = build_model("retfound", 5, resolution=512)
    # ViT-L/16's 304,326,632 (timm's table) with a head of 5 instead of 1,000, and positions of 1,025 tokens instead of 197.
    assert sum(value.numel() for value in model.parameters()) == 304_326_632 - 995 * 1025 + 828 * 1024
    stored, notes = fitted(model, read_weights(published(state, tmp_path)), "fc_norm")
    assert notes == ["position embedding interpolated from 14 × 14 to 32 × 32 patches", "fc_norm begins anew"]
    assert prefixes_of(model, stored) == [""]
    assert all(stored.tensors[name].shape == model.state_dict()[name].shape for name in backbone_names(model))
