"""Several processes that train as one: who is who, and sums over all of them.

A loss that is not a mean over samples (Dice, a weighted mean) is built from global sums, so that
every process holds the loss of the whole batch, and the averaged gradients are its gradients.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any, NoReturn

import torch
import torch.distributed as dist

# before any group is there: its functions have the group of that moment as default arguments,
# which would keep that group's threads until Python ends, and abort it by chance
import torch.distributed.nn.functional
from torch import Tensor

from .devices import resolve_device


def rank() -> int:
    """Returns the number of this process, 0 for the one that writes."""
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    """Returns the number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def launched_number(name: str, default: str = "") -> int:
    """Returns a number that torchrun gives its processes, such as RANK.

    Raises:
        ValueError: If the environment has none, and there is no default.
    """
    value = os.environ.get(name, default)
    if not value.isdecimal():
        raise ValueError(
            f"environment variable {name} is {value or 'not set'}, expected a whole number, as "
            "torchrun sets it; unset WORLD_SIZE and RANK to train as one process"
        )
    return int(value)


@contextmanager
def process_group(device: str) -> Iterator[torch.device]:
    """Joins the processes that torchrun started, if it did, and gives this one its device.

    Raises:
        ConnectionError: If another process stops; the checkpoints allow to go on.
        ValueError: If the device is not there, or a number that torchrun sets is none.
    """
    own = resolve_device(device)
    if launched_number("WORLD_SIZE", "1") == 1:
        yield own
        return
    for name in ("RANK", "MASTER_PORT"):
        launched_number(name)
    if own.type == "cuda":
        own = resolve_device(f"cuda:{launched_number('LOCAL_RANK')}")
        torch.cuda.set_device(own)
    dist.init_process_group("nccl" if own.type == "cuda" else "gloo")
    # torchrun's word to the others when one process has ended
    before = signal.signal(signal.SIGTERM, _stop)
    try:
        yield own
    except RuntimeError as error:
        # which may come while this is said
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        if not isinstance(error, dist.DistError | _Stopped) and "onnection" not in str(error):
            raise
        raise ConnectionError(
            f"process {rank()} of {world()} stopped because another one ended or was killed; "
            "give the same command again to go on from the last checkpoint"
        ) from error
    finally:
        dist.destroy_process_group()
        signal.signal(signal.SIGTERM, before)


class _Stopped(RuntimeError):
    pass


def _stop(number: int, frame: object) -> NoReturn:
    raise _Stopped


def barrier() -> None:
    """Waits until all processes are here."""
    if dist.is_initialized():
        dist.barrier()


def gathered(value: Any, group: dist.ProcessGroup | None = None) -> list[Any]:
    """Returns every process's value, in their order."""
    if not dist.is_initialized():
        return [value]
    values = [None] * world()
    dist.all_gather_object(values, value, group)
    return values


@contextmanager
def first_alone() -> Iterator[bool]:
    """Lets the first process work while the others wait, a day if need be; yields whether it is.

    A plain barrier gives up after ten minutes under NCCL, which a large cache takes longer than.

    Raises:
        ConnectionError: In the others, if the first one's work raised or its process ended.
    """
    if not dist.is_initialized():
        yield True
        return
    # made before the work: those who wait see a process end by its connection alone
    patient = dist.new_group(backend="gloo", timeout=timedelta(days=1))
    try:
        yield rank() == 0
    except _Stopped:
        raise
    except Exception:
        # whoever is gone too need not hear of it
        with suppress(RuntimeError):
            gathered(False, patient)
        raise
    worked = gathered(True, patient)
    dist.destroy_process_group(patient)
    if not all(worked):
        raise ConnectionError(
            f"process {rank()} of {world()} stopped because process {worked.index(False)} failed; "
            "mend what that one names, then give the same command again"
        )


class _Sum(torch.autograd.Function):
    """Sum over processes; all hold the same loss, whose gradients are then averaged."""

    @staticmethod
    def forward(ctx: Any, input: Tensor) -> Tensor:
        total = input.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        # the mean over processes divides by their number again
        return grad * dist.get_world_size()


def global_sum(input: Tensor) -> Tensor:
    """Returns the sum over all processes, differentiable; the input itself where there is one."""
    return _Sum.apply(input) if dist.is_initialized() else input


def global_mean(input: Tensor) -> Tensor:
    """Returns the mean of all elements of all processes, each of which has as many."""
    return global_sum(input.sum()) / (input.numel() * world())


def average_(tensors: list[Tensor]) -> None:
    """Replaces tensors by their means over all processes."""
    if dist.is_initialized() and tensors:
        flat = torch.cat([tensor.detach().flatten() for tensor in tensors])
        dist.all_reduce(flat)
        parts = (flat / dist.get_world_size()).split([tensor.numel() for tensor in tensors])
        for tensor, part in zip(tensors, parts, strict=True):
            tensor.copy_(part.view_as(tensor))
