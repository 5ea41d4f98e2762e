"""A user's own loaders where several processes train (`coppice.parallel`): each gives all batches, or has a DistributedSampler.

Without a DistributedSampler every process reads the same batches and takes its part of each: nothing to set up, but reading takes as long
as in one process. With one, each reads its own part of every batch. Anything else is refused, since it can't be told from a mistake.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.data import DistributedSampler

from coppice.data import Batches, batches
from coppice.errors import CoppiceError
from coppice.parallel import World


@dataclass(frozen=True)
class Batch:
    """Model inputs and labels of a batch of `count` images; of these, `part` is here."""

    x: Tensor
    y: Tensor
    part: slice
    count: int

    @property
    def share(self) -> float:
        return len(self.y) / self.count


def whole(x: Tensor, y: Tensor) -> Batch:
    return Batch(x, y, slice(0, len(y)), len(y))


def sampler_of(loader: object) -> DistributedSampler[object] | None:
    """The DistributedSampler of a loader, if it has one."""
    for owner in (loader, getattr(loader, "batch_sampler", None)):
        sampler = getattr(owner, "sampler", None)
        if isinstance(sampler, DistributedSampler):
            return sampler
    return None


def loader_batches(loader: Batches, world: World, epoch: int, device: torch.device) -> Iterator[Batch]:
    """The batches of an epoch, of each this process's part. Raises CoppiceError where the processes' loaders don't fit together."""
    if world.size == 1:
        yield from (whole(x, y) for x, y in batches(loader, None, device=device))
        return
    sampler = sampler_of(loader)
    if sampler is None:
        yield from (_shared(x, y, world) for x, y in batches(loader, None, device=device))
        return
    if (sampler.num_replicas, sampler.rank) != (world.size, world.rank):
        raise CoppiceError(
            f"the training loader's DistributedSampler is for process {sampler.rank} of {sampler.num_replicas}, this is {world.rank} of "
            f"{world.size}: make it after the processes have joined, without naming either"
        )
    sampler.set_epoch(epoch)
    for x, y in batches(loader, None, device=device):
        sizes = [int(size) for (size,) in world.numbers([len(y)])]
        start = sum(sizes[: world.rank])
        yield Batch(x, y, slice(start, start + len(y)), sum(sizes))


def _shared(x: Tensor, y: Tensor, world: World) -> Batch:
    told = world.numbers([len(y), checksum(x), checksum(y)])
    if any(one != told[0] for one in told):
        raise CoppiceError(
            "the training loader gives each process other batches: let it draw from PyTorch's global generator, or use a DistributedSampler"
        )
    if len(y) < world.size:
        raise CoppiceError(
            f"a batch of {len(y)} can't be shared by {world.size} processes: give larger batches, or drop_last=True to the loader"
        )
    part = world.part(len(y))
    return Batch(x[part], y[part], part, len(y))


def checksum(tensor: Tensor) -> float:
    """A number that differs where values or their order do."""
    flat = tensor.detach().reshape(-1).double()
    return float(flat @ torch.linspace(1, 2, len(flat), dtype=torch.float64, device=flat.device))
