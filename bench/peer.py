"""Torch-Pruning 1.6.1 for `bench/accuracy.py`, in what is its best configuration here.

The pruning ratio is found by bisection on our count of MACs, so that it gets all that the target allows. The last layer is ignored, as its
users are told; where it can't follow the network (the padded shortcut of CIFAR ResNets), it gets the inner channels of the blocks only.
Gradients are those of its own examples, on the same calibration images as ours. Two faults of that version are mended, to its advantage:

- OBD-C looks up the Fisher matrix also of layers that lose inputs only and have none (depthwise and ignored ones), and fails; what it looks
  up is not used then, so nothing takes its place. It also trips over the look-up of attention, which answers None elsewhere.
- Hessian importance forgets all samples but the last, since it looks parameters up by name but keeps them as they are; here all are summed.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CRITERIA = ("L1", "Taylor", "Hessian", "OBD-C", "BN scale")
SETTINGS = ("global", "isomorphic", "uniform")
RANDOM = "random"
STEPS = 9  # of the bisection: a five-hundredth of the channels
BATCH = 64


class CannotPruneError(Exception):
    """Why the peer gives no model here."""


@dataclass
class Peer:
    """The peer on one network. ``batches(size, seed)`` are the calibration images, the same as ours; ``macs`` counts a model's."""

    dense: nn.Module
    example: Tensor
    batches: Callable[[int, int], Iterable[tuple[Tensor, Tensor]]]
    macs: Callable[[nn.Module], int]
    round_to: int
    inner_only: bool
    known: dict[tuple[str, int], dict[str, Tensor]] = field(default_factory=dict)  # by criterion and seed: of each parameter or layer

    def pruned(self, macs: float, criterion: str, setting: str, seed: int = 0) -> nn.Module:
        """The largest model that it gives within ``macs``."""
        low, high = 0.0, 0.98
        best: nn.Module | None = None
        for _ in range(STEPS):
            ratio = (low + high) / 2
            model = self.cut(criterion, setting, ratio, seed)
            if self.macs(model) <= macs:
                best, high = model, ratio
            else:
                low = ratio
        if best is None:
            raise CannotPruneError(f"no ratio up to {high} gets it below {macs:.0f} MACs")
        return best

    def cut(self, criterion: str, setting: str, ratio: float, seed: int = 0) -> nn.Module:
        import torch_pruning as tp

        torch.manual_seed(seed)
        model = copy.deepcopy(self.dense).eval()
        layers = {name: m for name, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)}
        ignored = [m for name, m in layers.items() if self.inner_only and not (name.startswith("layer") and name.endswith("conv1"))]
        importance = self._importance(criterion, layers)
        pruner = tp.pruner.BasePruner(
            model, self.example, importance, global_pruning=setting != "uniform", isomorphic=setting == "isomorphic", pruning_ratio=ratio,
            ignored_layers=ignored or [list(layers.values())[-1]], round_to=self.round_to, max_pruning_ratio=0.98,
        )  # fmt: skip
        self._teach(criterion, seed, importance, model, layers, pruner)
        pruner.step()
        return model.eval()

    def _importance(self, criterion: str, layers: dict[str, nn.Module]) -> Any:
        from torch_pruning import importance

        classes = list(layers.values())[-1].weight.shape[0]
        return {
            "L1": lambda: importance.GroupMagnitudeImportance(p=1),
            "Taylor": importance.GroupTaylorImportance,
            "Hessian": importance.GroupHessianImportance,
            "OBD-C": lambda: importance.OBDCImportance(num_classes=classes),
            "BN scale": importance.BNScaleImportance,
            RANDOM: importance.RandomImportance,
        }[criterion]()

    def _teach(self, criterion: str, seed: int, importance: Any, model: nn.Module, layers: dict[str, nn.Module], pruner: Any) -> None:
        """Give ``model``, or the importance, what was learnt of the dense model once."""
        key = (criterion, seed)
        if criterion == "OBD-C":
            look_up = pruner._downstream_node_as_root_if_attention
            pruner._downstream_node_as_root_if_attention = lambda group: look_up(group) or group
            if key not in self.known:
                self.known[key] = fisher_of_layers(importance, model, pruner, self.batches(BATCH, seed))
            found = {layers[name]: matrix for name, matrix in self.known[key].items()}
            importance.Fisher = defaultdict(lambda: torch.zeros(()), found)
            importance.steps = 1
            for layer in found:
                layer.weight.grad = torch.zeros_like(layer.weight)  # only asked whether it is there
        elif criterion in ("Taylor", "Hessian"):
            if key not in self.known:
                taylor = criterion == "Taylor"
                images = self.batches(BATCH if taylor else 1, seed)
                self.known[key] = (summed_gradients if taylor else squared_gradients)(model, images)
            for name, parameter in model.named_parameters():
                parameter.grad = self.known[key][name].clone()


def summed_gradients(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    """For Taylor, as in the peer's examples: the gradient of the loss, accumulated over the batches."""
    model.zero_grad()
    for x, y in batches:
        torch.autograd.backward(F.cross_entropy(model(x), y))
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def squared_gradients(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    """For Hessian importance, as its docstring says: the squared gradient of the loss of each image (a batch), in the mean over images."""
    sums: dict[str, Tensor] = {}
    count = 0
    for x, y in batches:
        model.zero_grad()
        torch.autograd.backward(F.cross_entropy(model(x), y))
        count += 1
        for name, p in model.named_parameters():
            if p.grad is not None:
                sums[name] = sums.get(name, torch.zeros(())) + p.grad.square()
    return {name: total / count for name, total in sums.items()}


def fisher_of_layers(importance: Any, model: nn.Module, pruner: Any, batches: Iterable[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    """For OBD-C, as in the peer's examples: the Fisher matrix of labels that are drawn from the model's own predictions."""
    importance._prepare_model(model, pruner)
    generator = torch.Generator().manual_seed(0)
    for x, _ in batches:
        scores = model(x)
        labels = torch.multinomial(scores.detach().softmax(1), 1, generator=generator)[:, 0]
        model.zero_grad()
        torch.autograd.backward(F.cross_entropy(scores, labels))
        importance.step()
    importance._rm_hooks(model)
    names = {module: name for name, module in model.named_modules()}
    return {names[layer]: matrix / importance.steps for layer, matrix in importance.Fisher.items()}
