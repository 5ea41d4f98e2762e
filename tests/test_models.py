"""Models by name, weights by file, and one clear sentence for what can't be loaded."""

import os
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from coppice.errors import CoppiceError
from coppice.models import load_model, load_weights, read_state

FACTORIES = """
from dataclasses import dataclass
from torch import nn
from neighbour import WIDTH

@dataclass
class Setting:
    width: int = WIDTH

def net(num_classes=4):
    width = Setting().width
    return nn.Sequential(nn.Conv2d(3, width, 3), nn.BatchNorm2d(width), nn.Flatten(), nn.Linear(width, num_classes))

def fixed():
    return nn.Linear(3, 7)

def broken():
    raise ValueError("no such width\\nsecond line")

def number():
    return 3
"""


@pytest.fixture
def model_file(tmp_path: Path) -> Path:
    (tmp_path / "neighbour.py").write_text("WIDTH = 5\n")
    path = tmp_path / "nets.py"
    path.write_text(FACTORIES)
    return path


def sentence(error: pytest.ExceptionInfo[CoppiceError]) -> str:
    text = str(error.value)
    assert "\n" not in text
    return text


def test_a_factory_in_a_users_file_is_called(model_file):
    model = load_model(f"{model_file}:net")
    assert model[3].out_features == 4
    assert model[0].out_channels == 5  # imported from the file's neighbour


def test_num_classes_goes_to_factories_that_take_it(model_file):
    assert load_model(f"{model_file}:net", num_classes=9)[3].out_features == 9
    assert load_model(f"{model_file}:fixed", num_classes=9).out_features == 7


def test_a_users_file_leaves_the_import_path_alone(model_file):
    import sys

    before = list(sys.path)
    load_model(f"{model_file}:net")
    assert sys.path == before
    assert "nets" not in sys.modules


def test_a_changed_file_is_executed_anew(model_file):
    assert load_model(f"{model_file}:fixed").out_features == 7
    model_file.write_text(FACTORIES.replace("nn.Linear(3, 7)", "nn.Linear(3, 8)"))
    assert load_model(f"{model_file}:fixed").out_features == 8


def test_torchvision_and_timm_models():
    assert load_model("torchvision:resnet18", num_classes=10).fc.out_features == 10
    assert load_model("timm:resnet18", num_classes=10).fc.out_features == 10


def test_torchvision_googlenet_is_built_without_a_warning():
    assert load_model("torchvision:googlenet").fc.out_features == 1000


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("resnet18", "names no model"),
        ("caffe:resnet18", "neither a .py file nor torchvision nor timm"),
        ("torchvision:resnet19", "did you mean resnet18"),
        ("torchvision:fasterrcnn_resnet50_fpn", "no classification model"),
        ("timm:resnet19", "did you mean resnet18"),
        ("timm:hf-hub:someone/something", "neither"),
        ("missing.py:net", "there is no model file missing.py"),
    ],
)
def test_an_unknown_model_is_one_sentence(spec, words):
    with pytest.raises(CoppiceError) as error:
        load_model(spec)
    assert words in sentence(error)


@pytest.mark.parametrize(
    ("factory", "words"),
    [
        ("nett", "did you mean net"),
        ("broken", "could not be built: ValueError: no such width"),
        ("number", "returned a int, not a torch.nn.Module"),
    ],
)
def test_a_bad_factory_is_one_sentence(model_file, factory, words):
    with pytest.raises(CoppiceError) as error:
        load_model(f"{model_file}:{factory}")
    assert words in sentence(error)


@pytest.mark.parametrize(
    ("code", "words"),
    [("1 / 0", "ZeroDivisionError: division by zero"), ("raise SystemExit(3)", "SystemExit: 3"), ("def (", "SyntaxError")],
)
def test_a_file_that_cannot_be_imported_is_one_sentence(tmp_path, code, words):
    path = tmp_path / "bad.py"
    path.write_text(code)
    with pytest.raises(CoppiceError) as error:
        load_model(f"{path}:net")
    assert "could not be imported" in sentence(error)
    assert words in sentence(error)


@pytest.mark.parametrize(
    "wrap",
    [lambda s: s, lambda s: {"state_dict": s, "epoch": 3}, lambda s: {"model": s}, lambda s: {f"module.{k}": v for k, v in s.items()}],
)
def test_pth_state_dicts_as_people_save_them(tmp_path, wrap):
    saved, model = nn.Linear(3, 2), nn.Linear(3, 2)
    torch.save(wrap(saved.state_dict()), tmp_path / "w.pth")
    load_weights(model, tmp_path / "w.pth")
    assert torch.equal(model.weight, saved.weight)


def test_safetensors(tmp_path):
    saved, model = nn.Linear(3, 2), nn.Linear(3, 2)
    save_file(saved.state_dict(), tmp_path / "w.safetensors")
    load_weights(model, tmp_path / "w.safetensors")
    assert torch.equal(model.weight, saved.weight)


