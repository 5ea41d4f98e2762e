"""Targets: what is understood, what is refused, and what a fraction comes to."""

import pytest

from coppice.cost import Cost
from coppice.errors import CoppiceError
from coppice.targets import humanise, parse_target
from coppice.timing import Setting

DENSE = Cost(macs=4_000_000_000, params=25_000_000, bytes=100_000_000, latency=0.02)


@pytest.mark.parametrize(
    ("text", "budgets"),
    [
        ("macs=0.5", {"macs": 2e9}),
        ("macs=.25", {"macs": 1e9}),
        ("macs=2.0G", {"macs": 2e9}),
        ("macs=300M", {"macs": 3e8}),
        ("MACs = 300 MMACs", {"macs": 3e8}),
        ("params=2.0M", {"params": 2e6}),
        ("params=900k", {"params": 9e5}),
        ("bytes=5MB", {"bytes": 5e6}),
        ("bytes=1.5MiB", {"bytes": 1.5 * 2**20}),
        ("bytes=4096B", {"bytes": 4096}),
        ("macs=0.5,params=2.0M,bytes=5MB", {"macs": 2e9, "params": 2e6, "bytes": 5e6}),
        ("macs=1e-1", {"macs": 4e8}),
        ("latency=0.5@onnxruntime", {"latency": 0.01}),
        ("latency=4ms@openvino:threads=2:batch=8,macs=0.5", {"latency": 0.004, "macs": 2e9}),
        ("latency=900us@torch", {"latency": 9e-4}),
    ],
)
def test_resolves(text: str, budgets: dict[str, float]) -> None:
    assert parse_target(text).resolve(DENSE) == pytest.approx(budgets)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("macs=1.5", "between 0 and 1"),
        ("macs=1", "between 0 and 1"),
        ("macs=0", "zero"),
        ("macs=0.0G", "zero"),
        ("macs=-0.5", "no size"),
        ("macs=nan", "no size"),
        ("macs=inf", "no size"),
        ("macs=half", "no size"),
        ("macs=", "no size"),
        ("macs=5MB", "no size"),
        ("params=5MiB", "no size"),
        ("macs", "KEY=VALUE"),
        ("", "KEY=VALUE"),
        ("flops=0.5", "KEY=VALUE"),
        ("macs=0.5,", "KEY=VALUE"),
        ("macs=0.5,macs=0.6", "twice"),
        ("latency=0.5", "say where"),
        ("latency=0.5@", "say where"),
        ("latency=4MB@torch", "no size"),
        ("latency=1.5@torch", "between 0 and 1"),
        ("latency=0.5@abacus", "no runtime 'abacus'"),
        ("latency=0.5@torch:cores=2", "say where"),
        ("latency=0.5@torch:threads=0", "say where"),
        ("latency=0.5@torch:threads", "say where"),
        ("macs=0.5@torch", "no size"),
    ],
)
def test_refuses(text: str, says: str) -> None:
    with pytest.raises(CoppiceError, match=says) as caught:
        parse_target(text)
    assert "\n" not in str(caught.value)


def test_several_strings_and_a_mapping_are_the_same_target() -> None:
    assert parse_target(["macs=0.5", "params=2M"]) == parse_target("macs=0.5,params=2M") == parse_target({"macs": 0.5, "params": "2M"})


def test_a_repeated_target_round_trips_through_its_text() -> None:
    target = parse_target("bytes=1.5MiB,macs=0.5,latency=4ms@openvino:threads=2")
    assert parse_target(target.to_dict()) == target
    assert str(target) == "bytes=1.5MiB, macs=0.5, latency=4ms@openvino:threads=2"
    assert target.setting == Setting("openvino", 2, 1)
    assert parse_target("macs=0.5").setting is None


def test_an_absolute_that_is_met_already_is_refused() -> None:
    with pytest.raises(CoppiceError, match=r"4 G and meets it already"):
        parse_target("macs=4G").resolve(DENSE)
    with pytest.raises(CoppiceError, match=r"20 ms and meets it already"):
        parse_target("latency=21ms@torch").resolve(DENSE)


@pytest.mark.parametrize(
    ("count", "key", "text"),
    [
        (40_810_000, "macs", "40.8 M"),
        (999_999, "params", "1 M"),
        (999_400, "params", "999 k"),
        (12, "params", "12"),
        (1_081_000, "bytes", "1.08 MB"),
        (7, "bytes", "7 B"),
        (0.00431, "latency", "4.31 ms"),
    ],
)
def test_humanise(count: float, key: str, text: str) -> None:
    assert humanise(count, key) == text
