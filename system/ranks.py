"""The processes that learn one agent together: what each of them is to do, and what they decide with one another.

`here()` is what a process knows of them: `Alone`, where it is the only one, or `Together`, started by torchrun. Both
have the same verbs, so that who uses them never asks how many there are. Each verb is called by all ranks, in the same
order; inside of `apart()` a rank works on its own.
"""

from __future__ import annotations

import os
import signal
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed
from jaxtyping import Shaped
from torch import Tensor
from torch.distributed.rendezvous import rendezvous

from system.arrivals import Arrival
from system.errors import ConfigError, UserError

# How long a rank waits for another. The first one evaluates while the others wait.
PATIENCE = timedelta(hours=2)
# After how many updates an outcome is read that comes from another device, so that all ranks read it at the same time.
LAG = 4

Balance = Callable[[Tensor], Tensor]


class RankLostError(UserError):
    """Another rank has ended, without which nothing goes on."""


class Ranks(ABC):
    """The processes that learn together; this one is the `index`-th of `count`."""

    index: int
    count: int

    @property
    def is_first(self) -> bool:
        """Whether this rank speaks, logs and saves for all."""
        return self.index == 0

    def share(self, total: int, name: str) -> int:
        """This rank's part of a number that all ranks share.

        Raises:
            ConfigError: it cannot be shared out evenly.
        """
        if total % self.count:
            raise ConfigError(f"{name} is {total}, which {self.count} ranks share: give a multiple of {self.count}")
        return total // self.count

    @abstractmethod
    def average(
        self, gradients: Sequence[Tensor | None], losses: Sequence[Tensor]
    ) -> tuple[Sequence[Tensor | None], Sequence[Tensor]]:
        """Gradients and losses, each the mean over the ranks; where one of them is not finite, it is so on all."""

    @abstractmethod
    def balance(self, weights: Tensor) -> Balance:
        """What makes of a mean by this rank's weights its part of the mean by those of all ranks.

        The mean over the ranks of what it gives is that over all rows, however the weights are spread.
        """

    @abstractmethod
    def gather(self, values: Shaped[Tensor, "B *S"]) -> Shaped[Tensor, "R *S"]:
        """The values of all ranks, those of the first rank first."""

    @abstractmethod
    def widest(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        """The least of all lower limits and the largest of all upper ones."""

    @abstractmethod
    def add(self, number: int) -> int:
        """The sum of a number of the host's."""

    @abstractmethod
    def agree(self, request: str | None) -> str | None:
        """The first request that any rank has; None where none has any."""

    @abstractmethod
    def collect(self, thing: Any) -> list[Any]:
        """On the first rank what all have, in their order; nothing on the others."""

    @abstractmethod
    def wait(self) -> None:
        """Wait for all."""

    @contextmanager
    def first_goes_first(self) -> Iterator[None]:
        """Let the first rank do what is within before the others do it."""
        if not self.is_first:
            self.wait()
        yield
        if self.is_first:
            self.wait()

    @abstractmethod
    def is_due(self, arrival: Arrival, *, behind: int) -> bool:
        """Whether an outcome, `behind` others back, is to be read now: on all ranks at the same time."""


class Alone(Ranks):
    """The only process. Nothing is computed that would not be without ranks."""

    index, count = 0, 1

    def average(
        self, gradients: Sequence[Tensor | None], losses: Sequence[Tensor]
    ) -> tuple[Sequence[Tensor | None], Sequence[Tensor]]:
        return gradients, losses

    def balance(self, weights: Tensor) -> Balance:
        return _as_it_is

    def gather(self, values: Shaped[Tensor, "B *S"]) -> Shaped[Tensor, "R *S"]:
        return values

    def widest(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        return low, high

    def add(self, number: int) -> int:
        return number

    def agree(self, request: str | None) -> str | None:
        return request

    def collect(self, thing: Any) -> list[Any]:
        return [thing]

    def wait(self) -> None:
        """There is nobody to wait for."""

    def is_due(self, arrival: Arrival, *, behind: int) -> bool:
        return arrival.is_there()


class Together(Ranks):
    """One of several processes, between which tensors travel by torch.distributed: gloo on the host, NCCL on CUDA."""

    def __init__(self) -> None:
        """Take the process group, which is there."""
        self.index, self.count = torch.distributed.get_rank(), torch.distributed.get_world_size()

    def average(
        self, gradients: Sequence[Tensor | None], losses: Sequence[Tensor]
    ) -> tuple[Sequence[Tensor | None], Sequence[Tensor]]:
        given = [each for each in gradients if each is not None] + [loss.detach() for loss in losses]
        means = list(given)
        # One message for each kind of number, and all are of one kind as a rule.
        for kind in dict.fromkeys(each.dtype for each in given):
            places = [place for place, each in enumerate(given) if each.dtype == kind]
            flat = torch.cat([given[place].reshape(-1) for place in places])
            self._reduce(flat, torch.distributed.ReduceOp.SUM)
            flat /= self.count
            parts = flat.split([given[place].numel() for place in places])
            for place, part in zip(places, parts, strict=True):
                means[place] = part.view(given[place].shape)
        found = iter(means)
        return [None if each is None else next(found) for each in gradients], list(found)

    def balance(self, weights: Tensor) -> Balance:
        total = weights.detach().sum()
        # Flags are counted.
        total = total if total.is_floating_point() else total.double()
        mean = total.clone()
        self._reduce(mean, torch.distributed.ReduceOp.SUM)
        mean /= self.count
        # Where nothing counts anywhere, there is nothing to weigh.
        factor = total / torch.where(mean > 0, mean, torch.ones_like(mean))
        return lambda value: value * factor.to(value.dtype)

    def gather(self, values: Shaped[Tensor, "B *S"]) -> Shaped[Tensor, "R *S"]:
        parts = [torch.empty_like(values) for _ in range(self.count)]
        with _alive():
            torch.distributed.all_gather(parts, values.contiguous())
        return torch.cat(parts)

    def widest(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        limits = torch.stack((-low, high))
        self._reduce(limits, torch.distributed.ReduceOp.MAX)
        return -limits[0], limits[1]

    def add(self, number: int) -> int:
        return int(self._on_host(number, torch.distributed.ReduceOp.SUM))

    def agree(self, request: str | None) -> str | None:
        if not self._on_host(int(request is not None), torch.distributed.ReduceOp.MAX):
            return None
        requests: list[Any] = [None] * self.count
        with _alive():
            torch.distributed.all_gather_object(requests, request)
        return next(each for each in requests if each is not None)

    def collect(self, thing: Any) -> list[Any]:
        things: list[Any] | None = [None] * self.count if self.is_first else None
        with _alive():
            torch.distributed.gather_object(_on_cpu(thing), things)
        return things or []

    def wait(self) -> None:
        # A barrier of NCCL's would be one of the devices.
        self.add(0)

    def is_due(self, arrival: Arrival, *, behind: int) -> bool:
        return arrival.is_immediate or behind >= LAG

    def _on_host(self, number: int, operation: Any) -> int:
        value = torch.tensor(number, device="cpu")
        self._reduce(value, operation)
        return int(value)

    def _reduce(self, value: Tensor, operation: Any) -> None:
        with _alive():
            torch.distributed.all_reduce(value, operation)


_here: Ranks = Alone()


def here() -> Ranks:
    """What this process knows of the ranks. A process is one of them for good, as it has one number of threads."""
    return _here


@contextmanager
def joined() -> Iterator[Ranks]:
    """Be one of the ranks that torchrun has started, or alone where it has not.

    Raises:
        ConfigError: the ranks do not find one another.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield _here
        return
    on_cuda = torch.cuda.is_available()
    if on_cuda:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    backend = "cpu:gloo,cuda:nccl" if on_cuda else "gloo"
    try:
        store, rank, count = next(rendezvous("env://", timeout=PATIENCE))
        # Where torchrun starts ranks again, the addresses of those before are still there.
        attempt = torch.distributed.PrefixStore(f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
        torch.distributed.init_process_group(backend, store=attempt, rank=rank, world_size=count, timeout=PATIENCE)
    except (RuntimeError, ValueError) as error:
        cause = " ".join(str(error).split())[:160]
        raise ConfigError(f"the ranks do not find one another ({cause}); start them by torchrun") from error
    try:
        with _being(Together()) as ranks:
            yield ranks
    except RankLostError:
        # Torchrun tells the others to stop, too; they are stopping, and say why.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        raise
    finally:
        torch.distributed.destroy_process_group()


@contextmanager
def apart() -> Iterator[None]:
    """Within this, the rank works as if it were alone: what it computes concerns no other."""
    with _being(Alone()):
        yield


@contextmanager
def _being(ranks: Ranks) -> Iterator[Ranks]:
    global _here
    before, _here = _here, ranks
    try:
        yield ranks
    finally:
        _here = before


@contextmanager
def _alive() -> Iterator[None]:
    """Say in one line that another rank is no more, which is what an exchange with it fails by."""
    try:
        yield
    except RuntimeError as error:
        raise RankLostError(
            "another rank has ended, and its own message says why; the same command goes on from the last checkpoint"
        ) from error


def _as_it_is(value: Tensor) -> Tensor:
    return value


def _on_cpu(thing: Any) -> Any:
    """A nested thing with all its tensors on the host."""
    if isinstance(thing, Tensor):
        return thing.detach().cpu()
    if isinstance(thing, dict):
        return {key: _on_cpu(value) for key, value in thing.items()}
    if isinstance(thing, (list, tuple)):
        moved = [_on_cpu(value) for value in thing]
        return moved if isinstance(thing, list) else tuple(moved)
    return thing
