"""Counting memory: how many bytes the tape holds, by op, and how many the process uses.

    with track_memory(model, optimizer) as m:
        model.loss(x, y).backward()
        optimizer.step()
    print(m)                      # parameters, gradients, optimizer state, activations by op at the peak
    m.plot().savefig("memory.png")

The tape's count is exact and the same on every machine: the bytes of every buffer that some node holds, each counted
once, however many views of it are saved; parameters are counted as parameters. It does not include temporary arrays
inside an op; the process's peak does.
"""

import sys
import threading
import weakref
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from . import autograd
from .array import Array, cupy, is_array
from .nn import Module, Parameter
from .optim import Optimizer
from .settings import Block
from .tensor import Tensor

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass
class Snapshot:
    """What was held at one moment, in bytes."""

    saved: Counter[str] = field(default_factory=Counter)  # activations saved for backward, by op
    copies: int = 0  # parameters in another dtype, made by autocast
    flowing: int = 0  # gradients of activations, during backward
    gradients: int = 0  # of parameters

    @property
    def activations(self) -> int:
        return sum(self.saved.values())

    @property
    def total(self) -> int:
        return self.activations + self.copies + self.flowing + self.gradients


class track_memory(Block):
    """Context manager that counts what the tape holds, the workers' tapes too, after each op's forward and backward.

    `model` and `optimizer` are optional; with them, gradients, parameters and optimizer state are in the table too.
    `now` and `peak` are Snapshots; `timeline` has one for each count. Slow: meant for a step, not for a run.
    `seldom` counts when a backward begins and after every so many ops only: fast, and the peak is nearly the same.
    """

    def __init__(self, model: Module | None = None, optimizer: Optimizer | None = None, seldom: bool = False):
        super().__init__(tracker=self)
        self.seldom, self._uncounted = seldom, 0  # ops since the last count
        self.parameters = list(model.parameters()) if model is not None else []
        self.optimizer = optimizer
        self.timeline: list[Snapshot] = []
        self._nodes: weakref.WeakSet[autograd.Op] = weakref.WeakSet()
        self._walks: weakref.WeakSet[autograd.Walk] = weakref.WeakSet()
        self._weights = {id(buffer_of(p.data)) for p in self.parameters}
        self._leaves: dict[int, Any] = {}  # weak references to all parameters seen, the workers' replicas too
        self._copies: dict[int, Any] = {}  # id -> weak reference of autocast's copies of parameters
        self._lock = threading.Lock()

    def recorded(self, op: autograd.Op, outputs: Sequence[Array]) -> None:
        """Called by the engine for a new node."""
        with self._lock:
            self._nodes.add(op)
            self._leaves |= {id(leaf): weakref.ref(leaf) for leaf in op.parents or () if isinstance(leaf, Parameter)}
            if op.name() == "Cast" and isinstance((op.parents or (None,))[0], Parameter):
                self._copies[id(outputs[0])] = weakref.ref(outputs[0])
            self._look()

    def look(self, walk: autograd.Walk | None = None) -> None:
        """Count what is held now; the engine calls it after it has released a node of a walk."""
        with self._lock:
            begins = walk is not None and walk not in self._walks
            if walk is not None:
                self._walks.add(walk)
            self._look(begins)

    def _look(self, now: bool = False) -> None:
        self._uncounted += 1
        if self.seldom and not now and self._uncounted < len(self._nodes) / 10:  # a count looks at every node
            return
        self._uncounted = 0
        seen_leaves = {id(p): p for p in (ref() for ref in self._leaves.values()) if p is not None}
        leaves = {id(p): p for p in self.parameters} | seen_leaves
        ours = [p for p in leaves.values() if id(buffer_of(p.data)) in self._weights]
        sums = [(key, a) for walk in self._walks for key, a in list(walk.sums.items())]
        in_walks = [(key, a) for key, a in sums if isinstance(key, Tensor)]
        snapshot = Snapshot(
            gradients=sum(p.grad.nbytes for p in ours if p.grad is not None)
            + sum(a.nbytes for p, a in in_walks if id(buffer_of(p.data)) in self._weights)
        )
        seen = {id(buffer_of(p.data)) for p in leaves.values()}
        for op, buffer in saved_buffers(self._nodes, seen):
            copy = self._copies.get(id(buffer))
            if copy is not None and copy() is buffer:
                snapshot.copies += buffer.nbytes
            else:
                snapshot.saved[op.name()] += buffer.nbytes
        for key, gradient in sums:
            if not isinstance(key, Tensor) and id(buffer_of(gradient)) not in seen:
                seen.add(id(buffer_of(gradient)))
                snapshot.flowing += buffer_of(gradient).nbytes
        self.timeline.append(snapshot)

    @property
    def now(self) -> Snapshot:
        return self.timeline[-1] if self.timeline else Snapshot()

    @property
    def peak(self) -> Snapshot:
        """The snapshot with the largest total."""
        return max(self.timeline, key=lambda s: s.total, default=Snapshot())

    @property
    def peak_activations(self) -> int:
        """The largest number of bytes of activations saved at one moment."""
        return max((s.activations for s in self.timeline), default=0)

    def __str__(self) -> str:
        peak = self.peak
        rows = [("parameters", sum(p.data.nbytes for p in self.parameters)), ("gradients", peak.gradients)]
        if self.optimizer is not None:
            rows.append(("optimizer state", self.optimizer.nbytes()))
        if peak.copies:
            rows.append(("parameters, cast", peak.copies))
        rows.append(("activations", peak.activations))
        rows += [(f"  {name}", size) for name, size in peak.saved.most_common()]
        rows.append(("their gradients", peak.flowing))
        rows.append(("the process's peak", peak_rss()))
        pool = cupy().get_default_memory_pool().total_bytes() if "cupy" in sys.modules else 0
        if pool:
            rows.append(("CuPy's pool", pool))
        return "\n".join(
            [f"{'held at the peak':24}{'MB':>10}"] + [f"{name:24}{size / 1e6:10.2f}" for name, size in rows]
        )

    def plot(self) -> "Figure":
        """A picture of the tape's memory over the step: rising in forward, falling in backward."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(8, 4.5), layout="constrained")
        axes = figure.subplots()
        layers = {
            "activations saved for backward": [s.activations for s in self.timeline],
            "parameters, cast": [s.copies for s in self.timeline],
            "gradients of activations": [s.flowing for s in self.timeline],
            "gradients of parameters": [s.gradients for s in self.timeline],
        }
        in_mb = {name: [b / 1e6 for b in values] for name, values in layers.items() if any(values)}
        colors = ["#4477aa", "#ccbb44", "#ee6677", "#228833"]
        if in_mb:
            axes.stackplot(range(len(self.timeline)), *in_mb.values(), labels=in_mb.keys(), colors=colors, alpha=0.85)
            axes.legend(frameon=False, loc="upper left")
        axes.set(xlabel="ops, forward and then backward", ylabel="MB held", xlim=(0, max(1, len(self.timeline) - 1)))
        axes.spines[["top", "right"]].set_visible(False)
        return figure


def saved_buffers(nodes: Iterable[autograd.Op], seen: set[int]) -> Iterator[tuple[autograd.Op, Array]]:
    """(op, buffer) of every buffer that the nodes have saved, each once, with the oldest node that saved it.

    `seen` holds the ids of buffers that are not to be counted; those found are added to it.
    """
    for op in sorted(nodes, key=lambda op: op.order):
        for buffer in map(buffer_of, _arrays(op.saved)):
            if id(buffer) not in seen:
                seen.add(id(buffer))
                yield op, buffer


def _arrays(saved: Any) -> list[Array]:
    """All arrays in nested tuples and lists."""
    if is_array(saved):
        return [saved]
    return [a for x in saved for a in _arrays(x)] if isinstance(saved, tuple | list) else []


def buffer_of(array: Array) -> Array:
    """The array that owns the memory of a view."""
    while is_array(array.base):
        array = array.base
    return array


def peak_rss() -> int:
    """The peak resident memory of this process, in bytes."""
    if sys.platform == "linux":  # ru_maxrss counts what the parent had before exec; VmHWM starts with this program
        with open("/proc/self/status") as status:
            return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))
    import resource  # not on Windows, where the rest of this file works

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # macOS: bytes
