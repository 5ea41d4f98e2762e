"""The configuration and its file: everything comes back, nothing unknown is swallowed."""

from dataclasses import replace
from pathlib import Path

import pytest

from coppice.config import RunConfig, dump_config, load_config
from coppice.errors import CoppiceError
from coppice.machine import cpu_model, usable_cores
from coppice.preprocess import Preprocess
from coppice.recipe import Recipe
from coppice.targets import parse_target

FULL = RunConfig(
    model="torchvision:resnet18", weights="w.safetensors", num_classes=10, data="digits", splits={"train": "training"},
    val_fraction=0.2, input=(1, 3, 32, 32), preprocess=Preprocess(32, 36, (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)),
    target=parse_target("macs=0.5,bytes=5MB"), max_drop=1.5, criterion="l2", allocation="uniform", round_to=4, min_width=2, steps=3,
    rounds=1, trials=7, calibration=64, recipe=Recipe(epochs=5, optimizer="adamw", lr=1e-3, distill=0.5), seed=7, threads=2,
)  # fmt: skip


@pytest.mark.parametrize("config", [RunConfig(), FULL], ids=["defaults", "everything"])
def test_the_file_gives_the_same_settings_back(config: RunConfig, tmp_path: Path) -> None:
    path = tmp_path / "config.toml"
    path.write_text(dump_config(config), encoding="utf-8")
    again, records = load_config(path)
    assert again == config
    assert {"coppice", "python", "numpy", "torch"} <= records["versions"].keys()
    assert records["machine"]["threads"] == config.threads
    assert records["machine"]["cores"] >= 1


def test_fingerprints_follow_the_files(tmp_path: Path) -> None:
    model, weights = tmp_path / "m.py", tmp_path / "w.safetensors"
    model.write_text("x = 1")
    weights.write_bytes(b"one")
    config = RunConfig(model=f"{model}:f", weights=str(weights))
    before = config.fingerprints()
    weights.write_bytes(b"two")
    after = config.fingerprints()
    assert before["model"] == after["model"]
    assert before["weights"] != after["weights"]
    assert RunConfig(model="torchvision:resnet18").fingerprints() == {}


def test_absolute_settles_paths_and_threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pictures").mkdir()
    config = RunConfig(model="nets/m.py:f", weights="w.pth", data="pictures").absolute()
    assert config.model == f"{tmp_path / 'nets' / 'm.py'}:f"
    assert config.weights == str(tmp_path / "w.pth")
    assert config.data == str(tmp_path / "pictures")
    assert config.threads == usable_cores()
    named = RunConfig(model="timm:resnet18", data="digits").absolute()
    assert (named.model, named.data) == ("timm:resnet18", "digits")
    assert config.absolute() == config


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("nonsense", "as TOML"),
        ("colour = 'red'", "unknown setting colour"),
        ("[recipe]\nspeed = 3", "unknown setting recipe.speed"),
        ("[target]\nmacs = '1.5'", "between 0 and 1"),
        ("[preprocess]\nshear = 1", "shear"),
        ("steps = 0", "--steps 0"),
        ("steps = 'many'", "steps"),
        ("input = 3", "input"),
        ("\x00", "as TOML"),
    ],
)
def test_a_bad_file_is_refused(text: str, says: str, tmp_path: Path) -> None:
    path = tmp_path / "config.toml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(CoppiceError, match=says) as caught:
        load_config(path)
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CoppiceError, match="no configuration"):
        load_config(tmp_path / "config.toml")


@pytest.mark.parametrize(
    "wrong",
    [
        {"val_fraction": 0.0}, {"val_fraction": 1.0}, {"max_drop": -1.0}, {"criterion": "magic"}, {"allocation": "fair"}, {"round_to": 0},
        {"min_width": 0}, {"rounds": 0}, {"trials": 0}, {"calibration": 0}, {"input": (1, 0, 3, 3)}, {"seed": -1}, {"threads": -1},
        {"num_classes": -1},
    ],
    ids=str,
)  # fmt: skip
def test_settings_out_of_bounds_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(CoppiceError, match=f"--{next(iter(wrong)).replace('_', '-')}"):
        replace(RunConfig(), **wrong)


def test_the_processor_has_a_name() -> None:
    assert cpu_model()
