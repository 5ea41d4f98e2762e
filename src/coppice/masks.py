"""Masks: which single weights stay, in tensors that keep their shape. Unstructured, or N of every M along the dim that is summed over.

Which weights can be masked, and along which dim N:M goes, is read off the rules: a weight that an op contracts (a convolution, a matrix
product), and the dim that is summed away. Everything else (norms, biases, embeddings) stays dense, with its reason.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from coppice.axes import find
from coppice.coupling import Coupling, Mask, OpDims
from coppice.errors import CoppiceError
from coppice.graph import Kind, Op
from coppice.notation import Special, parse, spread
from coppice.rules import LINES
from coppice.saliency import Array

CRITERIA = ("magnitude", "gradient", "taylor", "movement", "wanda", "sparsegpt", "random")
LOOKING = ("gradient", "taylor", "wanda", "sparsegpt")  # at calibration images
NOTHING = "this model has no weight that can be masked: no convolution or matrix product with a weight of its own"
SCOPES = ("auto", "global", "layer", "row", "erk")
SCHEDULES = ("one-shot", "iterative", "cubic")
_OWN_SCOPE = {"wanda": "row", "sparsegpt": "layer", "random": "layer"}  # what the paper compares within; the others: the whole network
_CONTRACTIONS = (
    "conv", "pointwise_conv", "conv_transpose", "mm", "mv",
    "conv_kernel_first", "conv_transpose_kernel_first", "depthwise_conv", "dense", "einsum",
)  # fmt: skip
_LEAST = 0.01  # of a tensor always stays when all compete: a layer of zeros passes nothing on
_NM = re.compile(r"(\d{1,3}):(\d{1,3})")


@dataclass(frozen=True)
class MaskRecipe:
    """Which weights are to be zero. Neither `sparsity` nor `nm`: none. Raises CoppiceError for a value out of its range.

    `sparsity`: share of all weights that can be masked; `nm`: "2:4" keeps 2 of every 4 along the input dim. `scope`: what competes, the
    whole network (`global`), each layer by itself at one share (`layer`), each of its outputs (`row`), or layers at shares by their
    shape (`erk`). `schedule`: how the zeros come in: at once, in `steps` rounds of fine-tuning, or while training by a cubic curve.
    """

    sparsity: float = 0.0
    nm: str = ""
    criterion: str = "magnitude"
    scope: str = "auto"
    schedule: str = "one-shot"
    steps: int = 3

    def __post_init__(self) -> None:
        for name, value, known in (
            ("criterion", self.criterion, CRITERIA), ("scope", self.scope, SCOPES), ("schedule", self.schedule, SCHEDULES)
        ):  # fmt: skip
            if value not in known:
                raise CoppiceError(f"there is no mask {name} {value!r}: choose one of {', '.join(known)}")
        if not 0 <= self.sparsity < 1:
            raise CoppiceError(f"the sparsity is {self.sparsity}: it is the share of weights that become zero, from 0 to less than 1")
        if self.nm and self.sparsity:
            raise CoppiceError(f"give a sparsity or {self.nm}, not both: {self.nm} says how many weights are zero")
        if self.nm:
            pattern(self.nm)
        if self.steps < 1:
            raise CoppiceError(f"the steps of the masks are {self.steps}: there must be 1 or more")
        if self.nm and self.schedule != "one-shot":
            raise CoppiceError(f"{self.nm} is reached at once: the schedule {self.schedule} is for a sparsity")
        if self.schedule == "cubic" and self.criterion not in ("magnitude", "movement"):
            raise CoppiceError(
                f"masks that grow while training go by magnitude or movement, not by {self.criterion}: drop the cubic schedule"
            )
        if self.criterion == "movement" and self.schedule != "cubic":
            raise CoppiceError("movement is what weights do while training: give the schedule cubic with it")
        if self.criterion == "sparsegpt" and self.scope == "global":
            raise CoppiceError("sparsegpt goes layer by layer, so no threshold can be global: choose the scope layer, row or erk")

    def __bool__(self) -> bool:
        return bool(self.sparsity or self.nm)

    @property
    def within(self) -> str:
        """The scope, settled."""
        return _OWN_SCOPE.get(self.criterion, "global") if self.scope == "auto" else self.scope

    def __str__(self) -> str:
        return self.nm if self.nm else f"{100 * self.sparsity:g} % zeros"


def pattern(text: str) -> tuple[int, int]:
    """N and M of "N:M". Raises CoppiceError."""
    found = _NM.fullmatch(text)
    kept, of = (int(found[1]), int(found[2])) if found else (0, 0)
    if not 0 < kept < of:
        raise CoppiceError(f"{text!r} is no pattern: write N:M, of every M weights in a row N stay, for example 2:4")
    return kept, of


@dataclass(frozen=True, slots=True)
class Site:
    """A weight that can be masked: the op sums over the dims `along` (in runs of `run` indices: a group's) and over those of a kernel,
    `outputs` are the others; `macs` those of one sample that multiply by it.
    """

    name: str
    shape: tuple[int, ...]
    along: tuple[int, ...]
    outputs: tuple[int, ...]
    run: int
    macs: int

    @property
    def size(self) -> int:
        return math.prod(self.shape)


_Reading = tuple[tuple[int, ...], tuple[int, ...], int]  # along, outputs, run


def sites(coupling: Coupling) -> tuple[list[Site], dict[str, str]]:
    """The weights that can be masked, in order of use, and why each other parameter stays dense."""
    views: dict[int, tuple[int, tuple[int, ...]]] = {}  # value -> the parameter it is a transposition of, and its dims there
    uses: dict[int, list[tuple[_Reading, int]]] = {}
    refused: dict[int, str] = {}
    values = coupling.graph.values
    parameters = [v for v in coupling.graph.weights() if v.kind is Kind.PARAMETER]
    views.update({v.id: (v.id, tuple(range(len(v.shape)))) for v in parameters})
    for op, info in zip(coupling.graph.ops, coupling.ops, strict=True):
        if op.rule == "permute" and op.inputs[0] in views:
            owner, dims = views[op.inputs[0]]
            views[op.outputs[0]] = (owner, tuple(dims[d] for d in op.attrs["order"]))
            continue
        for k, read in enumerate((*op.inputs, *op.others)):
            if read is None or read not in views:
                continue
            owner, dims = views[read]
            found = _reading(op, info, k, dims, values[owner].shape)
            if found is None:
                refused.setdefault(owner, "it is a vector" if len(values[owner].shape) < 2 else f"read by {op.name}")
                continue
            uses.setdefault(owner, []).append((found, sum(term.evaluate({}) for term in info.macs)))
    known, dense = [], {}
    for value in parameters:
        name, used = value.names[0], uses.get(value.id, [])
        if value.id in refused or not used:
            dense[name] = refused.get(value.id, "no convolution or matrix product reads it")
        elif len({reading for reading, _ in used}) > 1:
            dense[name] = "it is read along different dims"
        else:
            known.append(Site(name, value.shape, *used[0][0], sum(macs for _, macs in used)))
    return known, dense


def _reading(op: Op, info: OpDims, k: int, dims: tuple[int, ...], shape: tuple[int, ...]) -> _Reading | None:
    """How an op reads its operand `k`, whose dims are `dims` of a parameter of that shape; None where it sums over none of them."""
    if op.rule not in _CONTRACTIONS or not info.macs or k >= len(op.inputs) or len(dims) < 2:
        return None
    along = tuple(dims[d] for operand, d in info.contracted if operand == k)
    if not along and (op.rule, k) != ("depthwise_conv", 1):  # which sums over its kernel alone
        return None
    pattern = spread(parse(LINES[op.rule].text(op.attrs)).operands[k], len(dims))
    outputs = tuple(dims[d] for d, dim in enumerate(pattern) if not isinstance(dim, Special) and dims[d] not in along)
    return along, outputs, _run(op, info.letters, [shape[d] for d in along])


def _run(op: Op, letters: Mapping[str, Any], sizes: list[int]) -> int:
    """How many neighbours along the summed dims belong together: of a transposed convolution's (groups, inputs), a group's inputs."""
    return find(letters["i"]).size if op.rule == "conv_transpose" else math.prod(sizes)


def choose(scores: Mapping[str, Array], where: list[Site], recipe: MaskRecipe) -> dict[str, Mask]:
    """The masks (True: stays) of the weights with the lowest scores. With N:M, a weight whose runs don't divide by M stays dense."""
    for site in where:
        if np.isnan(scores[site.name]).any():
            raise CoppiceError(f"the scores of {site.name} are not numbers: look for NaN or infinite weights or inputs")
    if recipe.nm:
        kept, of = pattern(recipe.nm)
        return {site.name: _n_of_m(scores[site.name], site, kept, of) for site in where if fits(site, of)}
    return _by_share(scores, where, 1 - recipe.sparsity, recipe.within)


def fits(site: Site, of: int) -> bool:
    """Whether a weight can have N of every `of` along the dim that is summed over."""
    return site.run % of == 0


def _n_of_m(scores: Array, site: Site, kept: int, of: int) -> Mask:
    last = tuple(range(-len(site.along), 0))
    runs = np.moveaxis(scores, site.along, last)
    order = np.argsort(-runs.reshape(-1, of), axis=1, kind="stable")
    mask = np.zeros((len(order), of), bool)
    np.put_along_axis(mask, order[:, :kept], True, axis=1)
    return np.ascontiguousarray(np.moveaxis(mask.reshape(runs.shape), last, site.along))


def _by_share(scores: Mapping[str, Array], where: list[Site], density: float, scope: str) -> dict[str, Mask]:
    if scope == "global":
        return _together(scores, where, density)
    shares = erk(where, density) if scope == "erk" else {site.name: density for site in where}
    if scope == "row":
        return {site.name: _each_row(scores[site.name], site, density) for site in where}
    return {site.name: _best(scores[site.name], max(1, round(shares[site.name] * site.size))) for site in where}


def _best(scores: Array, count: int) -> Mask:
    mask = np.zeros(scores.size, bool)
    mask[np.argsort(-scores.ravel(), kind="stable")[:count]] = True
    return mask.reshape(scores.shape)


def _each_row(scores: Array, site: Site, density: float) -> Mask:
    """Every output keeps the same share of what it sums over."""
    first = tuple(range(len(site.outputs)))
    rows = np.moveaxis(scores, site.outputs, first)
    flat = rows.reshape(math.prod(rows.shape[: len(first)]), -1)
    count = max(1, round(density * flat.shape[1]))
    mask = np.zeros(flat.shape, bool)
    np.put_along_axis(mask, np.argsort(-flat, axis=1, kind="stable")[:, :count], True, axis=1)
    return np.ascontiguousarray(np.moveaxis(mask.reshape(rows.shape), first, site.outputs))


def _together(scores: Mapping[str, Array], where: list[Site], density: float) -> dict[str, Mask]:
    """One threshold for all, over a small share of each tensor that is kept in any case."""
    safe = {site.name: _best(scores[site.name], max(1, round(min(density, _LEAST) * site.size))) for site in where}
    flat = np.concatenate([np.where(safe[site.name], np.inf, scores[site.name]).ravel() for site in where])
    chosen = _best(flat, max(round(density * flat.size), sum(int(mask.sum()) for mask in safe.values())))
    ends = np.cumsum([site.size for site in where])
    return {site.name: part.reshape(site.shape) for site, part in zip(where, np.split(chosen, ends[:-1]), strict=True)}


def erk(where: list[Site], density: float) -> dict[str, float]:
    """Densities in proportion to (sum of the dims) / (product of the dims), none above 1, that keep the asked share of all weights.

    Evci et al., Rigging the Lottery, ICML 2020 (Erdős-Rényi-Kernel, after Mocanu et al. 2018).
    """
    raw = {site.name: sum(site.shape) / site.size for site in where}
    full: set[str] = set()
    while True:
        budget = density * sum(s.size for s in where) - sum(s.size for s in where if s.name in full)
        scale = budget / (sum(raw[s.name] * s.size for s in where if s.name not in full) or 1)
        over = {s.name for s in where if s.name not in full and raw[s.name] * scale > 1}
        if not over:
            return {s.name: 1.0 if s.name in full else max(0.0, raw[s.name] * scale) for s in where}
        full |= over


def cubic(final: float, done: int, total: int, until: float = 2 / 3) -> float:
    """The sparsity after `done` of `total` steps; the last third of them goes to recovery.

    Zhu and Gupta, To prune, or not to prune, 2017, eq. 1.
    """
    rising = min(1.0, done / max(1, round(until * total)))
    return float(final * (1 - (1 - rising) ** 3))


@dataclass(frozen=True)
class Sparsity:
    """What masks leave: weights and zeros in all that can be masked, and MACs in theory, if zeros cost nothing (of one sample)."""

    weights: int
    zeros: int
    macs: int
    dense_macs: int
    layers: tuple[tuple[str, int, int], ...]  # name, weights, zeros
    left_dense: Mapping[str, str]  # with the reason

    @property
    def share(self) -> float:
        return self.zeros / max(1, self.weights)

    def to_dict(self) -> dict[str, Any]:
        plain = {"weights": self.weights, "zeros": self.zeros, "share": self.share, "macs": self.macs, "dense_macs": self.dense_macs}
        return plain | {"layers": [list(layer) for layer in self.layers], "left_dense": dict(self.left_dense)}


def sparsity(coupling: Coupling, masks: Mapping[str, Mask], recipe: MaskRecipe = MaskRecipe()) -> Sparsity:
    """What `masks`, made for the model of this coupling, leave of it."""
    where, dense = sites(coupling)
    by_name = {site.name: site for site in where}
    layers = tuple((s.name, s.size, int((~masks[s.name]).sum()) if s.name in masks else 0) for s in where)
    total = coupling.cost().macs
    spared = sum(by_name[name].macs * zeros / size for name, size, zeros in layers)
    odd = {s.name: f"its {s.run} inputs don't divide by {recipe.nm}" for s in where if recipe.nm and s.name not in masks}
    return Sparsity(sum(n for _, n, _ in layers), sum(z for *_, z in layers), total - round(spared), total, layers, dense | odd)
