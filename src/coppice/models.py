"""Models by name and weights by file: `FILE.py:factory`, `torchvision:NAME`, `timm:NAME`; safetensors, or .pth holding only tensors."""

import difflib
import hashlib
import importlib.util
import inspect
import pickle
import re
import sys
import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from coppice.errors import CoppiceError
from coppice.torch.trees import named_tensors

_SHOWN = 3  # names listed in a message before "and N more"


def load_model(spec: str, weights: Path | None = None, num_classes: int | None = None) -> nn.Module:
    """Build the model that `spec` names, on the CPU, and load `weights` into it.

    `spec`: `FILE.py:factory` (the file is executed; `num_classes` is passed if the factory has such a parameter),
    `torchvision:NAME` or `timm:NAME` (classification models, never downloading weights).
    `weights`: a .safetensors file, or .pth/.pt through `torch.load(weights_only=True)`.
    Raises CoppiceError if the model is unknown or can't be built, or the weights are unreadable, unsafe, or another model's.
    """
    if num_classes is not None and num_classes < 1:
        raise CoppiceError(f"--num-classes {num_classes}: it must be 1 or more")
    source, _, name = spec.rpartition(":")
    if not source or not name:
        raise CoppiceError(f"{spec!r} names no model: write FILE.py:factory, torchvision:NAME or timm:NAME")
    if source == "torchvision":
        model = _torchvision_model(name, num_classes)
    elif source == "timm":
        model = _timm_model(name, num_classes)
    elif source.endswith(".py"):
        model = _user_model(Path(source), name, num_classes)
    else:
        raise CoppiceError(f"{spec!r} names no model: {source!r} is neither a .py file nor torchvision nor timm")
    if weights is not None:
        load_weights(model, weights)
    return model


def load_weights(model: nn.Module, path: Path) -> None:
    """Load the weights in `path` into `model`, in place. Raises CoppiceError, the model untouched, if it can't be read or doesn't fit."""
    state = read_state(path)
    _check_fits(model, state, path)
    model.load_state_dict(state, strict=False)  # what may be missing was checked above


def read_state(path: Path) -> dict[str, Tensor]:
    """The tensors in a .safetensors, .pth or .pt file, by name; nothing in the file is executed. Raises CoppiceError."""
    path = Path(path)
    if not path.is_file():
        raise CoppiceError(f"there is no weights file {path}")
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    if path.suffix in (".pth", ".pt"):
        return _read_pth(path)
    raise CoppiceError(f"{path} is neither .safetensors nor .pth/.pt: convert the weights to one of these")


# --- models ---------------------------------------------------------------------------------------------------------


def _torchvision_model(name: str, num_classes: int | None) -> nn.Module:
    try:
        from torchvision import models
    except ImportError as error:
        raise CoppiceError("torchvision:NAME needs the torchvision package, which is not installed") from error
    known = models.list_models(module=models)  # the classification models
    if name not in known:
        raise CoppiceError(f"torchvision has no classification model {name!r}{_suggest(name, known)}")
    options = {} if num_classes is None else {"num_classes": num_classes}
    with warnings.catch_warnings():  # GoogLeNet and Inception announce a change of their random initialisation
        warnings.simplefilter("ignore", FutureWarning)
        return _build(lambda: models.get_model(name, weights=None, **options), f"torchvision:{name}")


def _timm_model(name: str, num_classes: int | None) -> nn.Module:
    try:
        import timm
    except ImportError as error:
        raise CoppiceError("timm:NAME needs the timm package, which is not installed") from error
    if not timm.is_model(name):  # also keeps hub and URL names, which would download, out
        raise CoppiceError(f"timm has no model {name!r}{_suggest(name, timm.list_models())}")
    options: dict[str, Any] = {} if num_classes is None else {"num_classes": num_classes}
    return _build(lambda: timm.create_model(name, pretrained=False, **options), f"timm:{name}")


def _user_model(path: Path, name: str, num_classes: int | None) -> nn.Module:
    spec = f"{path}:{name}"
    if not path.is_file():
        raise CoppiceError(f"there is no model file {path}")
    # The file's folder is on the path while its code runs, as it would be for `python FILE.py`, so that it can import its neighbours.
    folder = str(path.resolve().parent)
    sys.path.insert(0, folder)
    try:
        module = _import_file(path)
        factory = getattr(module, name, None)
        if not callable(factory):
            own = [key for key, value in vars(module).items() if callable(value) and getattr(value, "__module__", None) == module.__name__]
            raise CoppiceError(f"{path} has no factory {name!r}{_suggest(name, own)}")
        options = {} if num_classes is None or not _accepts(factory, "num_classes") else {"num_classes": num_classes}
        return _build(lambda: factory(**options), spec)
    finally:
        if folder in sys.path:
            sys.path.remove(folder)


