"""The known traps and the awkward modules of users: each pruned at random, verified, trained a step, saved and loaded."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import coppice
from coppice.testing import check_model, flat_outputs, random_plan
from coppice.torch.apply import build
from known_nets import AWKWARD, TRAPS

NETS = {**TRAPS, **AWKWARD}
# How many axes may be cut at least: a net that gets pinned more than it must be fails here. Where few can be cut, the comment says why.
PRUNABLE = {
    "concat_pool_flatten": 2,
    "pixel_shuffle_between_convs": 2,
    "sum_below_product": 2,
    "concat_inside_each_head": 2,  # not the heads: their number stands in the code
    "channel_shuffle_of_odd_width": 3,
    "channel_shuffle_of_even_width": 3,
    "batch_norm_bias_through_sigmoid_and_exp": 2,
    "default_attention_scale_fused": 5,
    "default_attention_scale_matmul": 3,
    "size_one_broadcast": 1,
    "dims_of_equal_size": 2,
    "module_called_many_times": 2,
    "one_head_on_two_branches": 2,
    "parameter_under_two_names": 2,
    "position_embedding": 5,  # the heads can't go: the code divides the width by their number
    "group_conv_after_concat_aligned": 3,
    "group_conv_after_concat_across": 3,
    "depthwise_conv_after_concat": 2,
    "self_concat": 2,
    "zero_channel_padding_shortcut": 5,
    "parameter_shared_across_groups": 1,  # not the groups: their number stands in the code
    "ops_that_mix_the_channels": 3,
    "skip_around_a_norm": 1,
    "roll_flip_and_gather": 1,  # the first convolution's channels are reordered
    "batch_norm_after_flatten": 1,
    "parameter_used_twice": 2,
    "module_called_twice": 1,
    "frozen_size_in_forward": 1,  # split(x, [8, 16])
    "view_to_512": 2,  # not what is flattened to 512
    "einops_rearrange": 4,
    "torch_multihead_attention": 4,
    "weight_and_spectral_norm": 3,
    "buffers_of_masks": 2,
    "dict_outputs": 2,
    "nested_list_of_inputs": 1,
    "anchors_kept_between_passes": 2,
    "learned_query": 3,
    "split_by_what_was_read": 1,
    "three_numbers_in_one_view": 3,  # not the heads, whose number the code divides by
}


def test_every_net_has_its_least() -> None:
    assert PRUNABLE.keys() == NETS.keys()


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("name", NETS)
def test_random_plans(name: str) -> None:
    checked = [check_model(*NETS[name](), seed) for seed in range(2)]
    assert checked[0].prunable >= PRUNABLE[name], checked[0].pins
    assert max(c.cut for c in checked) > 0


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("name", ["parameter_under_two_names", "weight_and_spectral_norm", "torch_multihead_attention"])
def test_saved_and_loaded(name: str, tmp_path: Path) -> None:
    model, inputs = NETS[name]()
    plan = random_plan(coppice.couple(coppice.capture(model, inputs)), 0)
    pruned = coppice.apply(model, plan)
    first = {id(tensor): key for key, tensor in reversed(pruned.state_dict(keep_vars=True).items())}
    save_file({key: pruned.state_dict()[key].contiguous() for key in first.values()}, tmp_path / "model.safetensors")
    again = build(NETS[name]()[0], coppice.Plan.from_json(plan.to_json()), load_file(tmp_path / "model.safetensors"))
    with torch.no_grad():
        assert all(map(torch.equal, flat_outputs(again(*inputs)), flat_outputs(pruned(*inputs))))


@pytest.mark.usefixtures("one_thread")
def test_a_frozen_size_is_pinned_with_its_place() -> None:
    coupling = coppice.couple(coppice.capture(*NETS["frozen_size_in_forward"]()))
    assert coupling.pins["its size is frozen in the code of FrozenSize"] == ["conv.weight:0", "conv.weight:0.2"]
