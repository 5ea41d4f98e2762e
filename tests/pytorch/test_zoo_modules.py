"""Modules that can go from real architectures, with no hints: each kind is found where it must be, and one of each is removed and verified.

Weights are random and images small; blocks are fewer where that takes none of the kinds away.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torchvision import models as zoo
from torchvision.models.convnext import CNBlockConfig, ConvNeXt
from torchvision.models.densenet import DenseNet
from torchvision.models.resnet import Bottleneck, ResNet
from torchvision.models.vision_transformer import VisionTransformer

import coppice


def convnext() -> nn.Module:
    return ConvNeXt([CNBlockConfig(32, 48, 1), CNBlockConfig(48, 64, 2), CNBlockConfig(64, None, 1)], num_classes=10)


def vit() -> nn.Module:
    return VisionTransformer(image_size=32, patch_size=16, num_layers=2, num_heads=4, hidden_dim=64, mlp_dim=128, num_classes=10)


Made = tuple[Callable[[], nn.Module], int, dict[str, str]]
"""How it is made, the side of its image, and for each kind a module of that kind."""
MODELS: dict[str, Made] = {
    "resnet50": (
        lambda: ResNet(Bottleneck, [2, 2, 1, 1], num_classes=10),
        32,
        {"residual": "layer1.1", "layer": "layer1.0.conv2", "pool": "maxpool", "merge": "layer1.1.conv2+conv3"},
    ),
    "convnext_tiny": (convnext, 32, {"residual": "features.3.1", "layer": "features.1.0.block", "merge": "features.1.0.block.3+5"}),
    "vit_b_16": (
        vit,
        32,
        {
            "attention": "encoder.layers.encoder_layer_1:attention",
            "mlp": "encoder.layers.encoder_layer_0:mlp",
            "layer": "encoder.layers.encoder_layer_1",
            "merge": "encoder.layers.encoder_layer_0.mlp.0+3",
        },
    ),
    "densenet121": (
        lambda: DenseNet(16, (3, 3), 32, num_classes=10),
        32,
        {
            "branch": "features.denseblock1.denselayer2",
            "pool": "features.transition1.pool",
            "layer": "features.denseblock1.denselayer3.conv1",
        },
    ),
    "efficientnet_b0": (
        lambda: zoo.efficientnet_b0(num_classes=10),
        32,
        {
            "residual": "features.3.1",
            "gate": "features.1.0.block.1",
            "layer": "features.3.1.block.1",
            "merge": "features.7.0.block.3.0+8.0",
        },
    ),
    "inception_v3": (
        lambda: zoo.inception_v3(num_classes=10, init_weights=False),
        128,
        {"branch": "Mixed_5b.branch1x1", "merge": "Conv2d_3b_1x1.conv+Conv2d_4a_3x3.conv"},
    ),
    "squeezenet1_1": (lambda: zoo.squeezenet1_1(num_classes=10), 64, {"branch": "features.3.expand1x1_activation", "layer": "features.4"}),
    "mobilenet_v3": (lambda: zoo.mobilenet_v3_small(num_classes=10), 32, {"gate": "features.1.block.1", "residual": "features.3"}),
}


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("name", MODELS)
def test_one_of_each_kind(name: str) -> None:
    make, side, wanted = MODELS[name]
    torch.manual_seed(0)
    model, x = make().eval(), torch.randn(1, 3, side, side)
    coupling = coppice.couple(coppice.capture(model, x))
    found = {candidate.name: candidate for candidate in coppice.removable(coupling)}
    for kind, module in wanted.items():
        assert found[module].kind == kind
        plan = coppice.remove_modules(coupling, [module])
        pruned = coppice.apply(model, plan)
        assert coppice.verify(model, pruned, coupling, plan).max_error < 1e-10
        cost = coppice.couple(coppice.capture(pruned, x)).cost()
        assert coupling.cost().macs - cost.macs == found[module].macs
        assert coupling.cost().params - cost.params == found[module].params
