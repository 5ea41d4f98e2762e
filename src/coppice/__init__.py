"""coppice: prune a trained network to a target, and prove that the smaller one is right.

The stages, each a function: `capture` (model → graph), `couple` (graph → axes and pins), `score`, `plan`, `apply`, `verify`;
`prune` is the whole loop around them and `load` rebuilds what it wrote. Nothing is imported until it is used: the core needs
NumPy only, PyTorch or Keras comes in with the first function that touches a model.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from coppice.allocate import plan
    from coppice.coupling import couple
    from coppice.criteria import score
    from coppice.curves import sensitivity
    from coppice.errors import CoppiceError, VerificationError
    from coppice.front_ends import apply, capture, export, hold_masks, mask, prune, regulariser, repair, rewind, train_and_prune, verify
    from coppice.keras.functional import as_functional
    from coppice.masks import MaskRecipe
    from coppice.modules import removable
    from coppice.planning import Plan, remove, remove_modules
    from coppice.result import Result
    from coppice.run import load
    from coppice.sparse_file import load_sparse, save_sparse
    from coppice.timing import measure
    from coppice.torch.masking import take_in

__version__ = "0.1.0"

_HOMES = {
    "CoppiceError": "coppice.errors",
    "MaskRecipe": "coppice.masks",
    "Plan": "coppice.planning",
    "Result": "coppice.result",
    "VerificationError": "coppice.errors",
    "apply": "coppice.front_ends",
    "as_functional": "coppice.keras.functional",
    "capture": "coppice.front_ends",
    "couple": "coppice.coupling",
    "export": "coppice.front_ends",
    "hold_masks": "coppice.front_ends",
    "load": "coppice.run",
    "load_sparse": "coppice.sparse_file",
    "mask": "coppice.front_ends",
    "measure": "coppice.timing",
    "plan": "coppice.allocate",
    "prune": "coppice.front_ends",
    "removable": "coppice.modules",
    "regulariser": "coppice.front_ends",
    "remove": "coppice.planning",
    "remove_modules": "coppice.planning",
    "repair": "coppice.front_ends",
    "rewind": "coppice.front_ends",
    "save_sparse": "coppice.sparse_file",
    "score": "coppice.criteria",
    "sensitivity": "coppice.curves",
    "take_in": "coppice.torch.masking",
    "train_and_prune": "coppice.front_ends",
    "verify": "coppice.front_ends",
}

__all__ = [
    "CoppiceError", "MaskRecipe", "Plan", "Result", "VerificationError", "apply", "as_functional", "capture", "couple", "export",
    "hold_masks", "load", "load_sparse", "mask", "measure", "plan", "prune", "regulariser", "removable", "remove", "remove_modules",
    "repair", "rewind", "save_sparse", "score", "sensitivity", "take_in", "train_and_prune", "verify",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