class _Runs:
    """Unpickled with pickle, it creates the file it names."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (os.mkdir, (str(self.path),))


@pytest.mark.parametrize("plain_pickle", [True, False])
def test_a_pickle_that_would_run_code_is_refused_and_does_not_run(tmp_path, plain_pickle):
    trace, path = tmp_path / "it_ran", tmp_path / "evil.pth"
    if plain_pickle:
        path.write_bytes(pickle.dumps({"weight": _Runs(trace)}, protocol=2))
    else:
        torch.save({"weight": _Runs(trace)}, path)
    with pytest.raises(CoppiceError) as error:
        read_state(path)
    assert "was refused and nothing in it was run" in sentence(error)
    assert not trace.exists()
    torch.load(path, weights_only=False) if not plain_pickle else pickle.loads(path.read_bytes())
    assert trace.exists()  # the file is as dangerous as it should be


def test_a_whole_pickled_model_is_refused(tmp_path):
    torch.save(nn.Linear(2, 2), tmp_path / "m.pth")
    with pytest.raises(CoppiceError, match="save model"):
        read_state(tmp_path / "m.pth")


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("keep", [0, 5, 0.5])
def test_truncated_weights(tmp_path, suffix, keep):
    path = tmp_path / f"w{suffix}"
    state = nn.Linear(30, 20).state_dict()
    torch.save(state, path) if suffix == ".pth" else save_file(state, path)
    content = path.read_bytes()
    path.write_bytes(content[: keep if isinstance(keep, int) else int(keep * len(content))])
    with pytest.raises(CoppiceError) as error:
        read_state(path)
    assert "truncated or" in sentence(error)
    assert str(path) in sentence(error)


def test_weights_that_are_no_file_or_of_no_known_kind(tmp_path):
    with pytest.raises(CoppiceError, match="there is no weights file"):
        read_state(tmp_path / "none.safetensors")
    (tmp_path / "w.h5").write_bytes(b"x")
    with pytest.raises(CoppiceError, match=r"neither \.safetensors nor \.pth"):
        read_state(tmp_path / "w.h5")
    (tmp_path / "w.safetensors").write_text("weights, honestly")
    with pytest.raises(CoppiceError, match="not a safetensors file"):
        read_state(tmp_path / "w.safetensors")


@pytest.mark.parametrize("content", [[1, 2], {"a": 3}, {}])
def test_a_pth_without_a_state_dict(tmp_path, content):
    torch.save(content, tmp_path / "w.pth")
    with pytest.raises(CoppiceError, match="holds no"):
        read_state(tmp_path / "w.pth")


def test_weights_of_another_model_are_described_and_not_loaded(tmp_path):
    other = nn.Sequential(*(nn.Linear(3, 3) for _ in range(4)))
    model = nn.Sequential(nn.Linear(3, 2))
    before = model[0].weight.clone()
    save_file(other.state_dict(), tmp_path / "w.safetensors")
    with pytest.raises(CoppiceError) as error:
        load_weights(model, tmp_path / "w.safetensors")
    text = sentence(error)
    assert "unexpected 1.bias, 1.weight, 2.bias and 3 more" in text
    assert "mis-shaped 0.weight is 3x3, the model's is 2x3, 0.bias is 3, the model's is 2" in text
    assert torch.equal(model[0].weight, before)


def test_missing_weights_are_named(tmp_path):
    save_file({"0.weight": torch.zeros(2, 3)}, tmp_path / "w.safetensors")
    with pytest.raises(CoppiceError, match=r"missing 0\.bias"):
        load_weights(nn.Sequential(nn.Linear(3, 2)), tmp_path / "w.safetensors")


def test_one_parameter_under_two_names_may_be_saved_once(tmp_path):
    model = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False))
    model[1].weight = model[0].weight
    save_file({"0.weight": torch.ones(3, 3)}, tmp_path / "w.safetensors")
    load_weights(model, tmp_path / "w.safetensors")
    assert torch.equal(model[1].weight, torch.ones(3, 3))


def test_batch_counters_may_be_missing(tmp_path):
    state = {name: value for name, value in nn.BatchNorm2d(3).state_dict().items() if name != "num_batches_tracked"}
    save_file(state, tmp_path / "w.safetensors")
    load_weights(nn.BatchNorm2d(3), tmp_path / "w.safetensors")


def test_the_shared_weights_fit_the_shared_models(shared):
    for factory, weights in [
        ("resnet20", "resnet20_cifar10"),
        ("resnet56", "resnet56_cifar10"),
        ("mobilenet_v1_075", "mobilenet_v1_075_imagenette"),
        ("mobilenet_v2", "mobilenet_v2_imagenette"),
    ]:
        path = shared / "data" / "weights" / f"{weights}.safetensors"
        model = load_model(f"{shared / 'models.py'}:{factory}", path)
        state = read_state(path)
        assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items() if name in state)
