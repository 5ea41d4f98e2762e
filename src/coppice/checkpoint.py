"""A fine-tune's state between epochs in one safetensors file: model, optimiser, and what they belong to. No pickle."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from coppice.errors import CoppiceError

_MODEL, _OPTIMIZER, _AVERAGE, _ALONG, _KEY = "model/", "optimizer/", "average/", "along/", "coppice"


def save_checkpoint(
    path: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    facts: Mapping[str, Any],
    average: AveragedModel | None = None,
    along: Mapping[str, Tensor] | None = None,
) -> None:
    """Write model, optimiser, average, what goes along (`coppice.along`), and `facts` (JSON values) in the header.

    A crash at any moment leaves the old file or the new.
    """
    from safetensors.torch import save

    tensors = {_MODEL + name: value for name, value in model.state_dict().items() if isinstance(value, Tensor)}
    if average is not None:
        tensors |= {_AVERAGE + name: value for name, value in average.state_dict().items()}
    tensors |= {_ALONG + name: value for name, value in (along or {}).items()}
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, Tensor):
                tensors[f"{_OPTIMIZER}{name}/{key}"] = value
    # Copies: safetensors wants every tensor contiguous and none to share memory with another.
    plain = {name: value.detach().to("cpu", copy=True, memory_format=torch.contiguous_format) for name, value in tensors.items()}
    write_atomic(path, save(plain, metadata={_KEY: json.dumps(dict(facts))}))


def load_facts(path: Path) -> dict[str, Any]:
    """The `facts` in the header. Raises CoppiceError if the file is not a checkpoint."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            facts: dict[str, Any] = json.loads((file.metadata() or {})[_KEY])
            return facts
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        raise CoppiceError(f"{path} is not a checkpoint of a fine-tune, or is truncated: delete it to start again") from error


def load_state(
    path: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    average: AveragedModel | None = None,
    along: Mapping[str, Tensor] | None = None,
) -> None:
    """Put the saved state into `model`, `optimizer`, `average` and `along`. Raises CoppiceError if it is another model's."""
    from safetensors.torch import load_file

    tensors = load_file(path)

    def of(prefix: str) -> dict[str, Tensor]:
        return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}

    try:
        model.load_state_dict(of(_MODEL))
        if average is not None:
            average.load_state_dict(of(_AVERAGE))
        remembered = of(_ALONG)
        for name, tensor in (along or {}).items():
            tensor.copy_(remembered[name])
    except (RuntimeError, KeyError) as error:
        raise CoppiceError(f"{path} holds the state of another model: delete it to start again") from error
    parameters = dict(model.named_parameters())
    for name, value in tensors.items():
        if name.startswith(_OPTIMIZER):
            owner, key = name.removeprefix(_OPTIMIZER).rsplit("/", 1)
            parameter = parameters[owner]
            on_cpu = key == "step"  # the optimisers count their steps there
            optimizer.state[parameter][key] = value if on_cpu else value.to(parameter.device)


def write_atomic(path: Path, content: bytes) -> None:
    """Write the whole of `content` or nothing: to a neighbour, flushed to the disk, then renamed."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # the rename itself
    finally:
        os.close(folder)
