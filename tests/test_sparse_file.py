"""The sparse file: the same bits back, small, and a hostile file costs one sentence."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from coppice.errors import CoppiceError
from coppice.sparse_file import FORMAT, load_sparse, save_sparse


def bits(tensor: Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def thinned(tensor: Tensor, share: float = 0.9) -> Tensor:
    tensor[torch.rand(tensor.shape, generator=torch.Generator().manual_seed(0)) < share] = 0
    return tensor


def test_the_same_bits_come_back(tmp_path: Path) -> None:
    odd = torch.zeros(40)
    odd[:5] = torch.tensor([-0.0, float("nan"), float("inf"), 1e-45, -1.0])
    tensors = {
        "a.weight": thinned(torch.randn(16, 8, 3, 3)), "values/b": thinned(torch.randn(33, 7).half()), "c": odd,
        "d": thinned(torch.randn(9, 9).bfloat16()), "e": thinned(torch.randint(1, 5, (50,))), "f": torch.tensor(3), "g": torch.randn(4, 4),
        "h": thinned(torch.ones(64, dtype=torch.bool)), "i": thinned(torch.randn(31).double()), "j": torch.zeros(0, 3),
        "k": torch.zeros(5, 5),
        "l": thinned(torch.randn(8, 8)).t(), "m": thinned(torch.randint(-5, 5, (100,), dtype=torch.int8)),
    }  # fmt: skip
    save_sparse(tmp_path / "x", tensors)
    again = load_sparse(tmp_path / "x")
    assert again.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert (again[name].dtype, again[name].shape) == (tensor.dtype, tensor.shape)
        assert bits(again[name]) == bits(tensor)


@pytest.mark.parametrize(("share", "most"), [(0.9, 0.14), (0.5, 0.54), (0.0, 1.01)])
def test_it_is_as_small_as_promised(share: float, most: float, tmp_path: Path) -> None:
    tensor = thinned(torch.rand(256, 256) + 1, share)
    save_sparse(tmp_path / "x", {"w": tensor})
    assert (tmp_path / "x").stat().st_size < most * tensor.numel() * 4


def hostile(shapes: object, mask: Tensor, values: Tensor, name: str = "w") -> Callable[[Path], None]:
    return lambda path: save_file(
        {f"mask/{name}": mask, f"values/{name}": values}, path, metadata={"format": FORMAT, "shapes": json.dumps(shapes)}
    )


@pytest.mark.parametrize(
    ("write", "says"),
    [
        (lambda path: path.write_bytes(b"\x80\x04}."), "as safetensors"),
        (lambda path: path.write_bytes((2**62).to_bytes(8, "little") + b"{}"), "as safetensors"),
        (lambda path: save_file({"w": torch.ones(2)}, path), "is no coppice-sparse-1 file"),
        (lambda path: save_file({"w": torch.ones(2)}, path, metadata={"format": FORMAT}), "no table of shapes"),
        (lambda path: save_file({"w": torch.ones(2)}, path, metadata={"format": FORMAT, "shapes": "[" * 100_000}), "no table of shapes"),
        (lambda path: save_file({"w": torch.ones(2)}, path, metadata={"format": FORMAT, "shapes": "{}"}), "its tensors are not those"),
        (hostile({}, torch.zeros(1, dtype=torch.uint8), torch.ones(0)), "its tensors are not those"),
        (hostile({"w": [2**40, 2**40]}, torch.zeros(1, dtype=torch.uint8), torch.ones(0)), "not one bit a weight"),
        (hostile({"w": [-8]}, torch.zeros(1, dtype=torch.uint8), torch.ones(0)), "no possible shape"),
        (hostile({"w": [1] * 17}, torch.zeros(1, dtype=torch.uint8), torch.ones(0)), "no possible shape"),
        (hostile({"w": [True, 8]}, torch.zeros(1, dtype=torch.uint8), torch.ones(0)), "no possible shape"),
        (hostile({"w": []}, torch.zeros(1, dtype=torch.uint8), torch.ones(0)), "no possible shape"),
        (hostile({"w": [8]}, torch.zeros(8, dtype=torch.uint8), torch.ones(0)), "not one bit a weight"),
        (hostile({"w": [8]}, torch.zeros(1), torch.ones(0)), "not one bit a weight"),
        (hostile({"w": [8]}, torch.full((1,), 255, dtype=torch.uint8), torch.ones(9)), "more values than weights"),
        (hostile({"w": [8]}, torch.full((1,), 255, dtype=torch.uint8), torch.ones(2)), "8 weights, the file 2 values"),
        (hostile({"w": [8]}, torch.full((1,), 255, dtype=torch.uint8), torch.ones(2, 4)), "more values than weights"),
    ],
)
def test_a_hostile_file_is_one_sentence(write: Callable[[Path], None], says: str, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    write(path)
    with pytest.raises(CoppiceError, match=says) as caught:
        load_sparse(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_name_can_not_be_there_twice(tmp_path: Path) -> None:
    tensors = {"dense/w": torch.ones(2), "mask/w": torch.zeros(1, dtype=torch.uint8), "values/w": torch.ones(0)}
    save_file(tensors, tmp_path / "x", metadata={"format": FORMAT, "shapes": '{"w": [8]}'})
    with pytest.raises(CoppiceError, match="twice"):
        load_sparse(tmp_path / "x")


def test_what_would_fill_the_memory_is_refused_before_it_does(tmp_path: Path) -> None:
    save_sparse(tmp_path / "x", {"w": torch.zeros(2**20)})
    assert (tmp_path / "x").stat().st_size < 2**18
    with pytest.raises(CoppiceError, match="more than the limit of 4000000"):
        load_sparse(tmp_path / "x", limit=4_000_000)


def test_cut_short_anywhere(tmp_path: Path) -> None:
    save_sparse(tmp_path / "x", {"w": thinned(torch.randn(64, 64)), "b": torch.randn(3)})
    whole = (tmp_path / "x").read_bytes()
    for length in range(0, len(whole), 97):
        (tmp_path / "y").write_bytes(whole[:length])
        with pytest.raises(CoppiceError):
            load_sparse(tmp_path / "y")
