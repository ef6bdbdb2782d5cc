"""How much memory each memory-saving technique saves, and how much time it costs.

    python benchmarks/memory.py [--config S M] [--engine NAME] [--steps N] [--json FILE]

Every mode trains in its own process, so that its peak of resident memory can be measured. The modes alternate, a few
steps each, so that a machine that slows down or is shared slows all of them equally.
`none` keeps all activations in float32 and forms all logits; each other row switches on what its name says:

    float16         autocast and GradScaler (on a CPU emulated: it saves memory, not time)
    recompute       the activations of every --recompute blocks are computed again in backward
    both            float16 and recompute
    chunked loss    linear_cross_entropy; with 65 characters it saves little, so it is shown with a real vocabulary too

Activations are the tape's count at its peak: exact, the same on every machine. Seconds are the median of the steps.
"""

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from time import perf_counter, process_time
from typing import Any

import common
import numpy as np
import train_step

from tinylm import GPT, GPTConfig, Tensor, ops, random
from tinylm.array import keep_freed_memory
from tinylm.data import CharTokenizer, get_batch, language_reference, split
from tinylm.memory import peak_rss, track_memory
from tinylm.nn import Parameter
from tinylm.precision import autocast
from tinylm.training import TrainConfig, TrainState, train


@dataclass(frozen=True)
class Config:
    sizes: dict[str, int]
    batch_size: int
    recompute: int  # blocks together
    steps: int
    eval_tokens: int


CONFIGS = {
    "S": Config({"block_size": 64, "n_layer": 4, "n_head": 4, "n_embd": 128}, 12, 1, 300, 0),
    "M": Config({"block_size": 256, "n_layer": 6, "n_head": 6, "n_embd": 384}, 8, 2, 12, 8192),
}
MODES = {  # dtype, whether activations are recomputed, whether the loss is chunked
    "none": ("float32", False, False),
    "float16": ("float16", False, False),
    "recompute": ("float32", True, False),
    "both": ("float16", True, False),
    "chunked loss": ("float32", False, True),
}
LARGE = {"vocab_size": 50_257, "tokens": 8192, "n_embd": 256}
LOSSES = {"two-op loss": False, "chunked loss": True}
ROUNDS = 6
CLOCKS = {"wall": perf_counter, "cpu": process_time}


class TwoOps(GPT):
    """A GPT whose loss forms all the logits."""

    def loss(self, ids: Any, targets: Any) -> Tensor:
        return ops.cross_entropy(self(ids), targets)


# --- in the process of a mode -------------------------------------------------------------------------------------

Work = Iterator[float | None]  # one step for each item, and the validation loss where the last step measured it


def training(config: Config, mode: str, steps: int, recompute: int, seed: int) -> tuple[Work, float]:
    """The steps of a training run, and the MB of activations in one of them."""
    text = language_reference()
    vocabulary = CharTokenizer.of(text)
    train_tokens, val_tokens = split(vocabulary.encode(text))
    dtype, recomputes, chunked = MODES[mode]
    random.seed(seed)
    shape = GPTConfig(vocabulary.vocab_size, **config.sizes, recompute=recompute if recomputes else 0)
    model = (GPT if chunked else TwoOps)(shape)
    state = TrainState(
        model,
        TrainConfig(steps=steps, batch_size=config.batch_size, dtype=dtype, eval_every=0,
                    eval_tokens=config.eval_tokens, seed=seed),
    )  # fmt: skip
    x, y = get_batch(train_tokens, config.batch_size, shape.block_size, seed, 0)
    with track_memory(model) as memory:
        with autocast(dtype):
            loss = model.loss(x, y)
        loss.backward()
    return (step.val_loss for step in train(state, train_tokens, val_tokens)), memory.peak_activations / 1e6


def losses(chunked: bool) -> tuple[Work, float]:
    """The output layer and the loss with a real vocabulary, forward and backward, repeated."""
    numbers = np.random.default_rng(0)
    N, C, V = LARGE["tokens"], LARGE["n_embd"], LARGE["vocab_size"]
    hidden = Tensor(numbers.standard_normal((N, C), np.float32), requires_grad=True)
    weight = Parameter(numbers.standard_normal((V, C), np.float32) / C**0.5)
    targets = numbers.integers(V, size=N)

    def loss() -> Tensor:
        if chunked:
            return ops.linear_cross_entropy(hidden, weight, targets)
        return ops.cross_entropy(ops.linear(hidden, weight), targets)

    def work() -> Work:
        while True:
            hidden.grad = weight.grad = None
            value = loss()
            value.backward()
            yield value.item()

    with track_memory() as memory:
        value = loss()
        del value
    return work(), memory.peak_activations / 1e6


def serve(make: Callable[[], tuple[Work, float]], clock: Callable[[], float]) -> None:
    """Read numbers of steps from standard input, print their seconds as JSON, and at the end the figures."""
    keep_freed_memory()
    work, activation_mb = make()
    loss = None
    for line in sys.stdin:
        seconds = []
        for _ in range(int(line)):
            started = clock()
            loss = next(work)
            seconds.append(clock() - started)
        print(json.dumps(seconds), flush=True)
    print(json.dumps({"activation_mb": activation_mb, "peak_mb": peak_rss() / 1e6, "val_loss": loss}))


