"""MACs count attention wherever it hides: in one fused kernel, in `nn.MultiheadAttention`, in an encoder layer's fast path, in `einsum`."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torchvision.models import vit_b_16

import coppice

TOKENS, WIDTH = 197, 768
VIT_B_16 = 12 * (12 * TOKENS * WIDTH**2 + 2 * TOKENS**2 * WIDTH) + 196 * WIDTH * 16 * 16 * 3 + WIDTH * 1000  # 17.564 G, as published


def macs(model: nn.Module, x: Tensor) -> int:
    return coppice.couple(replace(coppice.capture(model.eval(), x), origin=None)).cost().macs


@pytest.mark.parametrize("make", [vit_b_16, lambda: timm.create_model("vit_base_patch16_224")], ids=["torchvision", "timm"])
def test_vit_b_16_is_17_6_gmacs(make: Callable[[], nn.Module]) -> None:
    with torch.device("meta"):  # shapes are enough
        assert macs(make(), torch.empty(1, 3, 224, 224)) == VIT_B_16


class Attention(nn.Module):
    """Four ways to the same attention: PyTorch's module, its function, two products, two `einsum`."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way = way
        self.module = nn.MultiheadAttention(32, 4, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        if self.way.startswith("module"):
            return self.module(x, x, x, need_weights=self.way == "module with weights")[0]
        q, k, v = F.linear(x, self.module.in_proj_weight, self.module.in_proj_bias).unflatten(2, (3, 4, 8)).permute(2, 0, 3, 1, 4)
        if self.way == "function":
            y = F.scaled_dot_product_attention(q, k, v)
        elif self.way == "products":
            y = (q @ k.transpose(2, 3)).softmax(-1) @ v
        else:
            y = torch.einsum("bhqk,bhkd->bhqd", torch.einsum("bhqd,bhkd->bhqk", q, k).softmax(-1), v)
        return self.module.out_proj(y.transpose(1, 2).flatten(2))


@pytest.mark.parametrize("way", ["module", "module with weights", "function", "products", "einsum"])
@pytest.mark.parametrize("backend", [None, SDPBackend.MATH, SDPBackend.FLASH_ATTENTION])
def test_every_way_to_attention_costs_the_same(way: str, backend: SDPBackend | None) -> None:
    with sdpa_kernel(backend) if backend is not None else nullcontext():
        assert macs(Attention(way), torch.randn(3, 10, 32)) == 3 * (10 * 32 * 32 * 4 + 2 * 10 * 10 * 32)  # three dims: one sample


def test_the_fast_path_of_an_encoder() -> None:
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True, activation="gelu")
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    assert torch.backends.mha.get_fastpath_enabled()
    assert macs(model, torch.randn(1, 10, 32)) == 2 * (10 * 32 * 32 * 4 + 2 * 10 * 10 * 32 + 2 * 10 * 32 * 64)
    assert torch.backends.mha.get_fastpath_enabled()
