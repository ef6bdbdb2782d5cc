"""Compare the sets of engines, from composed ops to compiled loops: time, memory, ops on the tape.

    python benchmarks/engines.py [--config S M L] [--threads N] [--steps N] [--json FILE]

All sets that are installed train the same weights on the same batch in one process, with alternating steps. The
fastest step counts, because other programs can only slow a step down. A gain is how many times
faster a set is than the one above it. Activations at the tape's peak, and the ops that it recorded, are those of the
whole batch in one thread: exact, the same on every machine.

S and M are those of train_step.py. L has the layers of S and the tokens of M, in blocks of 1,024: there attention
takes most of the time.
"""

import statistics
import sys
from dataclasses import replace
from functools import partial
from typing import Any

import common
from threadpoolctl import threadpool_limits
from train_step import CONFIGS, batch, make_step

from tinylm import GPT, GPTConfig
from tinylm.memory import track_memory
from tinylm.parallel import available_cores

CONFIGS = {**CONFIGS, "L": (replace(CONFIGS["S"][0], block_size=1024), 2, 10)}


def count(engine: str, config: GPTConfig, batch_size: int) -> dict[str, int]:
    """What the tape of one step holds."""
    model = GPT(config)
    with common.engine(engine), track_memory(model) as memory:
        loss = model.loss(*batch(config, batch_size, 0))
        ops = len(memory.timeline)  # so far it has one entry for each op recorded
        loss.backward()
    return {"activation_bytes": memory.peak_activations, "ops": ops}


def measure(config: GPTConfig, batch_size: int, steps: int, threads: int) -> list[dict[str, Any]]:
    """A row for each set of engines, the slowest first."""
    x, y = batch(config, batch_size, 0)
    losses: dict[str, float] = {}
    with threadpool_limits(threads):  # of BLAS; workers have one each
        step = {engine: make_step(engine, config, batch_size, threads) for engine in common.installed()}

        def run(engine: str) -> None:
            losses[engine] = step[engine](x, y)

        times = common.in_turn({engine: partial(run, engine) for engine in step}, steps)
    if (apart := max(losses.values()) - min(losses.values())) > 1e-3:
        sys.exit(f"the losses differ by {apart:.2g}: these are not the same model")
    return [
        {
            "engine": engine,
            "in_force": ", ".join(common.ENGINES[engine]),
            "ms": 1e3 * min(seconds),
            "median_ms": 1e3 * statistics.median(seconds),
            "loss": losses[engine],
            **count(engine, config, batch_size),
        }
        for engine, seconds in times.items()
    ]


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--config", nargs="+", choices=CONFIGS, default=list(CONFIGS))
    parser.add_argument("--steps", type=int, help="counted steps of each set (default: 100 for S, 10 for M and L)")
    parser.add_argument("--threads", type=int, default=available_cores(), help="default: the cores")
    args = parser.parse_args()

    columns = {"config": ("model", ""), "engine": ("engine", "<9"), "in_force": ("in force", "<19")}
    columns |= {"threads": ("threads", "d"), "ms": ("ms a step", ",.1f"), "gain": ("gain", ".2f")}
    table = common.Table(columns | {"activation_mb": ("activations MB", ",.1f"), "ops": ("ops on the tape", ",d")})
    for name in args.config:
        config, batch_size, steps = CONFIGS[name]
        if args.quick:
            config, steps = replace(config, n_layer=1), 1
        threads = min(args.threads, batch_size)  # a worker needs a sequence of its own
        above = None
        for row in measure(config, batch_size, args.steps or steps, threads):
            row |= {"config": name, "threads": threads, "block": config.block_size, "batch": batch_size}
            gain = above / row["ms"] if above else 1.0
            table.row(**row, gain=gain, activation_mb=row["activation_bytes"] / 1e6)
            above = row["ms"]
    common.save(args.json, table.rows)


if __name__ == "__main__":
    main()
