"""Vision models of Hugging Face `transformers`, built from small configurations: nothing is downloaded, nothing is told to coppice."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

import coppice
from coppice.allocate import smallest
from coppice.coupling import UNREAD
from coppice.testing import flat_outputs
from cutting import to_half_of_the_macs

hf = pytest.importorskip("transformers", reason="transformers is not installed (pip install 'coppice[dev]')")

pytestmark = pytest.mark.usefixtures("one_thread")


@dataclass(frozen=True)
class Given:
    """A model, the side of its images, how many prunable axes lie on which dims (ends of their names), and the reasons for its pins."""

    make: Callable[[], nn.Module]
    side: int
    prunable: Mapping[str, int]
    pins: frozenset[str] = frozenset({"model input", "model output"})


def vit() -> nn.Module:
    config = hf.ViTConfig(
        hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128, image_size=32, patch_size=8, num_labels=10
    )
    return hf.ViTForImageClassification(config)


def swin() -> nn.Module:
    config = hf.SwinConfig(image_size=64, patch_size=4, embed_dim=32, depths=[2, 2], num_heads=[2, 4], window_size=4, num_labels=10)
    return hf.SwinForImageClassification(config)


def segformer() -> nn.Module:
    config = hf.SegformerConfig(
        depths=[1, 1, 1, 1], hidden_sizes=[16, 32, 64, 96], num_attention_heads=[1, 2, 4, 4], decoder_hidden_size=64, num_labels=7
    )
    return hf.SegformerForSemanticSegmentation(config)


def detr() -> nn.Module:
    backbone = hf.ResNetConfig(
        embedding_size=16, hidden_sizes=[16, 32, 48, 64], depths=[1, 1, 1, 1], layer_type="basic", out_features=["stage4"]
    )
    config = hf.DetrConfig(
        use_timm_backbone=False, use_pretrained_backbone=False, backbone_config=backbone, backbone=None, d_model=64, encoder_layers=2,
        decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=128, decoder_ffn_dim=128, num_queries=10,
        num_labels=5,
    )  # fmt: skip
    return hf.DetrForObjectDetection(config)


def convnext() -> nn.Module:
    return hf.ConvNextForImageClassification(hf.ConvNextConfig(hidden_sizes=[16, 32, 48, 64], depths=[1, 1, 2, 1], num_labels=10))


def dinov2(gated: bool = False) -> nn.Module:
    config = hf.Dinov2Config(
        hidden_size=64, num_hidden_layers=2, num_attention_heads=4, image_size=28, patch_size=7, num_labels=10, use_swiglu_ffn=gated
    )
    return hf.Dinov2ForImageClassification(config)


def beit() -> nn.Module:
    config = hf.BeitConfig(
        hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128, image_size=32, patch_size=8, num_labels=10,
        use_relative_position_bias=True,
    )  # fmt: skip
    return hf.BeitForImageClassification(config)


def focalnet() -> nn.Module:
    return hf.FocalNetForImageClassification(hf.FocalNetConfig(image_size=64, embed_dim=16, depths=[1, 1, 1, 1], num_labels=10))


ATTENTION = {"q_proj.weight:0": 2, "v_proj.weight:0": 2, "fc1.weight:0": 1}  # heads and a head dim, and the hidden width behind them
MODELS = {
    "vit": Given(vit, 32, {"cls_token:2": 1, **ATTENTION}),
    "swin": Given(
        swin,
        64,
        {"embeddings.projection.weight:0": 1, "relative_position_bias_table:1": 1, "downsample.reduction.weight:1": 1, **ATTENTION},
        frozenset(
            {"model input", "model output", "picked from by an index tensor", "read by aten.index, whose rule says nothing about it"}
        ),
    ),
    "segformer": Given(
        segformer, 64, {"k_proj.weight:1": 1, "linear_projections.0.proj.weight:0": 1, "linear_fuse.weight:0": 1, **ATTENTION}
    ),
    "detr": Given(  # its outputs hold the decoder's hidden states; the encoder's position embedding is computed from the width
        detr,
        64,
        {"encoder_attn.q_proj.weight:0": 2, "layer.0.convolution.weight:0": 1, "bbox_predictor.layers.0.weight:0": 1, **ATTENTION},
        frozenset({"model input", "model output", "sliced with a step"}),
    ),
    "beit": Given(
        beit,
        32,
        {"cls_token:2": 1, "relative_position_bias_table:1": 1, **ATTENTION},
        frozenset({"model input", "model output", "picked from by an index tensor"}),
    ),
    "focalnet": Given(  # split((c, c, levels)): the stream and two pieces in proportion
        focalnet,
        64,
        {"embeddings.projection.weight:0": 1, "modulation.projection_in.weight:1": 1, "mlp.fc1.weight:0": 1},
    ),
    "convnext": Given(convnext, 64, {"patch_embeddings.weight:0": 1, "pwconv1.weight:0": 1}),
    "dinov2": Given(dinov2, 28, {"cls_token:2": 1, **ATTENTION}, frozenset({"model input", "model output", UNREAD})),
    "dinov2_swiglu": Given(
        lambda: dinov2(gated=True),
        28,
        {"q_proj.weight:0": 2, "gate_proj.weight:0": 1, "down_proj.weight:1": 1},
        frozenset({"model input", "model output", UNREAD}),
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_half_of_the_macs(name: str) -> None:
    torch.manual_seed(0)
    given = MODELS[name]
    model, inputs = given.make().eval(), (torch.randn(1, 3, given.side, given.side),)
    coupling = coppice.couple(coppice.capture(model, inputs))
    assert coupling.pins.keys() == given.pins
    free = Counter(f"{name}:{dim}" for axis in coupling.prunable for name, dim in axis.sites)
    for end, least in given.prunable.items():
        assert max((n for site, n in free.items() if site.endswith(end)), default=0) >= least, end

    assert smallest(coupling).macs < 0.5 * coupling.cost().macs
    pruned = to_half_of_the_macs(model, coupling)
    train_one_step(model, pruned, inputs)


def train_one_step(model: nn.Module, pruned: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    """Every parameter that the dense model's loss reaches has a finite gradient, and the step leaves finite outputs."""

    def loss(network: nn.Module) -> Tensor:
        return torch.stack([y.square().mean() for y in flat_outputs(network.train()(*inputs)) if y.requires_grad]).sum()

    loss(model).backward()
    reached = {name for name, p in model.named_parameters() if p.grad is not None}
    optimiser = torch.optim.SGD(pruned.parameters(), lr=1e-3)
    loss(pruned).backward()
    assert {name for name, p in pruned.named_parameters() if p.grad is not None and p.grad.isfinite().all()} == reached
    optimiser.step()
    with torch.no_grad():
        assert all(math.isfinite(y.double().sum().item()) for y in flat_outputs(pruned.eval()(*inputs)))
