"""One batch over several workers: each computes the gradient of its own sequences, and the gradients are summed.

Splitting the *batch* over threads is faster than threads inside each op: a thread runs the whole model on its own
sequences, with one BLAS thread and data that stay in its core's cache, and waits for the others once a step. A worker
has a replica of the model that shares the weights but has its own gradients.
"""

import contextvars
import copy
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from itertools import zip_longest
from queue import SimpleQueue
from typing import Any, Protocol, TypeVar

import numpy as np

from .array import Array
from .nn import Module

Result = TypeVar("Result")


class Group(Protocol):
    """Processes that train one model together, each on its own copy: perhaps on several machines."""

    rank: int  # of this process, from 0
    size: int  # number of processes

    def sum_(self, arrays: list[Array | None]) -> list[Array | None]:
        """The sums over all processes of their `arrays` (None for zeros), which it may overwrite.

        Every process gets the same sums, bit for bit, and the same on every run; see `tree_sum`.
        """


class Alone:
    """The group of a single process."""

    rank, size = 0, 1

    def sum_(self, arrays: list[Array | None]) -> list[Array | None]:
        return arrays


class Workers:
    """Threads that work on one model. As a context manager it limits BLAS to one thread each, then restores it.

    A single one runs in the calling thread, on the model itself, with BLAS unchanged. Each runs in a copy of the
    caller's context: it has the caller's settings and randomness, and changes neither. With a `group` there are as many
    in each of its processes, `size` in all; a `rank` here counts the threads of this process from 0.
    """

    def __init__(self, model: Module, threads: int, group: Group | None = None):
        if threads < 1:
            raise ValueError(f"threads must be at least 1, not {threads}")
        self.threads = threads
        self.group = group or Alone()
        self.size = threads * self.group.size
        self.model = model
        self._replicate()

    def _replicate(self) -> None:
        self.models: list[Any] = (
            [replica(self.model) for _ in range(self.threads)] if self.threads > 1 else [self.model]
        )
        self.parameters = [list(each.parameters()) for each in self.models]

    def __enter__(self) -> "Workers":
        if self.size > 1:
            from threadpoolctl import threadpool_limits

            self._threads = [_Thread() for _ in range(self.threads if self.threads > 1 else 0)]
            self._limits = threadpool_limits(1, "blas")
        return self

    def __exit__(self, *error: Any) -> None:
        if self.size > 1:
            self._limits.restore_original_limits()
            for thread in self._threads:
                thread.jobs.put(None)

    def run(self, work: Callable[[int], Result]) -> list[Result]:
        """[work(0), work(1), ...], each in its own thread.

        An exception in a worker is raised here after all have ended. Ctrl-C does not wait: the threads finish on old
        replicas, whose gradients are never read.
        """
        if self.threads == 1:
            return [contextvars.copy_context().run(work, 0)]
        for p, *copies in zip(self.model.parameters(), *self.parameters, strict=True):
            for copied in copies:
                copied.requires_grad = p.requires_grad
                copied.data = p.data  # no change, unless the model's parameter was assigned another array
        futures = [thread.submit(contextvars.copy_context(), work, rank) for rank, thread in enumerate(self._threads)]
        try:
            wait(futures)
        except BaseException:
            for thread in self._threads:
                thread.jobs.put(None)
            self._threads = [_Thread() for _ in range(self.threads)]
            self._replicate()
            raise
        return [future.result() for future in futures]

    def gradient(self, work: Callable[[int, Any], Result]) -> list[Result]:
        """[work(rank, model), ...]. Each call adds to its replica's gradients; their sums are added to the model's."""
        before = [p.grad for p in self.model.parameters()]
        sums: list[Array | None] = [None] * len(before)
        models = self.models  # those of now: after a Ctrl-C, threads may go on with them
        for model in models:
            model.zero_grad()
        try:
            results = self.run(lambda rank: work(rank, models[rank]))
            with np.errstate(over="ignore", invalid="ignore"):  # the caller checks the gradients for non-finite values
                sums = self.group.sum_(self._sums([[p.grad for p in own] for own in self.parameters]))
        finally:
            for p, old, new in zip(self.model.parameters(), before, sums, strict=True):
                p.grad = new if old is None else old if new is None else old + new
        return results

    def _sums(self, parts: Sequence[list[Array | None]]) -> list[Array | None]:
        """The sums of the threads' arrays, in the memory of the first; each thread adds up a share of them."""
        if self.threads == 1:
            return parts[0]
        sums: list[Any] = [None] * len(parts[0])

        def add(rank: int) -> None:
            for i in range(rank, len(sums), self.threads):
                sums[i] = tree_sum([part[i] for part in parts])

        self.run(add)
        return sums

    def share(self, n: int, rank: int) -> slice:
        """The slice of `n` items for thread `rank`: consecutive, of nearly equal size."""
        worker = self.group.rank * self.threads + rank
        return slice(n * worker // self.size, n * (worker + 1) // self.size)

    def gather(self, parts: Sequence[Sequence[float]], n: int) -> list[float]:
        """`n` numbers, of which each thread `rank` of each process has those of `share(n, rank)`: `parts[rank]`."""
        numbers = np.zeros(n)
        for rank, part in enumerate(parts):
            numbers[self.share(n, rank)] = part
        (gathered,) = self.group.sum_([numbers])
        assert gathered is not None
        return gathered.tolist()


def tree_sum(arrays: Sequence[Array | None]) -> Array | None:
    """The sum of arrays (None for zeros), which it overwrites: (0 + 1) + (2 + 3) and so on; an odd one passes up.

    A group that adds up along the same tree gives the same bits however many threads each of its processes has, if that
    is a power of two.
    """
    while len(arrays) > 1:
        arrays = [_plus(a, b) for a, b in zip_longest(arrays[::2], arrays[1::2])]
    return arrays[0]


def _plus(a: Any, b: Any) -> Any:
    if a is None or b is None:
        return b if a is None else a
    a += b
    return a


class _Thread(threading.Thread):
    """Does one job after another. A daemon, unlike a ThreadPoolExecutor's thread, so Ctrl-C need not wait for it."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.jobs: SimpleQueue[Any] = SimpleQueue()
        self.start()

    def submit(self, *job: Any) -> "Future[Any]":
        future: Future[Any] = Future()
        self.jobs.put((future, *job))
        return future

    def run(self) -> None:
        while (job := self.jobs.get()) is not None:
            future, context, call, rank = job
            try:
                future.set_result(context.run(call, rank))
            except BaseException as error:
                future.set_exception(error)
            del job, future, context, call  # otherwise they would live until the next job


def replica(model: Module) -> Module:
    """A copy of the model that shares the memory of weights and buffers, and has its own gradients."""
    shared: dict[int, Any] = {}
    for x in (*model.parameters(), *model.buffers()):
        shared[id(x)] = copy.copy(x)
        shared[id(x)].grad = None
    return copy.deepcopy(model, shared)


def available_cores() -> int:
    """The number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
