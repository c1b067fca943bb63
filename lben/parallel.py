"""How do several processes share a run? Each takes a share of every batch, the first one writes.

    python -m torch.distributed.run --nproc-per-node 2 -m lben train …

starts two. Each process augments the whole batch, so that all draw the same random numbers, and
keeps its share. DistributedDataParallel averages gradients, over gloo on CPUs and nccl on CUDA
devices. The result equals that of one process up to the order of summation and the tolerance of the
solver.

`evaluate` and `certify` share the test images. All processes make the same proofs for all inputs.
Each process certifies and attacks its own images, and the results are gathered. Random pairs and
later starts of attacks are drawn per process, so they differ from those of a run in one process.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta

import torch
from torch import Tensor, distributed, nn
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous
from torch.nn.parallel import DistributedDataParallel

_PATIENCE = timedelta(days=2)
"""How long a process waits for a slower one; if one process fails, torchrun ends all."""


@dataclass(frozen=True, kw_only=True)
class Processes:
    """The processes of one run, from the point of view of one of them.

    Attributes:
        device: of this process.
        rank: number of this process.
        count: number of processes; 1 for a run that nobody started in parallel.
    """

    device: torch.device
    rank: int = 0
    count: int = 1

    @property
    def first(self) -> bool:
        """Whether this process is the one that writes."""
        return self.rank == 0

    @property
    def quiet(self) -> bool | None:
        """The argument `disable` of tqdm: only the first process shows bars, on a terminal."""
        return None if self.first else True

    def share(self, batch: Tensor) -> Tensor:
        """Return this process's part of a batch; sizes differ by one at most."""
        return batch.tensor_split(self.count)[self.rank]

    def share_of(self, count: int) -> int:
        """Return the size of this process's share of a number of items."""
        return (count + self.count - 1 - self.rank) // self.count

    def gather(self, share: Tensor) -> Tensor:
        """Return the shares of all processes, of whatever lengths, in order of rank."""
        if self.count == 1:
            return share
        own = torch.tensor([len(share)], device=self.device)
        lengths = torch.cat(self._gather_equal(own)).tolist()
        padded = share.new_zeros(max(lengths), *share.shape[1:], device=self.device)
        padded[: len(share)] = share
        parts = zip(self._gather_equal(padded), lengths, strict=True)
        return torch.cat([part[:length] for part, length in parts]).to(share.device)

    def _gather_equal(self, value: Tensor) -> list[Tensor]:
        """Return the values of all processes, of one shape."""
        values = [torch.empty_like(value) for _ in range(self.count)]
        distributed.all_gather(values, value)
        return values

    def check_shares(self, **counts: int) -> None:
        """Refuse work that leaves a process without a share.

        Raises:
            ValueError: naming it.
        """
        for name, count in counts.items():
            if count < self.count:
                raise ValueError(
                    f"{name} = {count} cannot be shared by {self.count} processes: start fewer, or "
                    f"ask for more {name}"
                )

    def check_batches(self, samples: int, batch_size: int) -> None:
        """Refuse batches that leave a process without a sample.

        Raises:
            ValueError: naming the smallest batch.
        """
        smallest = min(samples % batch_size or batch_size, batch_size)
        if smallest < self.count:
            raise ValueError(
                f"{samples} samples in batches of {batch_size} leave a batch of {smallest} for "
                f"{self.count} processes: choose another batch_size"
            )

    def replicate(self, model: nn.Module) -> nn.Module:
        """Return the model with gradients that are averaged over all processes."""
        if self.count == 1:
            return model
        devices = [self.device] if self.device.type == "cuda" else None
        return DistributedDataParallel(model, device_ids=devices)

    def total(self, value: Tensor) -> Tensor:
        """Return the sum over all processes."""
        if self.count > 1:
            distributed.all_reduce(value)
        return value

    def wait(self) -> None:
        """Wait until every process has reached this call."""
        if self.count > 1:
            distributed.barrier()

    @contextmanager
    def in_turn(self) -> Iterator[None]:
        """Let the first process go ahead, the others follow."""
        if not self.first:
            self.wait()
        yield
        if self.first:
            self.wait()


ALONE = Processes(device=torch.device("cpu"))
"""One process on the CPU."""


def without_synchronisation(replica: nn.Module) -> AbstractContextManager[None]:
    """Return a context in which gradients of a replica are not averaged over processes.

    Args:
        replica: as `Processes.replicate` returns it.
    """
    if isinstance(replica, DistributedDataParallel):
        return replica.no_sync()
    return nullcontext()


def is_first() -> bool:
    """Return whether this process is the first that torchrun started, or the only one."""
    return not distributed.is_torchelastic_launched() or int(os.environ["RANK"]) == 0


def find_device(device: str | torch.device) -> torch.device:
    """Return the device of this name, if this machine has it.

    Args:
        device: cpu, cuda, or cuda:1 for the second one.

    Raises:
        ValueError: naming the device and what there is.
    """
    try:
        found = torch.device(device)
    except (RuntimeError, TypeError):
        found = torch.device("meta")
    if found.type not in ("cpu", "cuda"):
        raise ValueError(f"device must be cpu or cuda, got {str(device)!r}")
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        there = (
            f"there are {torch.cuda.device_count()}"
            if torch.cuda.is_available()
            else ("torch sees no CUDA device here")
        )
        raise ValueError(f"device {str(device)!r} is not there: {there}; take --device cpu")
    return found


@contextmanager
def processes(device: str) -> Iterator[Processes]:
    """Return a context that joins the processes that torchrun started, or stands alone.

    Args:
        device: cpu or cuda; with several processes on CUDA each takes the device of its local rank.

    Returns:
        A context whose value is the processes, seen from this one.

    Raises:
        ValueError: if there is no such device.
    """
    own = find_device(device)
    if not distributed.is_torchelastic_launched():
        yield Processes(device=own)
        return
    if own.type == "cuda":
        own = find_device(torch.device("cuda", int(os.environ["LOCAL_RANK"])))
        torch.cuda.set_device(own)
    store, rank, count = next(rendezvous("env://", timeout=_PATIENCE))
    # A run may join again, and must not find the addresses of the last time.
    joined = (store.add("joined", 1) - 1) // count
    distributed.init_process_group(
        "nccl" if own.type == "cuda" else "gloo", timeout=_PATIENCE, rank=rank, world_size=count,
        store=PrefixStore(f"joined {joined}", store),
    )  # fmt: skip
    try:
        yield Processes(device=own, rank=rank, count=count)
    finally:
        distributed.destroy_process_group()