# --- in the main process ------------------------------------------------------------------------------------------


class Worker:
    """A process that trains in one mode."""

    def __init__(self, arguments: list[str]):
        self.seconds: list[float] = []
        self.process = subprocess.Popen(
            [sys.executable, __file__, *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.steps(0)  # answered when it is ready: no other's start falls into its time

    def steps(self, n: int) -> list[float]:
        """The seconds of each of `n` more steps."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(f"{n}\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if not answer:
            sys.exit(f"a worker ended with status {self.process.wait()}")
        return json.loads(answer)

    def finish(self) -> dict[str, Any]:
        out, _ = self.process.communicate()
        return json.loads(out)


def alternate(workers: dict[str, Worker], steps: int, last: int) -> None:
    """`steps` steps of each, in rounds, and then `last` more; a round's first step does not count, nor do the last."""
    for done in range(ROUNDS):
        n = steps * (done + 1) // ROUNDS - steps * done // ROUNDS
        for worker in workers.values() if n else ():
            seconds = worker.steps(n)
            worker.seconds += seconds[1:] or seconds  # after the others' work the caches are cold
    for worker in workers.values() if last else ():
        worker.steps(last)


def rows_of(config: str, engine: str, workers: dict[str, Worker]) -> list[dict[str, Any]]:
    rows = []
    for mode, worker in workers.items():
        row = {"config": config, "engine": engine, "mode": mode, **worker.finish()}
        row["seconds"] = statistics.median(worker.seconds)
        rows.append(row)
        first = rows[0]
        print(
            f"{config:4}{mode:14}{row['activation_mb']:10.1f}{_change(row, first, 'activation_mb'):>8}"
            f"{row['peak_mb']:10.0f}{_change(row, first, 'peak_mb'):>8}"
            f"{row['seconds'] * 1e3:11.1f}{_change(row, first, 'seconds'):>8}{row['val_loss']:11.4f}",
            flush=True,
        )
    return rows


def _change(row: dict[str, Any], first: dict[str, Any], name: str) -> str:
    return "" if row is first or not first[name] else f"{row[name] / first[name] - 1:+.0%}"


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--config", nargs="*", choices=CONFIGS, default=list(CONFIGS))
    parser.add_argument("--mode", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--steps", type=int, help="of each mode (default: 300 for S, 12 for M)")
    parser.add_argument("--recompute", type=int, help="blocks recomputed together (default: 1 for S, 2 for M)")
    parser.add_argument("--loss-rounds", type=int, default=3, help="of the loss of a real vocabulary; 0: not shown")
    parser.add_argument("--seed", type=int, default=1337)
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="cpu: where other programs run beside")
    installed = common.installed()
    parser.add_argument("--engine", choices=installed, default=installed[-1], help="default: the best installed")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.quick:
        args.steps, args.loss_rounds = 2, 0

    def choices(name: str) -> tuple[Config, int, int]:
        config = CONFIGS[name]
        return config, args.steps or config.steps, args.recompute or config.recompute

    if args.worker:

        def make() -> tuple[Work, float]:
            if not args.config:
                return losses(LOSSES[args.worker])
            config, steps, recompute = choices(args.config[0])
            return training(config, args.worker, steps, recompute, args.seed)

        with common.engine(args.engine):
            return serve(make, CLOCKS[args.clock])

    # Compile here, once, and not in the workers, where it would raise their peak memory.
    shape = train_step.CONFIGS["S"][0]
    train_step.make_step(args.engine, shape, 1, threads=1)(*train_step.batch(shape, 1, 0))
    shared = [f"--engine={args.engine}", f"--clock={args.clock}", f"--seed={args.seed}"]
    print(f"engine: {args.engine}")
    print(f"{'':18}{'activations':^18}{'process peak':^18}{args.clock + ' time a step':^19}{'validation':>11}")
    print(f"{'':18}{'MB':>10}{'':8}{'MB':>10}{'':8}{'ms':>11}{'':8}{'loss':>11}", flush=True)
    rows = []
    for name in args.config:
        _, steps, recompute = choices(name)
        settings = [f"--steps={steps}", f"--recompute={recompute}", *shared]
        workers = {mode: Worker(["--config", name, "--worker", mode, *settings]) for mode in args.mode}
        alternate(workers, steps - 1, 1)  # the last step validates
        rows += rows_of(name, args.engine, workers)
    if args.loss_rounds:
        print(f"\nthe output layer and the loss alone: {LARGE['tokens']:,} tokens, V = {LARGE['vocab_size']:,}")
        workers = {mode: Worker(["--config", "--worker", mode, *shared]) for mode in LOSSES}
        for _ in range(args.loss_rounds + 1):
            for worker in workers.values():
                worker.seconds += worker.steps(1)
        for worker in workers.values():
            del worker.seconds[0]
        rows += rows_of("V", args.engine, workers)
        two, one = rows[-2:]
        smaller, longer = two["peak_mb"] / one["peak_mb"], one["seconds"] / two["seconds"]
        print(f"chunked: a peak {smaller:.1f} times smaller, in {longer:.2f} times the time")
    common.save(args.json, rows)


if __name__ == "__main__":
    main()
