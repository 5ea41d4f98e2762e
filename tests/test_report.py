"""The report: one file, nothing fetched, nothing unescaped, every number where it belongs."""

import copy
import re
import warnings
from html.parser import HTMLParser
from typing import Any

import pytest

from coppice.report import AxisWidth, _steps_picture, render_report, table_rows

SIDE = {"top1": 90.0, "top5": 99.0, "loss": 0.3, "n": 1000, "top1_ci95": [88.0, 91.7], "per_class": [91.0, 89.0, None]}
METRICS: dict[str, Any] = {
    "dense": {
        **SIDE, "macs": 40_000_000, "params": 270_000, "bytes": 1_080_000,
        "val": {"top1": 91.0, "top5": 99.1, "loss": 0.2, "n": 500},
    },
    "pruned": {
        **SIDE, "top1": 88.5, "per_class": [86.0, 91.0, None], "macs": 20_000_000, "params": 130_000, "bytes": 520_000,
        "val": {"top1": 89.9, "top5": 99.0, "loss": 0.3, "n": 500},
    },
    "target": {"macs": "0.5", "max_drop": 2.0},
    "drop": {"val": 1.1, "test": 1.5},
    "met": True,
    "verified": True,
    "statement": "MACs 40 M → 20 M.",
    "verification": {"checks": ["cut 1: shapes as planned", "ONNX Runtime equals PyTorch"], "max_error": 1e-15},
    "history": [
        {"stage": "dense", "macs": 40_000_000, "params": 270_000, "bytes": 1, "epochs": 0, "val_top1": 91.0, "seconds": 1.0,
         "repair": None, "training": [], "optimizer": "", "taken": True},
        {
            "stage": "cut 1", "macs": 20_000_000, "params": 130_000, "bytes": 1, "epochs": 0, "val_top1": 70.0, "seconds": 1.0,
            "training": [], "optimizer": "", "taken": True,
            "repair": {
                "criterion": "obs", "tried": [["as cut", 9.5], ["layers refitted", 0.644]], "kept": "layers refitted", "refitted": 9,
                "refused": "<two models out of step>",
            },
        },
        {"stage": "tuned 1", "macs": 20_000_000, "params": 130_000, "bytes": 1, "epochs": 3, "val_top1": 89.9, "seconds": 1.0,
         "repair": None, "optimizer": "SGD at 0.005", "taken": False, "training": [
             {"epoch": 1, "train_loss": 0.887, "val_top1": 85.96, "val_loss": 0.471, "lr": 0.02, "seconds": 41.0},
             {"epoch": 2, "train_loss": 0.556, "val_top1": 89.28, "val_loss": 0.402, "lr": 0.003, "seconds": 42.0},
         ]},
    ],
    "classes": ["aeroplane", "<script>alert(1)</script>", "unseen"],
    "input": [1, 3, 32, 32],
    "modules": {"layer1.2": "residual"}, "notes": [],
    "latency": None,
    "masks": None,
    "int8": None,
    "regularised": None,
    "seconds": 61.0,
}  # fmt: skip
WIDTHS = [AxisWidth("layer1.0.conv1.weight:0", 16, 8), AxisWidth("conv1.weight:0", 16, 16)]
PINS = {"model output": ["linear.weight:0"], "no rule for <aten::odd>": [f"p{k}.weight:0" for k in range(15)]}


def page(**changes: Any) -> str:
    given: dict[str, Any] = {
        "title": "resnet20",
        "metrics": METRICS,
        "widths": WIDTHS,
        "pins": PINS,
        "config": 'criterion = "taylor"\n',
    } | changes
    return render_report(**given)


