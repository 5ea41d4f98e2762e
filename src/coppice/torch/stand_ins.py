"""What stands in for a module that is gone or shortened: one that passes on what it is given, answers a constant, or is a part of it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from coppice.removals import Edit
from coppice.torch.composing import composed


class Pass(nn.Module):
    """Passes on one of its arguments, in a tuple where ``returns`` says so: at each place where it is true, None elsewhere."""

    def __init__(self, argument: int, returns: list[bool] | None) -> None:
        super().__init__()
        self.argument, self.returns = argument, returns

    def forward(self, *args: Any, **_: Any) -> Any:
        given = args[self.argument]
        return given if self.returns is None else tuple(given if filled else None for filled in self.returns)

    def extra_repr(self) -> str:
        return f"argument={self.argument}"


class Constant(nn.Module):
    """Answers a number, as a tensor of ``dims`` dims of size 1 that broadcasts against anything."""

    def __init__(self, number: float, dims: int) -> None:
        super().__init__()
        self.number, self.dims = number, dims

    def forward(self, given: Tensor, *_: Any, **__: Any) -> Tensor:
        return torch.full((1,) * self.dims, self.number, dtype=given.dtype, device=given.device)

    def extra_repr(self) -> str:
        return f"{self.number:g}"


class Nothing(nn.Module):
    """Answers an empty tensor, which a concat leaves out."""

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return next(leaf for leaf in tree_flatten((args, kwargs))[0] if isinstance(leaf, Tensor)).new_empty(0)


class Chain(nn.Module):
    """Some modules of another one after the other, under the names that they had there."""

    def __init__(self, module: nn.Module, steps: list[str]) -> None:
        super().__init__()
        self.steps = steps
        for step in steps:
            holder: nn.Module = self
            *around, name = step.split(".")
            for part in around:
                if part not in holder._modules:
                    holder.add_module(part, nn.Module())
                holder = holder.get_submodule(part)
            holder.add_module(name, module.get_submodule(step))

    def forward(self, x: Tensor) -> Tensor:
        for step in self.steps:
            x = self.get_submodule(step)(x)
        return x


def stand_in(model: nn.Module, edit: Edit) -> nn.Module:
    """What an edit of a plan makes of a module of ``model``."""
    module, becomes, options = model.get_submodule(edit.path), edit.becomes, edit.options
    if becomes == "merged":
        return composed(model, list(options["of"]), bool(options.get("shortcut")))
    if becomes == "chain":
        return Chain(module, list(options["steps"]))
    if becomes == "identity":
        return nn.Identity()
    if becomes == "pass":
        return Pass(int(options["argument"]), options["returns"])
    if becomes == "nothing":
        return Nothing()
    return Constant({"zero": 0.0, "one": 1.0}[becomes], int(options["dims"]))
