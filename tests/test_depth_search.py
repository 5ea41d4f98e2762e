"""Depth and width under one target, through the whole loop: where widths alone can't reach it, modules go."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import coppice
from coppice.data import load_data
from coppice.demo import digits_net
from coppice.depth_search import STEPS, Priced, carried, cheapest, saved, worthwhile
from coppice.errors import CoppiceError, UnreachableError
from coppice.latency import latency_model
from coppice.microbench import OpShape
from coppice.optable import OpTable
from coppice.preprocess import Preprocess
from coppice.recipe import Recipe
from coppice.run import check_manifest
from coppice.seeding import seeded
from coppice.timing import Setting
from coppice.torch.module_scores import MEASURES, module_scores
from coppice.torch.verify import randomise

SETTINGS = {"depth": True, "min_width": 64, "calibration": 64, "recipe": Recipe(epochs=0), "threads": 1}  # as wide as it is: no axis moves


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    with seeded(0, "depth"):
        return digits_net().eval()


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("steps", [1, 2])
def test_what_widths_can_not_reach_modules_do(model: torch.nn.Module, steps: int, tmp_path: Path) -> None:
    data, out = load_data("digits", preprocess=Preprocess()), tmp_path / "run"
    with pytest.raises(UnreachableError, match=r"or let whole modules go \(--depth\)"):
        coppice.prune(model, data, "macs=0.45", **(SETTINGS | {"depth": False}))
    result = coppice.prune(model, data, "macs=0.45", out=out, steps=steps, **SETTINGS)
    assert result.plan.modules
    assert result.met
    check_manifest(out)
    assert "Modules that went" in (out / "report.html").read_text()
    again = coppice.load(out, model=copy.deepcopy(model))
    x = torch.randn(4, 1, 8, 8)
    with torch.no_grad():
        assert torch.equal(again(x), result.model(x))
    cost = coppice.couple(coppice.capture(result.model, x[:1])).cost()
    assert cost.macs == result.metrics["pruned"]["macs"] <= 0.45 * result.metrics["dense"]["macs"]
    assert any("ONNX Runtime equals PyTorch" in line for line in result.metrics["verification"]["checks"])
    assert coppice.prune(model, data, "macs=0.45", out=out, steps=steps, **SETTINGS).plan == result.plan


@pytest.mark.usefixtures("one_thread")
def test_widths_that_a_module_does_not_touch_keep_their_scores(model: torch.nn.Module) -> None:
    x = torch.zeros(1, 1, 8, 8)
    coupling = coppice.couple(coppice.capture(model, x))
    scores = coppice.score(model, coupling, "l2")
    pruned = coppice.apply(model, coppice.remove_modules(coupling, ["residual"]))
    here = coppice.couple(coppice.capture(pruned, x))
    moved = carried(coupling, here, scores)
    assert moved is not None
    assert {a.name for a in here.prunable} < {a.name for a in coupling.prunable}
    names = {a.name: a.id for a in coupling.prunable}
    assert all((moved[a.id] == scores[names[a.name]]).all() for a in here.prunable)


@pytest.mark.usefixtures("one_thread")
def test_every_score_of_a_module_without_effect_is_the_least() -> None:
    """A block whose branch is zero changes nothing, so every measure puts it first."""
    with seeded(0, "blocks"):
        from test_modules import Residual

        model = Residual().eval()
    randomise(model)
    with torch.no_grad():
        model.blocks[1].bn2.weight.mul_(1e-4)
        model.blocks[1].bn2.bias.mul_(1e-4)
        images = [torch.randn(16, 3, 8, 8) for _ in range(4)]
        labels = [model(x).argmax(1) for x in images]
    coupling = coppice.couple(coppice.capture(model, images[0][:1]))
    candidates = [c for c in coppice.removable(coupling) if c.name in ("blocks.1", "blocks.0:residual", "blocks.0.conv2")]
    assert len(candidates) == 3
    for by in MEASURES:
        batches = list(zip(images, labels, strict=True)) if by == "taylor" else images
        found = module_scores(model, coupling, by, batches, candidates, torch.nn.functional.cross_entropy)
        first = min((name for name, value in found.items() if value is not None), key=lambda name: found[name])
        assert first == "blocks.1", by
        assert found["blocks.1"] == pytest.approx(0, abs=1e-3)
    with pytest.raises(CoppiceError, match="unknown score 'size' of modules; choose one of loss"):
        module_scores(model, coupling, "size", images)


def test_the_cheapest_set_is_that_of_trying_all(model: torch.nn.Module) -> None:
    coupling = coppice.couple(coppice.capture(model, torch.zeros(1, 1, 8, 8)))
    found = worthwhile(coupling)
    assert {c.name for c in found} == {"residual", "narrow", "wide", "join"}
    rng = np.random.default_rng(0)
    for _ in range(20):
        spans = [tuple(sorted(rng.choice(30, 2, replace=False).tolist())) for _ in range(9)]
        gains, losses = rng.uniform(0.05, 0.6, 9), rng.uniform(0, 1, 9)
        priced = [
            Priced(replace(found[0], name=str(k), span=span), float(gain), float(loss))
            for k, (span, gain, loss) in enumerate(zip(spans, gains, losses, strict=True))
        ]
        best = min((sum(p.loss for p in some) for some in _disjoint(priced) if _enough(some)), default=None)
        chosen = cheapest(priced, 1.0)
        got = None if chosen is None else sum(p.loss for p in priced if p.candidate in chosen)
        assert got == (None if best is None else pytest.approx(best))


def _disjoint(priced: list[Priced]) -> Iterator[tuple[Priced, ...]]:
    for count in range(len(priced) + 1):
        for some in itertools.combinations(priced, count):
            spans = sorted(p.candidate.span for p in some)
            if all(a[1] <= b[0] for a, b in itertools.pairwise(spans)):
                yield some


def _enough(some: tuple[Priced, ...]) -> bool:
    return sum(int(STEPS * p.gain) for p in some) >= STEPS


@pytest.mark.usefixtures("busy_machine")
def test_a_merge_saves_what_the_composed_layer_is_timed_to_take_less() -> None:
    with seeded(0, "merge"):
        model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 16)).eval()
    coupling = coppice.couple(coppice.capture(model, torch.zeros(1, 1, 8, 8)))
    (merge,) = [c for c in coppice.removable(coupling) if c.kind == "merge"]
    predictor = latency_model(coupling, Setting("onnxruntime", 1, 1), 1e-3)
    table = OpTable.of_this_machine("onnxruntime", 1)
    table.known |= {OpShape("linear", sizes).key(): seconds for sizes, seconds in (((1, 64, 16), 1e-4),)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(OpTable, "of_this_machine", lambda *_: table)
        took = sum(price.evaluate({}) for price in predictor.ops)
        scale = predictor.ops[0].scale
        assert saved(merge, coupling, predictor)["latency"] == pytest.approx(1e-3 * (1 - scale * 1e-4 / took))
