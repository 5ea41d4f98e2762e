"""What several tests do: cut a model at random and prove it right."""

from __future__ import annotations

import math
from typing import Any

import keras
import numpy as np

import coppice
from coppice.coupling import Coupling
from coppice.planning import Plan, make_plan

layers = keras.layers


def random_plan(coupling: Coupling, rng: np.random.Generator) -> Plan:
    """Every axis that can be cut loses something, what is tied together in proportion."""
    by_atom = {axis.atom: axis for axis in coupling.prunable}
    keep = {}
    for bundle in coupling.bundles():
        axes = [by_atom[atom] for atom in bundle]
        whole = math.gcd(*(axis.width for axis in axes))
        level = int(rng.integers(1, whole)) if whole > 1 else 1
        for axis in axes:
            mask = np.zeros(axis.width, bool)
            mask[rng.permutation(axis.width)[: axis.width // whole * level]] = True
            keep[axis.id] = mask
    return make_plan(coupling, keep)


def proven(model: Any, *shapes: tuple[int, ...], seed: int = 0) -> tuple[Any, Coupling, Plan]:
    """The model cut at random, verified; its cost is what the polynomials say."""
    coupling = coppice.couple(coppice.capture(model, list(shapes)))
    plan = random_plan(coupling, np.random.default_rng(seed))
    pruned = coppice.apply(model, plan)
    proof = coppice.verify(model, pruned, coupling, plan)
    exact = "float64" in proof.checked[-1] and not any(op.rule == "attention_heads" for op in coupling.graph.ops)
    assert proof.max_error < (1e-9 if exact else 1e-5)
    kept = {axis.id: len(entry.keep) for entry in plan.axes for axis in coupling.prunable if axis.name == entry.name}
    assert coppice.couple(coppice.capture(pruned, list(shapes))).cost() == coupling.cost(kept)
    return pruned, coupling, plan
