"""Depth and width under one target, through the whole loop: where widths alone can't reach it, modules go."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch

import coppice
from coppice.data import load_data
from coppice.demo import digits_net
from coppice.depth_search import carried, prefixes, worthwhile
from coppice.errors import CoppiceError, UnreachableError
from coppice.preprocess import Preprocess
from coppice.recipe import Recipe
from coppice.run import check_manifest
from coppice.seeding import seeded
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
    with pytest.raises(UnreachableError):
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


def test_prefixes_save_their_shares_and_clash_with_nothing(model: torch.nn.Module) -> None:
    coupling = coppice.couple(coppice.capture(model, torch.zeros(1, 1, 8, 8)))
    order = worthwhile(coupling)
    assert {c.name for c in order} == {"residual", "narrow", "wide", "join"}
    over = {"macs": 0.7 * coupling.cost().macs}
    found = list(prefixes(order, over, None, coupling))
    assert [len(gone) for gone in found] == sorted({len(gone) for gone in found})
    assert sum(c.macs for c in found[0]) >= over["macs"] / 3
    assert all(not {"narrow", "wide"} <= {c.name for c in gone} for gone in found)
