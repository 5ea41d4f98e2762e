"""The processes that torchrun started, joined by Lightning Fabric (docs/adr/0014-processes.md)."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn

from coppice.errors import CoppiceError
from coppice.parallel import alone, local_processes, share

T = TypeVar("T")
_PATIENCE = timedelta(days=7)  # the others wait for as long as the first one scores and cuts; that one has died is noticed at once


@dataclass(frozen=True)
class _Failed:
    """In place of what a process should have told."""

    rank: int
    error: CoppiceError


@dataclass(frozen=True)
class Processes:
    """`coppice.parallel.World`. What is told goes between the processors; only gradients and statistics go between GPUs."""

    fabric: Any
    telling: Any  # a group of its own, by gloo: the first one is NCCL's where there are GPUs, and the user's where that made one
    rank: int
    size: int

    def first(self, work: Callable[[], T]) -> T:
        told: T | _Failed | None = None
        if self.rank == 0:
            try:
                with alone():
                    told = work()
            except Exception as error:
                self._tell(_failed(0, error))
                raise
        found = self._tell(told)
        if isinstance(found, _Failed):
            raise found.error
        return told if self.rank == 0 else found  # type: ignore[return-value]  # what the first has is not copied

    def _tell(self, told: Any) -> Any:
        """What the first process has."""
        box = [told]
        dist.broadcast_object_list(box, 0, group=self.telling)
        return box[0]

    def together(self, work: Callable[[], T]) -> list[T]:
        failure: Exception | None = None
        own: T | _Failed
        try:
            with alone():
                own = work()
        except Exception as error:
            own, failure = _failed(self.rank, error), error
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, own, group=self.telling)
        if failure is not None:
            raise failure
        for one in found:
            if isinstance(one, _Failed):
                raise one.error
        return found

    def numbers(self, own: Sequence[float]) -> list[list[float]]:
        mine = torch.tensor(own, dtype=torch.float64)
        found = [torch.empty_like(mine) for _ in range(self.size)]
        dist.all_gather(found, mine, group=self.telling)
        return [one.tolist() for one in found]

    def part(self, count: int) -> slice:
        return share(count, self.rank, self.size)

    def wrap(self, module: nn.Module) -> nn.Module:
        wrapped: nn.Module = self.fabric.setup_module(module, move_to_device=False)
        return wrapped


def _failed(rank: int, error: Exception) -> _Failed:
    """The error for the other processes: an error of the user's is the same there."""
    return _Failed(rank, error if isinstance(error, CoppiceError) else CoppiceError(f"process {rank} failed: {error}"))


_joined: list[Processes] = []


def start(device: str) -> Processes:
    """The processes on `device`, or as they joined first. Raises CoppiceError without Fabric, or with fewer GPUs than processes."""
    if not _joined:
        _joined.append(_join(_kind(device)))
    return _joined[0]


def meet() -> None:
    if _joined:
        _joined[0].numbers([0.0])


def _join(kind: str) -> Processes:
    try:
        from lightning_fabric import Fabric
        from lightning_fabric.strategies.ddp import DDPStrategy
    except ImportError as error:
        raise CoppiceError("several processes need Lightning Fabric: pip install 'coppice[parallel]'") from error
    for name in ("lightning.fabric", "lightning_fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)  # it greets once a process
    warnings.filterwarnings("ignore", ".*(broadcast_buffers|find_unused_parameters|bucket view strides)")  # meant so, see below
    strategy = DDPStrategy(
        timeout=_PATIENCE,
        find_unused_parameters=True,  # what a model does may depend on what it sees
        broadcast_buffers=False,  # statistics are those of the whole batch in every process
    )
    fabric = Fabric(accelerator=kind, devices=local_processes(), num_nodes=int(os.environ.get("GROUP_WORLD_SIZE", "1")), strategy=strategy)
    fabric.launch()
    telling = dist.new_group(backend="gloo", timeout=_PATIENCE)
    return Processes(fabric, telling, fabric.global_rank, fabric.world_size)


def _kind(device: str) -> str:
    """ "cpu" or "cuda": on GPUs each process has one to itself."""
    gpus, processes = torch.cuda.device_count() if torch.cuda.is_available() else 0, local_processes()
    if device == "cuda" and gpus < processes:
        raise CoppiceError(f"there are {processes} processes and {gpus} GPUs on this machine: start one a GPU, or give --device cpu")
    if device == "auto" and 0 < gpus < processes:
        raise CoppiceError(f"{processes} processes can't share {gpus} GPU{'s' * (gpus > 1)}: start one a GPU, or give --device cpu")
    return "cuda" if device != "cpu" and gpus else "cpu"


def count_failure() -> int:
    """How many processes of this start have failed, this one included. It is torchrun that counts, so that it needs no joining."""
    store = dist.TCPStore(  # type: ignore[attr-defined]
        os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False, timeout=timedelta(seconds=5), wait_for_workers=False
    )
    return int(store.add(f"coppice/failures/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", 1))
