"""Where the time of a training step goes: products, attention, element-wise work, the optimizer, the tape.

    python benchmarks/breakdown.py [--config S M] [--steps N] [--json FILE]

The forward and backward of every op are timed while a step runs, alternately with NumPy alone and with the best
engines, in one thread with one BLAS thread, like a worker of a step. The rest of the step's time, beyond its ops and
its optimizer, is the tape: recording, walking back, adding gradients up, the modules' Python.

(It is not called profile.py: a script's folder comes first on Python's path, and would hide the standard library's.)
"""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial, wraps
from time import perf_counter
from typing import Any
from unittest import mock

import common
from threadpoolctl import threadpool_limits
from train_step import CLIP, CONFIGS, LR, WEIGHT_DECAY, batch

import tinylm
from tinylm import GPT, Op
from tinylm.array import keep_freed_memory
from tinylm.optim import AdamW, clip, decay_groups

PARTS = {
    "matmul": ("MatMul", "Linear"),
    "attention": ("CausalAttention",),
    "output layer and loss": ("LinearCrossEntropy",),
    "element-wise": (),  # every other op: layer norm, GELU, sums, softmax, embedding, copies that reshape
    "optimizer": ("optimizer",),
    "tape": ("tape",),
}


def part_of(op: str) -> str:
    return next((part for part, ops in PARTS.items() if op in ops), "element-wise")


class Stopwatch:
    """Sums the seconds of calls by name. A nested call, such as a twin's to its reference, counts once."""

    def __init__(self) -> None:
        self.seconds: Counter[str] = Counter()
        self.running = False

    def timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            if self.running:
                return function(*args, **kwargs)
            self.running = True
            started = perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self.seconds[name] += perf_counter() - started
                self.running = False

        return call

    @contextmanager
    def watch_ops(self) -> Iterator[None]:
        """Time forward and backward of every op, a twin's under the name of its reference."""
        with ExitStack() as patches:
            for op in subclasses(Op):
                for half in {"forward", "backward"} & vars(op).keys():
                    timed = self.timed(reference(op).name(), vars(op)[half])
                    patches.enter_context(mock.patch.object(op, half, timed))
            yield


def subclasses(cls: type[Op]) -> Iterator[type[Op]]:
    for below in cls.__subclasses__():
        yield below
        yield from subclasses(below)


def reference(op: type[Op]) -> type[Op]:
    """The op itself, or the one that it is a twin of."""
    return next(c for c in reversed(op.__mro__) if issubclass(c, Op) and c is not Op and "forward" in vars(c))


def step_of(name: str, engine: str, watch: Stopwatch) -> Callable[[], None]:
    """A function that trains a model by one step, with the optimizer under `watch`."""
    config, batch_size, _ = CONFIGS[name]
    tinylm.random.seed(0)
    model = GPT(config)
    optimizer = AdamW(decay_groups(model, WEIGHT_DECAY), LR)
    x, y = batch(config, batch_size, 0)
    in_force = common.engine(engine)

    def update() -> None:
        _, coefficient = clip(optimizer.parameters(), CLIP)
        optimizer.step(coefficient)

    timed_update = watch.timed("optimizer", update)

    def step() -> None:
        with in_force:
            optimizer.zero_grad()
            model.loss(x, y).backward()
            timed_update()

    return step


def measure(name: str, engines: list[str], steps: int) -> dict[str, Counter[str]]:
    """For each engine the milliseconds of every op, of the optimizer and of the tape, in its fastest step."""
    watches = {engine: Stopwatch() for engine in engines}
    step = {engine: step_of(name, engine, watch) for engine, watch in watches.items()}
    fastest: dict[str, Counter[str]] = {}

    def run(engine: str) -> None:
        seconds = watches[engine].seconds
        seconds.clear()
        with watches[engine].watch_ops():
            started = perf_counter()
            step[engine]()
            total = perf_counter() - started
        seconds["tape"] = total - seconds.total()
        if engine not in fastest or total < fastest[engine].total():
            fastest[engine] = seconds.copy()

    common.in_turn({engine: partial(run, engine) for engine in step}, steps)
    return {engine: Counter({op: 1e3 * s for op, s in seconds.items()}) for engine, seconds in fastest.items()}


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--config", nargs="+", choices=CONFIGS, default=list(CONFIGS))
    parser.add_argument("--steps", type=int, default=5, help="counted steps of each engine; the fastest is shown")
    args = parser.parse_args()
    keep_freed_memory()

    engines = common.compared()
    columns = {"config": ("model", ""), "part": ("part of the step", "<21")}
    for engine in engines:
        columns |= {f"{engine}_ms": (f"{engine} ms", ",.2f"), f"{engine}_share": ("share", ".0%")}
    table = common.Table(columns)
    with threadpool_limits(1):
        for name in args.config:
            by_op = measure(name, engines, 1 if args.quick else args.steps)
            for part in (*PARTS, "all"):
                row: dict[str, Any] = {"config": name, "part": part}
                for engine, ms in by_op.items():
                    mine = {op: t for op, t in ms.items() if part in ("all", part_of(op))}
                    row |= {f"{engine}_ms": sum(mine.values()), f"{engine}_by_op": mine}
                    row[f"{engine}_share"] = row[f"{engine}_ms"] / ms.total()
                table.row(**row)
    common.save(args.json, table.rows)


if __name__ == "__main__":
    main()
