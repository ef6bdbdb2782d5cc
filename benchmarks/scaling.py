"""How the time of a training step grows with the length of the context and with the batch, in tinylm and in PyTorch.

    python benchmarks/scaling.py [--config S M] [--tokens N] [--steps N] [--json FILE]

First the block grows from 64 to 1,024 tokens at a constant number of tokens per step, so that only attention grows;
then the batch grows from 1 to 64 sequences of 64 tokens. The two libraries take their steps in turn, and the fastest
counts, because other programs can only slow a step down.

Model-FLOPs utilisation is the share of the machine's measured peak that goes into the arithmetic that the model needs:
for one token, forward and backward, 6 N for the weights and 12 L C T for attention (Chowdhery et al., 2022, PaLM,
appendix B). PaLM counts every query against every key. Causally a query has (T + 1) / 2 keys on average, and the table
counts no more than these: 6 L C (T + 1). The JSON file has PaLM's figure too. N leaves out the table of positions,
which multiplies nothing; the table of tokens is also the output layer, and counts. The peak is the fastest large
float32 product, of NumPy's and PyTorch's, on all cores, measured in the same run.
"""

from collections.abc import Callable
from dataclasses import replace

import common
import numpy as np
import torch
from threadpoolctl import threadpool_limits
from train_step import CONFIGS, batch, make_step

from tinylm import GPT, GPTConfig
from tinylm.parallel import available_cores

BLOCKS = (64, 128, 256, 512, 1024)
BATCHES = (1, 2, 4, 8, 16, 32, 64)


def peak_flops(size: int, rounds: int = 15) -> float:
    """Floating-point operations a second of the fastest float32 product of two matrices of this size."""
    a = np.ones((size, size), np.float32)
    t = torch.from_numpy(a)
    runs: dict[str, Callable[[], object]] = {"numpy": lambda: a @ a, "torch": lambda: t @ t}
    return 2 * size**3 / min(min(times) for times in common.in_turn(runs, rounds).values())


def flops_a_token(config: GPTConfig, causal: bool) -> float:
    """Floating-point operations of the model per token of a training step, without recomputation."""
    weights = GPT(config).num_parameters() - config.block_size * config.n_embd
    T = (config.block_size + 1) / 2 if causal else config.block_size  # keys a query has
    return 6 * weights + 12 * config.n_layer * config.n_embd * T


def measure(config: GPTConfig, batch_size: int, engine: str, steps: int, threads: int) -> dict[str, float]:
    """Seconds of each library's fastest step."""
    with threadpool_limits():  # restored afterwards
        mine = make_step(engine, config, batch_size, threads)
        theirs = make_step("torch", config, batch_size, threads)
        x, y = batch(config, batch_size, 0)
        times = common.in_turn({"tinylm": lambda: mine(x, y), "torch": lambda: theirs(x, y)}, steps)
    return {name: min(seconds) for name, seconds in times.items()}


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--config", nargs="+", choices=CONFIGS, default=["S"])
    parser.add_argument("--tokens", type=int, default=2048, help="of a step, where the block grows")
    parser.add_argument("--steps", type=int, default=8, help="counted steps of each library at each point")
    parser.add_argument("--threads", type=int, default=available_cores(), help="of each (default: the cores)")
    args = parser.parse_args()
    steps, tokens, size = (1, 128, 256) if args.quick else (args.steps, args.tokens, 2048)
    engine = common.installed()[-1]

    torch.set_num_threads(args.threads)
    peak = peak_flops(size)
    print(f"tinylm's engine: {engine}; the machine's peak: {peak / 1e9:.0f} GFLOP/s (sgemm, {args.threads} threads)")
    columns = {"config": ("model", ""), "block": ("block", ",d"), "batch": ("batch", "d")}
    for name in ("tinylm", "torch"):
        columns |= {f"{name}_ms": (f"{name} ms", ",.1f"), f"{name}_tokens_s": ("tokens/s", ",.0f")}
        columns |= {f"{name}_mfu": ("MFU", ".0%")}
    table = common.Table(columns | {"ratio": ("ratio of speeds", ".2f")})
    for name in args.config:
        base = CONFIGS[name][0]
        blocks, batches = (BLOCKS[:2], BATCHES[:2]) if args.quick else (BLOCKS, BATCHES)
        points = [("block", T, max(1, tokens // T)) for T in blocks] + [("batch", 64, B) for B in batches]
        for grows, T, B in points:
            config = replace(base, block_size=T)
            seconds = measure(config, B, engine, steps, args.threads)
            row = {"config": name, "grows": grows, "block": T, "batch": B, "engine": engine, "peak_gflops": peak / 1e9}
            for who, s in seconds.items():
                row |= {f"{who}_ms": 1e3 * s, f"{who}_tokens_s": B * T / s}
                for convention, causal in (("mfu", True), ("mfu_palm", False)):
                    row[f"{who}_{convention}"] = flops_a_token(config, causal) * B * T / s / peak
            table.row(**row, ratio=seconds["torch"] / seconds["tinylm"])
    common.save(args.json, table.rows)


if __name__ == "__main__":
    main()
