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
from queue import SimpleQueue
from typing import Any, Protocol, TypeVar

import numpy as np

from .array import Array
from .nn import Module

Result = TypeVar("Result")


class Reducer(Protocol):
    """How gradients are added up over the workers: here threads, elsewhere perhaps processes or machines."""

    def sum_(self, parts: Sequence[list[Array | None]]) -> list[Array | None]:
        """parts[r] are the arrays of this process's worker r, None for zeros; returns their sums, in parts[0]'s memory.

        They are added in the order of the workers, so that the sums are bit for bit equal on every run. It is also
        called if this process has only one worker.
        """


class Workers:
    """`size` threads that work on one model. As a context manager it limits BLAS to one thread each, then restores it.

    A single worker runs in the calling thread, on the model itself, with BLAS unchanged. Every worker runs in a copy of
    the caller's context: it has the caller's settings and randomness, and changes neither.
    """

    def __init__(self, model: Module, size: int):
        if size < 1:
            raise ValueError(f"threads must be at least 1, not {size}")
        self.size = size
        self.model = model
        self.reducer: Reducer = self
        self._replicate()

    def _replicate(self) -> None:
        self.models: list[Any] = [replica(self.model) for _ in range(self.size)] if self.size > 1 else [self.model]
        self.parameters = [list(each.parameters()) for each in self.models]

    def __enter__(self) -> "Workers":
        if self.size > 1:
            from threadpoolctl import threadpool_limits

            self._threads = [_Thread() for _ in range(self.size)]
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
        if self.size == 1:
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
            self._threads = [_Thread() for _ in range(self.size)]
            self._replicate()
            raise
        return [future.result() for future in futures]

    def gradient(self, work: Callable[[int, Any], Result]) -> list[Result]:
        """[work(rank, model), ...]. Each call adds to its replica's gradients; their sums are added to the model's."""
        if self.size > 1:
            for model in self.models:
                model.zero_grad()
        models = self.models
        results = self.run(lambda rank: work(rank, models[rank]))
        with np.errstate(over="ignore", invalid="ignore"):  # the caller checks the gradients for non-finite values
            sums = self.reducer.sum_([[p.grad for p in own] for own in self.parameters])
            for p, grad in zip(self.model.parameters(), sums, strict=True):
                if self.size == 1 or p.grad is None:
                    p.grad = grad
                elif grad is not None:
                    p.grad = p.grad + grad
        return results

    def sum_(self, parts: Sequence[list[Array | None]]) -> list[Array | None]:
        """Each thread adds up a share of the arrays."""
        sums: list[Any] = [None] * len(parts[0])

        def add(rank: int) -> None:
            for i in range(rank, len(sums), self.size):
                for part in parts:
                    if sums[i] is None:
                        sums[i] = part[i]
                    elif part[i] is not None:
                        sums[i] += part[i]

        self.run(add)
        return sums

    def share(self, n: int, rank: int) -> slice:
        """The slice of `n` items for worker `rank`: consecutive, of nearly equal size."""
        return slice(n * rank // self.size, n * (rank + 1) // self.size)


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
