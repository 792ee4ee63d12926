"""Jobs done one after the other in this process, or by several that work side by side."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import Protocol, TypeVar, runtime_checkable

from system.errors import UserError
from system.processes import pool_of

Job = TypeVar("Job")
Result = TypeVar("Result")


@runtime_checkable
class Workers(Protocol):
    """Who does jobs."""

    def each(self, work: Callable[[Job], Result], jobs: Sequence[Job]) -> Iterator[tuple[Job, Result]]:
        """Every job with its result, as soon as it is done.

        Raises:
            UserError: a job cannot be done.
        """


class LocalWorker:
    """This process alone, for finding faults and for profiles."""

    def each(self, work: Callable[[Job], Result], jobs: Sequence[Job]) -> Iterator[tuple[Job, Result]]:
        """Every job in turn."""
        return ((job, work(job)) for job in jobs)


class ProcessWorkers:
    """Processes side by side, each with a job at a time."""

    def __init__(self, pool: ProcessPoolExecutor) -> None:
        """Use the processes of a pool."""
        self._pool = pool

    def each(self, work: Callable[[Job], Result], jobs: Sequence[Job]) -> Iterator[tuple[Job, Result]]:
        """Every job as it is done."""
        futures = {self._pool.submit(work, job): job for job in jobs}
        try:
            for future in as_completed(futures):
                yield futures[future], future.result()
        except BrokenProcessPool as error:
            raise UserError(
                "a process that was computing has died, as where memory runs out; what is done is kept: give the same"
                " command again, with fewer --cache.workers"
            ) from error


@contextmanager
def workers_of(processes: int) -> Iterator[Workers]:
    """So many processes, or with 0 this one; they end with the block."""
    if not processes:
        yield LocalWorker()
        return
    with pool_of(processes) as pool:
        yield ProcessWorkers(pool)
