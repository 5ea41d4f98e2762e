"""The awkward modules that users write, cut to half of their MACs, or as far as what their code freezes allows.

`tests/test_known_nets.py` prunes the same networks by random plans, trains them a step, and saves and loads them.
"""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor, nn

import coppice
from coppice.allocate import smallest
from coppice.coupling import UNREAD
from coppice.testing import flat_outputs
from coppice.torch.capture import quiet_eval
from known_nets import AWKWARD, DrawsTokens

pytestmark = pytest.mark.usefixtures("one_thread")

FROZEN = {"frozen_size_in_forward": 0.75}  # split(x, [8, 16]): what is left to cut is behind it


@pytest.mark.parametrize("name", AWKWARD)
def test_half_of_the_macs(name: str) -> None:
    torch.manual_seed(0)
    model, inputs = AWKWARD[name]()
    coupling = coppice.couple(coppice.capture(model.eval(), inputs))
    dense, part = coupling.cost(), FROZEN.get(name, 0.5)
    assert name not in FROZEN or smallest(coupling, 1, 1).macs > 0.5 * dense.macs
    plan = coppice.plan(coupling, coppice.score(model, coupling, "l2"), {"macs": part * dense.macs}, round_to=1, min_width=1)
    pruned = coppice.apply(model, plan)
    proof = coppice.verify(model, pruned, coupling, plan)
    assert proof.max_error < 1e-10
    assert type(pruned) is type(model)

    torch.stack([y.square().mean() for y in flat_outputs(pruned.train()(*inputs))]).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in pruned.parameters())
    with torch.no_grad():
        assert all(math.isfinite(y.sum().item()) for y in flat_outputs(pruned.eval()(*inputs)))


def test_the_fast_path_of_attention_reads_the_new_sizes() -> None:
    """Without gradients `nn.MultiheadAttention` runs as one fused op that is told its width and its number of heads."""
    model, inputs = AWKWARD["torch_multihead_attention"]()
    coupling = coppice.couple(coppice.capture(model.eval(), inputs))
    plan = coppice.plan(coupling, coppice.score(model, coupling, "l2"), {"macs": 0.5 * coupling.cost().macs}, round_to=2, min_width=2)
    pruned = coppice.apply(model, plan).eval()
    assert pruned.attn.embed_dim < model.attn.embed_dim
    with torch.no_grad():
        fast = pruned(*inputs)
        with torch.profiler.profile() as profile:
            pruned(*inputs)
    assert "aten::_transformer_encoder_layer_fwd" in {event.key for event in profile.key_averages()}
    with quiet_eval(pruned):
        torch.testing.assert_close(fast, pruned(*inputs), rtol=1e-4, atol=1e-5)


def test_the_models_own_flags_are_left_alone() -> None:
    model, inputs = AWKWARD["dict_outputs"]()
    model.train()
    model.stem[1].eval()
    before = copy.deepcopy(model.state_dict())
    coppice.capture(model, inputs)
    assert [m.training for m in model.modules()].count(False) == 1
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


class SpareToken(nn.Module):
    """A token that the code reads only when it is given masks."""

    def __init__(self) -> None:
        super().__init__()
        self.mask_token = nn.Parameter(torch.zeros(16))
        self.embed, self.head = nn.Linear(6, 16), nn.Linear(16, 10)

    def forward(self, x: Tensor, masks: Tensor | None = None) -> Tensor:
        x = self.embed(x)
        return self.head(x if masks is None else torch.where(masks[..., None], self.mask_token, x))


def test_what_the_forward_pass_does_not_read_is_pinned() -> None:
    model = SpareToken()
    assert coppice.couple(coppice.capture(model, torch.randn(2, 5, 6))).pins[UNREAD] == ["mask_token:0"]
    masks = torch.tensor([[True, False, True, True, False]] * 2)
    assert UNREAD not in coppice.couple(coppice.capture(model, (torch.randn(2, 5, 6), masks))).pins


def test_the_same_random_draw_reaches_both_sides_of_the_proof() -> None:
    model, inputs = DrawsTokens(), (torch.randn(2, 6, 7),)
    coupling = coppice.couple(coppice.capture(model, inputs))
    assert [a.name for a in coupling.prunable] == ["embed.weight:0", "body.weight:0"]
    plan = coppice.remove(coupling, {"embed.weight:0": range(8), "body.weight:0": range(8)})
    before = torch.random.get_rng_state()
    assert coppice.verify(model, coppice.apply(model, plan), coupling, plan).max_error < 1e-10
    assert torch.equal(torch.random.get_rng_state(), before)
