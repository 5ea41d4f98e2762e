"""Networks that nobody drew, pruned by plans that nobody chose: the pruned one must equal its oracle every time."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from coppice.testing import check_pruning, flat_outputs
from coppice.testing.networks import random_network

# A seed says nothing about the networks next to it, so only the size is worth shrinking. Derandomised: CI repeats what failed here.
SEEDS = st.integers(0, 2**31 - 1)
SIZES = st.integers(2, 8)
GENERATED = settings(
    deadline=None, derandomize=True, database=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture]
)


pytestmark = pytest.mark.usefixtures("one_thread")  # these tensors are too small to share out


@settings(GENERATED, max_examples=400)
@given(seed=SEEDS, size=SIZES)
def test_pruned_equals_oracle(seed: int, size: int) -> None:
    check_pruning(seed, size)


@settings(GENERATED, max_examples=150)
@given(seed=SEEDS, size=SIZES)
def test_pruned_equals_dense_with_zeros(seed: int, size: int) -> None:
    """No op mixes the channels here, so the dense model itself is the oracle, with nothing of coppice's own in it."""
    check_pruning(seed, size, mixing=False)


@settings(GENERATED, max_examples=50)
@given(seed=SEEDS)
def test_generator_is_deterministic_and_its_networks_train(seed: int) -> None:
    state = torch.get_rng_state()
    model, inputs = random_network(seed)
    again, same_inputs = random_network(seed)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(map(torch.equal, inputs, same_inputs))
    for made, wanted in zip(flat_outputs(model(*inputs)), flat_outputs(again(*inputs)), strict=True):
        assert torch.equal(made, wanted)
        assert made.isfinite().all()
    sum(y.square().sum() for y in flat_outputs(model.train()(*inputs))).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert all(p.abs().min() > 0 for p in model.parameters())
