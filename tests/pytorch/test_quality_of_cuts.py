"""What must be an axis of its own is one, and nothing holds it: over-coupling is a defect, if one that no verification shows."""

from __future__ import annotations

import pytest
import timm
import torch
from torch import nn
from torchvision import models as zoo
from torchvision.models.swin_transformer import SwinTransformer
from torchvision.ops import SqueezeExcitation

import coppice
from coppice.coupling import Coupling
from coppice.inspection import prunable_share

pytestmark = pytest.mark.usefixtures("one_thread")


def coupled(model: nn.Module, side: int = 32) -> Coupling:
    return coppice.couple(coppice.capture(model.eval(), torch.randn(1, 3, side, side)))


def free(coupling: Coupling, tensor: str, dim: int) -> list[int]:
    """The widths of the axes on a dim, which all can be cut, and by themselves."""
    axes = coupling.on(tensor, dim)
    assert [a.pinned for a in axes] == [None] * len(axes)
    assert not any(coupling.tied_to(a) for a in axes)
    return [a.width for a in axes]


def sites(coupling: Coupling, name: str) -> set[str]:
    return {f"{tensor}:{dim}" for tensor, dim in coupling.axis(name).sites}


def test_squeeze_and_excite() -> None:
    model = nn.Sequential(nn.Conv2d(3, 32, 1), SqueezeExcitation(32, 8), nn.Conv2d(32, 16, 1), nn.AdaptiveAvgPool2d(1))
    coupling = coupled(model)
    assert sites(coupling, "1.fc1.weight:0") == {"1.fc1.weight:0", "1.fc1.bias:0", "1.fc2.weight:1"}
    assert {"0.weight:0", "1.fc1.weight:1", "1.fc2.weight:0", "2.weight:1"} <= sites(coupling, "0.weight:0")
    assert free(coupling, "1.fc1.weight", 0) == [8]
    assert free(coupling, "0.weight", 0) == [32]


def test_groups_and_what_they_hold() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 16, 1), nn.Conv2d(16, 24, 3, groups=4), nn.ReLU(), nn.Conv2d(24, 8, 1), nn.Flatten(), nn.Linear(7200, 5)
    )
    coupling = coupled(model)
    assert free(coupling, "1.weight", 0) == [4, 6]  # groups, and what each gives
    assert free(coupling, "0.weight", 0) == [4, 4]  # the same groups, and what each takes
    assert coupling.on("1.weight", 0)[0] is coupling.on("0.weight", 0)[0]


def test_branches_of_a_concat() -> None:
    coupling = coupled(zoo.DenseNet(8, (2, 2), 16, num_classes=5))
    first = "features.denseblock1.denselayer"
    assert free(coupling, "features.transition1.conv.weight", 1) == [16, 8, 8]
    assert coupling.axis(f"{first}1.conv2.weight:0") is not coupling.axis(f"{first}2.conv2.weight:0")


def test_window_attention_and_patch_merging() -> None:
    coupling = coupled(SwinTransformer([4, 4], 16, [2, 2], [2, 4], [4, 4], num_classes=5), 64)
    attention = "features.1.0.attn"
    stream, heads, values = coupling.axis("features.0.0.weight:0"), *coupling.on(f"{attention}.proj.weight", 1)
    assert f"{attention}.relative_position_bias_table:1" in sites(coupling, heads.name)
    assert stream in coupling.tied_to(values)  # the code divides the stream by the number of heads
    assert stream.pinned is values.pinned is coupling.axis("features.2.reduction.weight:0").pinned is None
    assert {"features.2.reduction.weight:1", "features.2.norm.weight:0"} <= sites(coupling, "features.0.0.weight:0")
    assert free(coupling, "features.1.0.mlp.0.weight", 0) == [64]
    assert prunable_share(coupling) > 0.98


def test_fused_projection_of_a_vit() -> None:
    coupling = coupled(timm.create_model("vit_tiny_patch16_224", depth=1, img_size=32))
    heads, keys, values = coupling.on("blocks.0.attn.qkv.weight", 0)
    assert (heads.width, keys.width, values.width) == (3, 64, 64)
    assert heads.pinned is keys.pinned is values.pinned is None
    assert coupling.tied_to(values) == [keys]
    assert coupling.on("blocks.0.attn.proj.weight", 1) == [heads, values]
    assert free(coupling, "blocks.0.mlp.fc1.weight", 0) == [768]
    assert {"cls_token:2", "pos_embed:2"} <= sites(coupling, "cls_token:2")
    assert coupling.pins.keys() == {"model input", "model output"}