class Checker(HTMLParser):
    """Collects tags, ids and anything that would be fetched; complains about a tag that is not closed."""

    VOID = frozenset({"meta", "br", "img", "link", "hr"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.fetched: list[str] = []
        self.tags: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        if tag not in self.VOID:
            self.open.append(tag)
        for name, value in attrs:
            if name == "id":
                self.ids.append(value or "")
            if name in ("src", "href", "xlink:href", "data", "srcset") and not (value or "").startswith("#"):
                self.fetched.append(f"{tag} {name}={value}")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def checked(html: str) -> Checker:
    checker = Checker()
    checker.feed(html)
    assert checker.open == []
    return checker


def test_it_says_how_a_training_was_done_and_that_it_was_not_taken() -> None:
    assert "3, SGD at 0.005; made it worse: not taken" in page()


def test_it_is_one_static_file() -> None:
    html = page()
    found = checked(html)
    assert found.fetched == []
    assert not found.tags & {"script", "link", "img", "iframe", "object"}
    assert not re.search(r"@import|url\((?!#)", html)
    assert len(found.ids) == len(set(found.ids)), "ids of the pictures collide"
    assert html.count("<svg") == 4
    assert set(re.findall(r'(?:url\(|href=")#([^)"]+)', html)) <= set(found.ids)


def test_names_from_outside_are_escaped() -> None:
    html = page(title="<b>bold</b>")
    assert "<script>" not in html
    assert "<b>" not in html
    assert "&lt;script&gt;" in html
    assert "&lt;aten::odd&gt;" in html


def test_the_numbers_are_there() -> None:
    html = page()
    for text in (
        "target met",
        "90.00 %",
        "88.50 %",
        "−1.50 points",
        "40 M",
        "20 M",
        "× 0.500",
        "88.00 – 91.70",
        "layer1.0.conv1.weight:0",
        "criterion = ",
        "shapes as planned",
        "<strong>layers refitted</strong>",
        "0.644",
        "&lt;two models out of step&gt;",
    ):
        assert text in html, text
    assert "and 3 more" in html


def test_each_epoch_is_there_and_without_training_there_is_no_such_part() -> None:
    html = page()
    for text in ("epoch by epoch", "0.887", "0.471", "85.96 %", "0.003"):
        assert text in html, text
    untrained = copy.deepcopy(METRICS)
    untrained["history"] = untrained["history"][:2]
    assert "epoch by epoch" not in page(metrics=untrained)


def test_a_latency_has_its_own_section() -> None:
    assert "Latency</h2>" not in page()
    timed = copy.deepcopy(METRICS)
    timing = {"p50": 0.0043, "p90": 0.0045, "p99": 0.0051, "throughput": 232.0, "memory": None}
    timed["latency"] = {
        "setting": {"runtime": "openvino", "threads": 2, "batch": 1}, "speedup": 1.61, "interval": [1.58, 1.64], "dense": 0.0043,
        "predicted": 0.0027, "measured": 0.00267, "tried": [[0.0026, 0.0028], [0.0027, 0.00267]], "grid": 16, "unexplained": 0.08,
        "timings": {"dense": timing, "pruned": {**timing, "memory": 12_000_000}},
        "layers": [["<conv1>", 0.002, 0.001], ["the rest", 0.0004, 0.0003]],
    }  # fmt: skip
    timed["history"][0]["latency"], timed["history"][2]["latency"] = 0.0043, 0.00267
    html = page(metrics=timed)
    checked(html)
    for text in ("1.610 times as fast", "1.580 and 1.640", "2.6 ms", "measured 2.67 ms", "12 MB", "&lt;conv1&gt;", "explain 92 %"):
        assert text in html, text


def test_a_missed_target_is_said() -> None:
    missed = copy.deepcopy(METRICS) | {"met": False, "notes": ["There is no model.onnx: not supported."]}
    html = page(metrics=missed)
    assert "target not met" in html
    assert "There is no model.onnx" in html


def test_colours_follow_the_theme() -> None:
    html = page()
    assert "prefers-color-scheme: dark" in html
    assert "currentColor" in html
    assert "var(--accent)" in html
    assert not re.search(r"#0[147a]0[258b]0[369c]", html), "a stand-in colour was left"


@pytest.mark.parametrize("count", [1, 48, 200])
def test_any_number_of_axes_and_no_pins(count: int) -> None:
    widths = [AxisWidth(f"layer{k}.weight:0", 64, 64 - k % 32) for k in range(count)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        html = page(widths=widths, pins={})
    checked(html)
    assert "Nothing." in html


def test_the_table_has_one_row_a_quantity() -> None:
    assert [row[0] for row in table_rows(METRICS)] == ["top-1, test", "top-5, test", "top-1, validation", "MACs", "parameters", "bytes"]
    assert table_rows(METRICS)[3] == ("MACs", "40 M", "20 M", "× 0.500")


def test_the_same_run_gives_the_same_page() -> None:
    assert page() == page()


def test_steps_on_one_point_share_a_label() -> None:
    """A training whose result was not taken lies where the cut before it does."""
    metrics = copy.deepcopy(METRICS)
    metrics["history"][2]["val_top1"] = metrics["history"][1]["val_top1"]
    labels = [text.get_text() for text in _steps_picture(metrics).axes[0].texts]
    assert labels == ["dense", "cut 1, tuned 1", "floor"]
