"""coppice: prune a trained network to a target, and prove that the smaller one is right.

The stages, each a function: `capture` (model → graph), `couple` (graph → axes and pins), `score`, `plan`, `apply`, `verify`;
`prune` is the whole loop around them and `load` rebuilds what it wrote. Nothing is imported until it is used: the core needs
NumPy only, PyTorch comes in with the first function that touches a model.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from coppice.allocate import plan
    from coppice.coupling import couple
    from coppice.criteria import score
    from coppice.curves import sensitivity
    from coppice.errors import CoppiceError, VerificationError
    from coppice.loop import Result, prune
    from coppice.modules import removable
    from coppice.planning import Plan, remove, remove_modules
    from coppice.run import load
    from coppice.timing import measure
    from coppice.torch.apply import apply
    from coppice.torch.capture import capture
    from coppice.torch.repair import repair
    from coppice.torch.verify import verify

__version__ = "0.1.0"

_HOMES = {
    "CoppiceError": "coppice.errors",
    "Plan": "coppice.planning",
    "Result": "coppice.loop",
    "VerificationError": "coppice.errors",
    "apply": "coppice.torch.apply",
    "capture": "coppice.torch.capture",
    "couple": "coppice.coupling",
    "load": "coppice.run",
    "measure": "coppice.timing",
    "plan": "coppice.allocate",
    "prune": "coppice.loop",
    "removable": "coppice.modules",
    "remove": "coppice.planning",
    "remove_modules": "coppice.planning",
    "repair": "coppice.torch.repair",
    "score": "coppice.criteria",
    "sensitivity": "coppice.curves",
    "verify": "coppice.torch.verify",
}

__all__ = [
    "CoppiceError", "Plan", "Result", "VerificationError", "apply", "capture", "couple", "load", "measure", "plan", "prune",
    "removable", "remove", "remove_modules", "repair", "score", "sensitivity", "verify",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
