"""The front-end of a model, found by what it is: Keras (on any backend) or PyTorch. Neither is imported before a model of it is there."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from coppice.coupling import Coupling, Mask
from coppice.errors import CoppiceError
from coppice.frameworks import is_keras
from coppice.graph import Graph
from coppice.masking import unpacked
from coppice.masks import MaskRecipe
from coppice.planning import Plan
from coppice.refit import Refit
from coppice.targets import Target

if TYPE_CHECKING:
    from coppice.exporting import ExportCheck
    from coppice.recipe import Recipe
    from coppice.stretches import Trained
    from coppice.verification import Verification


def capture(model: Any, inputs: Any, values: bool = False) -> Graph:
    """The recorded graph of a model. PyTorch: example inputs (a tensor or a tuple of them); Keras: arrays, or shapes with the batch.

    ``values``: compute while recording, not only shapes; a Keras model never needs it.
    """
    if is_keras(model):
        from coppice.keras.capture import capture as record

        return record(model, inputs)
    from coppice.torch.capture import capture as record_torch

    return record_torch(model, inputs, values)


def apply(model: Any, plan: Plan) -> Any:
    """A smaller copy of ``model``: the plan's indices stay. ``model`` is left as it is."""
    if is_keras(model):
        from coppice.keras.apply import apply as build

        return build(model, plan)
    from coppice.torch.apply import apply as build_torch

    return build_torch(model, plan)


def export(model: Any, path: str | Path, to: str = "onnx", inputs: Any = None, *, opset: int | None = None) -> ExportCheck:
    """Write ``model`` to ``path``, compared with itself on ``inputs`` before it is put there; nothing is left of a file that differs.

    ``to``: of a PyTorch model ``onnx``, ``openvino`` or ``pt2``, and ``inputs`` are at least four images; of a Keras model ``onnx``,
    ``lite``, ``savedmodel`` or ``keras``, and ``inputs`` are random unless they are given.
    """
    path = Path(path)
    if not path.parent.is_dir():
        raise CoppiceError(f"{path}: there is no folder {path.parent}")
    if is_keras(model):
        from coppice.keras.export import export as write

        return write(model, path, to, inputs, opset)
    from coppice.formats import write as write_torch

    if inputs is None:
        raise CoppiceError("a PyTorch model is compared with its file on images: give at least four as inputs")
    return write_torch(to, model, inputs, path, opset)


def mask(model: Any, coupling: Coupling, recipe: MaskRecipe, batches: Iterable[Any] | None = None, seed: int = 0) -> tuple[Any, Plan]:
    """A copy of ``model`` with the weights masked that the recipe says, and the plan that holds the masks (and removes no index).

    ``coupling`` is the model's; ``batches`` are calibration images (inputs, labels), for the criteria that look at some. CoppiceError where
    nothing can be masked, or batches are missing.
    """
    if is_keras(model):
        from coppice.keras.masking import mask as mask_keras

        return mask_keras(model, coupling, recipe, batches, seed)
    from coppice.torch.masking import mask as mask_torch

    return mask_torch(model, coupling, recipe, batches, seed)


def hold_masks(model: Any, masks: Plan | Mapping[str, Mask], optimizer: Any = None) -> Any:
    """Keep the masked weights of ``model`` zero in a training of your own; the ``remove()`` of what it answers ends that.

    ``masks``: a plan that has some, or arrays by parameter name (True: stays). A PyTorch model is held after each step of ``optimizer``; a
    Keras model in every step of any of Keras's optimisers, in ``fit`` or in a loop.
    """
    arrays = unpacked(masks) if isinstance(masks, Plan) else masks
    if is_keras(model):
        from coppice.keras.masking import hold_masks as hold_keras

        return hold_keras(model, arrays)
    if optimizer is None:
        raise CoppiceError("masks of a PyTorch model are held after each step of an optimiser: give that as well")
    from coppice.torch.masking import hold_masks as hold_torch

    return hold_torch(model, arrays, optimizer)


def prune(model: Any, data: Any, target: Any = Target(), **options: Any) -> Any:
    """Prune a trained classifier to a target and a floor on accuracy: `coppice.loop.prune`, or `coppice.keras.loop.prune`."""
    if is_keras(model):
        from coppice.keras.loop import prune as prune_keras

        return prune_keras(model, data, target, **options)
    from coppice.loop import prune as prune_torch

    return prune_torch(model, data, target, **options)


def repair(dense: Any, pruned: Any, coupling: Coupling, plan: Plan, batches: Iterable[Any], seed: int = 0) -> list[Refit]:
    """Refit the layers of ``pruned`` in place on ``batches`` (model inputs, no labels), each only where it helps on held-out batches.

    ``plan`` is what made ``pruned`` from ``dense``, ``coupling`` is ``dense``'s. A layer with very many inputs, or a weight that is read
    twice, is left as it is. CoppiceError where there are no batches, or the two models don't run the same ops.
    """
    if is_keras(dense):
        from coppice.keras.repair import repair as refit

        return refit(dense, pruned, coupling, plan, batches, seed)
    from coppice.torch.repair import repair as refit_torch

    return refit_torch(dense, pruned, coupling, plan, batches, seed)


def regulariser(model: Any, coupling: Coupling, kind: str = "group-lasso", *, steps: int, **options: Any) -> Any:
    """What shrinks while a model trains for so many steps: `coppice.torch.regularise.regulariser`, or a callback for Keras's `fit`."""
    if is_keras(model):
        from coppice.keras.regularise import regulariser as callback

        return callback(model, coupling, kind, steps=steps, **options)
    from coppice.torch.regularise import regulariser as regulariser_torch

    return regulariser_torch(model, coupling, kind, steps=steps, **options)


def rewind(pruned: Any, plan: Plan, model: Any, earlier: Any) -> Any:
    """A copy of ``pruned`` whose weights have the values that they had earlier in the dense ``model``: a lottery ticket.

    ``earlier``: a state dict of the PyTorch model, or what the Keras model's ``get_weights()`` gave.
    """
    if is_keras(model):
        from coppice.keras.schedules import rewind as rewind_keras

        return rewind_keras(pruned, plan, model, earlier)
    from coppice.schedules import rewind as rewind_torch

    return rewind_torch(pruned, plan, model, earlier)


def train_and_prune(model: Any, data: Any, recipe: Recipe, target: Any, **options: Any) -> Trained:
    """Train a copy of ``model`` and cut it on the way: `train_and_prune` of `coppice.schedules`, or of `coppice.keras.schedules`."""
    if is_keras(model):
        from coppice.keras.schedules import train_and_prune as train_keras

        return train_keras(model, data, recipe, target, **options)
    from coppice.schedules import train_and_prune as train_torch

    return train_torch(model, data, recipe, target, **options)


def verify(model: Any, pruned: Any, coupling: Coupling, plan: Plan) -> Verification:
    """Prove that ``pruned`` computes what ``plan`` makes of ``model``. VerificationError names the op, module and axes."""
    if is_keras(model):
        from coppice.keras.verify import verify as check

        return check(model, pruned, coupling, plan)
    from coppice.torch.verify import verify as check_torch

    return check_torch(model, pruned, coupling, plan)