def _import_file(path: Path) -> ModuleType:
    """Execute a user's file under a private module name; the same content at the same place is executed once a process."""
    content = path.read_bytes()
    name = "_coppice_user_" + hashlib.sha256(str(path.resolve()).encode() + b"\0" + content).hexdigest()[:16]
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise CoppiceError(f"{path} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # before execution: dataclasses and pickling look their module up
    try:
        spec.loader.exec_module(module)
    except BaseException as error:
        del sys.modules[name]
        if isinstance(error, (Exception, SystemExit)):
            raise CoppiceError(f"{path} could not be imported: {one_line(error)}") from error
        raise
    return module


def _build(make: Callable[[], object], spec: str) -> nn.Module:
    try:
        model = make()
    except (Exception, SystemExit) as error:
        raise CoppiceError(f"{spec} could not be built: {one_line(error)}") from error
    if not isinstance(model, nn.Module):
        raise CoppiceError(f"{spec} returned a {type(model).__name__}, not a torch.nn.Module")
    return model


def _accepts(function: Callable[..., object], parameter: str) -> bool:
    try:
        return parameter in inspect.signature(function).parameters
    except (TypeError, ValueError):  # a callable without a readable signature
        return False


# --- weights --------------------------------------------------------------------------------------------------------


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (SafetensorError, ValueError, OSError) as error:
        raise CoppiceError(f"{path} is truncated or not a safetensors file ({one_line(error)}): copy or download it again") from error


def _read_pth(path: Path) -> dict[str, Tensor]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a TorchScript archive warns before it is refused
            content = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError, KeyError, IndexError, AttributeError, TypeError) as error:
        raise CoppiceError(_pth_refused(path, error)) from error
    for key in ("state_dict", "model"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    if not isinstance(content, Mapping) or not all(isinstance(name, str) and isinstance(value, Tensor) for name, value in content.items()):
        raise CoppiceError(f"{path} holds no state dict: save model.state_dict(), not the model")
    if not content:
        raise CoppiceError(f"{path} holds no tensors")
    prefix = "module."  # torch.nn.DataParallel
    if all(name.startswith(prefix) for name in content):
        return {name.removeprefix(prefix): value for name, value in content.items()}
    return dict(content)


def _pth_refused(path: Path, error: Exception) -> str:
    message = str(error)
    if "TorchScript" in message:
        return f"{path} is a TorchScript archive, not weights: save model.state_dict() as safetensors"
    if isinstance(error, pickle.UnpicklingError):  # what weights_only=True does not allow; the message is long and differs by release
        code = re.search(r"GLOBAL ([\w.]+)", message)
        what = f"would call {code[1]}" if code else "is not made of tensors alone"
        return f"{path} was refused and nothing in it was run: it is a pickle that {what}; save model.state_dict() as safetensors"
    return f"{path} is truncated or was not written by torch.save: copy or download it again"


def _check_fits(model: nn.Module, state: Mapping[str, Tensor], path: Path) -> None:
    own = model.state_dict()
    present = _aliases(model, state)
    missing = [name for name in own if name not in present and not name.endswith("num_batches_tracked")]
    unexpected = [name for name in state if name not in own]
    misshaped = [
        f"{name} is {_shape(state[name])}, the model's is {_shape(own[name])}"
        for name in own
        if name in state and isinstance(own[name], Tensor) and state[name].shape != own[name].shape
    ]
    faults = [
        f"{label} {_first(names)}"
        for label, names in (("missing", missing), ("unexpected", unexpected), ("mis-shaped", misshaped))
        if names
    ]
    if faults:
        raise CoppiceError(f"{path} holds the weights of another model: {'; '.join(faults)}")


def _aliases(model: nn.Module, names: Iterable[str]) -> set[str]:
    """`names`, and every other name of the same tensors: a parameter under two names may be saved under one."""
    by_tensor: dict[int, list[str]] = {}
    for name, tensor in named_tensors(model).items():
        by_tensor.setdefault(id(tensor), []).append(name)
    given = set(names)
    return given.union(*(group for group in by_tensor.values() if not given.isdisjoint(group)))


# --- wording --------------------------------------------------------------------------------------------------------


def one_line(error: BaseException) -> str:
    """An exception as `Type: first line of its message`, short enough for a sentence."""
    lines = str(error).strip().splitlines()
    text = f"{type(error).__name__}: {lines[0].strip()}" if lines else type(error).__name__
    return text if len(text) <= 200 else text[:197] + "..."


def _suggest(name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(known), n=_SHOWN, cutoff=0.5)
    return f": did you mean {' or '.join(close)}?" if close else ""


def _first(names: list[str]) -> str:
    more = len(names) - _SHOWN
    return ", ".join(names[:_SHOWN]) + (f" and {more} more" if more > 0 else "")


def _shape(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape)) or "a scalar"
