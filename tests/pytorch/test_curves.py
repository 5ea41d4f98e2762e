"""Sensitivity: every point against a model that is cut, refitted and judged by hand."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import coppice
from coppice.allocate import bundles_on_grid
from coppice.coupling import Coupling
from coppice.criteria import score
from coppice.curves import Sensitivity, sensitivity
from coppice.curves_report import render, write
from coppice.elimination import removal_paths
from coppice.errors import CoppiceError
from coppice.torch.elimination import divergence, drawn, refitter
from coppice.torch.linear import Recorded
from test_report import checked


def net() -> nn.Sequential:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 8, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(8, 4)).eval()


def batches(count: int = 8) -> list[tuple[Tensor, Tensor]]:
    torch.manual_seed(1)
    return [(torch.randn(16, 3, 8, 8), torch.randint(0, 4, (16,))) for _ in range(count)]


def coupled(model: nn.Module) -> Coupling:
    return coppice.couple(coppice.capture(model, torch.randn(1, 3, 8, 8)))


def found(model: nn.Module, **options: object) -> Sensitivity:
    coupling = coupled(model)
    given = {"round_to": 1, "min_width": 1, "judge": batches()[:2]} | options
    return sensitivity(model, coupling, score(model, coupling, "l1"), batches(), **given)  # type: ignore[arg-type]


def test_a_point_is_the_model_that_is_cut_by_hand() -> None:
    model, judge = net(), batches()[:2]
    coupling, scores = coupled(model), score(model, coupled(model), "l1")
    result = found(model, repair=False)
    labels = torch.cat([y for _, y in judge])
    with torch.no_grad():
        dense = torch.cat([model(x) for x, _ in judge])
        for curve in result.curves:
            axis = coupling.axis(curve.axis)
            order = np.argsort(scores[axis.id], kind="stable")
            assert [point.width for point in curve.points] == [axis.width * k // 4 for k in (3, 2, 1)]
            for point in curve.points:
                small = coppice.apply(model, coppice.remove(coupling, {axis.name: order[: axis.width - point.width].tolist()}))
                outputs = torch.cat([small(x) for x, _ in judge])
                assert point.loss == pytest.approx(divergence(outputs, dense), rel=1e-5)
                change = (outputs.argmax(1) == labels).double().mean() - (dense.argmax(1) == labels).double().mean()
                assert point.top1 == pytest.approx(100 * float(change))
                macs = coppice.couple(coppice.capture(small, torch.randn(1, 3, 8, 8))).cost().macs
                assert point.saved == pytest.approx(1 - macs / coupling.cost().macs)


def test_a_refit_of_what_reads_the_axis_brings_the_outputs_nearer() -> None:
    bare, mended = (found(net(), repair=repair) for repair in (False, True))
    by_axis = {curve.axis: curve for curve in bare.curves}
    for curve in mended.curves:
        for before, after in zip(by_axis[curve.axis].points, curve.points, strict=True):
            assert after.loss < before.loss


def test_the_refit_is_that_of_the_removal_path() -> None:
    model, inputs = net(), [x for x, _ in batches()]
    coupling = coppice.couple(coppice.capture(model, inputs[0]))
    paths = removal_paths(Recorded(model, inputs), coupling, drawn(0))
    refits = refitter(model, coupling, inputs)
    for axis in coupling.prunable:
        for level, edits in paths[axis.id].edits.items():
            keep = np.ones(axis.width, bool)
            keep[paths[axis.id].order[:level]] = False
            refitted = refits.refitted({axis.name: keep})
            assert refitted.keys() == edits.keys()
            for name, value in edits.items():
                np.testing.assert_allclose(refitted[name], value, rtol=1e-4, atol=1e-5)


class Attention(nn.Module):
    """Its heads' width is tied to the embedding's."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(6, 32)
        self.block = nn.TransformerEncoderLayer(32, 4, 48, batch_first=True)
        self.head = nn.Linear(32, 3)

    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = self.head(self.block(self.embed(x)).mean(1))
        return scores


def test_what_is_tied_narrows_together_and_where_an_op_mixes_the_cut_model_counts() -> None:
    torch.manual_seed(0)
    model, images = Attention().eval(), [(torch.randn(4, 5, 6),) for _ in range(4)]
    coupling = coppice.couple(coppice.capture(model, images[0][0]))
    for repair in (True, False):
        result = sensitivity(model, coupling, score(model, coupling, "l1"), images, round_to=1, min_width=1, repair=repair)
        tied = next(curve for curve in result.curves if curve.tied)
        assert len(tied.tied) == len(next(b for b in bundles_on_grid(coupling, 1, 1) if len(b.axes) > 1).axes) - 1
        assert all(point.loss > 0 and point.top1 is None for curve in result.curves for point in curve.points)
        assert result.top1 is None


def test_those_that_give_most_come_first_and_the_model_stays_as_it_was() -> None:
    model = net().train()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    told: list[tuple[int, int | None]] = []
    result = found(model, progress=lambda done, total: told.append((done, total)))
    gives = [curve.gives(result.limit) for curve in result.curves]
    assert gives == sorted(gives, reverse=True)
    assert gives[0] > 0
    assert told == [(k + 1, 6) for k in range(6)]
    assert model.training
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert found(model, limit=0.0).curves[0].gives(0.0) == 0
    assert found(model, judge=None).images == 32


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"round_to": 64, "min_width": 64}, "no axis can be cut"),
        ({"judge": []}, "no images"),
        ({"parts": (1.5,)}, "between 0 and 1"),
        ({"judge": [(torch.full((2, 3, 8, 8), torch.nan),)]}, "not finite"),
    ],
)
def test_what_is_wrong_is_said(options: dict[str, object], says: str) -> None:
    with pytest.raises(CoppiceError, match=says):
        found(net(), **options)


def test_the_page_and_the_pictures(tmp_path: Path) -> None:
    result = found(net())
    html = render(result, "<b>net</b>")
    assert checked(html).fetched == []
    assert "<b>net" not in html
    for curve in result.curves:
        assert curve.axis in html
    assert f"{result.limit:.3g}" in html
    for name in ("a.html", "a.svg", "a.png"):
        write(result, tmp_path / name, "net")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    assert "#010203" not in (tmp_path / "a.svg").read_text()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.html", "a.png", "a.svg"]
