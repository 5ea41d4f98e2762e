"""Decisions: where a program's course depends on values, not on sizes: which boxes survive, what a ``.item()`` says, a boolean mask.

A pruned model computes other values, so it decides otherwise, and its ops can't be compared with the dense ones. Trials and verification
therefore replay the decisions that the dense recording took. Only those that depend on the inputs or the parameters are decisions; what is
worked out from sizes alone must follow the sizes.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from coppice.torch.trees import mapped_only

UNTAGGED = {"torchvision::nms"}  # its number of results depends on values, which no tag says
INDEXED = {"aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_", "aten::_unsafe_index"}


@dataclass(frozen=True, slots=True)
class Decision:
    """``answer`` is the op's result, or for indexing by a boolean mask the numbers of the indices that it picks, dim by dim."""

    op: str
    answer: Any


def decides(func: Any, args: tuple[Any, ...]) -> bool:
    """Whether the shape or the Python value that ``func`` answers depends on its operands' values."""
    name = func._schema.name
    return any(map(_is_mask, args[1])) if name in INDEXED else _by_value(func)


@cache
def _by_value(func: Any) -> bool:
    tags = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
    return func._schema.name in UNTAGGED or bool(tags & set(func.tags))


def _is_mask(index: Any) -> bool:
    return isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8)


def decide(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], given: Decision | None) -> tuple[Any, Decision]:
    """The op's result and its decision, which is ``given`` where that was taken at the same op."""
    name = func._schema.name
    known = given is not None and given.op == name
    if name in INDEXED:
        picked = given.answer if given is not None and known else _picked(args[1])
        return func(args[0], list(picked), *args[2:], **kwargs), Decision(name, picked)
    result = _copied(given.answer) if given is not None and known else func(*args, **kwargs)
    return result, Decision(name, _copied(result))


def _picked(indices: Any) -> tuple[Tensor | None, ...]:
    found: list[Tensor | None] = []
    for index in indices:
        found += index.nonzero().unbind(1) if _is_mask(index) else [index]
    return tuple(found)


def _copied(answer: Any) -> Any:
    return mapped_only(Tensor, torch.clone, answer)
