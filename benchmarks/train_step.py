"""One training step in tinylm and in PyTorch: the same weights, the same batches, in turn.

    python benchmarks/train_step.py [--config S M] [--engine numpy numba mkl] [--batch-size 2 4] [--block 1024]
                                    [--compile] [--json FILE]

All train in one process, one step of the one after one step of the other, so that a machine that slows down or is
shared slows them all; the ratio of the medians is the figure to quote. Peak memory is that of a process of its own for
each. A step is: forward, backward, clipping by the global norm, AdamW (foreach=True, PyTorch's fastest here), in
float32. With another --block the tokens of a step stay as many, as near as whole sequences allow, unless --batch-size
says how many sequences.

The engines: numpy is tinylm with nothing but NumPy, numba adds the compiled loops, mkl also MKL's matrix product.
"""

import argparse
import itertools
import json
import statistics
import subprocess
import sys
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from time import perf_counter
from typing import Any
from unittest import mock

import numpy as np

import tinylm
from tinylm import GPT, GPTConfig, registry
from tinylm.array import keep_freed_memory
from tinylm.memory import peak_rss
from tinylm.optim import AdamW, clip_grad_norm_, decay_groups
from tinylm.parallel import Workers, available_cores

CONFIGS = {
    "S": (GPTConfig(65, block_size=64, n_layer=4, n_head=4, n_embd=128), 12, 100),
    "M": (GPTConfig(65, block_size=256, n_layer=6, n_head=6, n_embd=384), 8, 10),
}  # name: (model, sequences a batch, default number of steps)
LR, WEIGHT_DECAY, CLIP = 1e-3, 0.1, 1.0
WARMUP = 3  # steps not counted

Step = Callable[[np.ndarray, np.ndarray], float]  # (inputs, targets) -> loss


def tinylm_step(model: GPT, engine: str, threads: int) -> Step:
    """A function that trains `model` by one step."""
    keep_freed_memory()
    optimizer = AdamW(decay_groups(model, WEIGHT_DECAY), LR)
    workers = Workers(model, threads)
    workers.__enter__()

    def step(x: np.ndarray, y: np.ndarray) -> float:
        def work(rank: int, replica: GPT) -> float:
            mine = workers.share(len(x), rank)
            loss = replica.loss(x[mine], y[mine]) * (len(x[mine]) / len(x))
            loss.backward()
            return loss.item()

        with ExitStack() as only:
            if engine == "numpy":
                only.enter_context(tinylm.reference_only())
            elif engine == "numba":
                only.enter_context(mock.patch.dict(registry._kernels, clear=False))
                registry._kernels.pop("sgemm", None)
            optimizer.zero_grad()
            loss = sum(workers.gradient(work))
            clip_grad_norm_(optimizer.parameters(), CLIP)
            optimizer.step()
        return loss

    return step


def torch_step(model: GPT, engine: str, threads: int) -> Step:
    """A function that trains a PyTorch twin of `model` by one step."""
    sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
    import torch
    from torch_gpt import from_tinylm

    torch.set_num_threads(threads)
    twin = from_tinylm(model)
    matrices = [p for p in twin.parameters() if p.ndim >= 2]
    vectors = [p for p in twin.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": WEIGHT_DECAY}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=LR, foreach=True)
    loss_of = torch.compile(twin.loss) if engine == "compile" else twin.loss

    def step(x: np.ndarray, y: np.ndarray) -> float:
        optimizer.zero_grad(set_to_none=True)
        loss = loss_of(torch.from_numpy(x), torch.from_numpy(y))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(twin.parameters(), CLIP)
        optimizer.step()
        return loss.item()

    return step


def make_step(engine: str, config: GPTConfig, batch_size: int, threads: int) -> Step:
    """A step of `engine`, from the same weights for all."""
    tinylm.random.seed(0)
    if engine in ("torch", "compile"):
        return torch_step(GPT(config), engine, threads)
    # A worker needs a sequence of its own. With one worker BLAS has all threads.
    return tinylm_step(GPT(config), engine, min(threads, batch_size))


def batch(config: GPTConfig, batch_size: int, number: int) -> tuple[np.ndarray, np.ndarray]:
    """Random tokens: what they say does not matter for speed."""
    ids = np.random.default_rng(number).integers(config.vocab_size, size=(batch_size, config.block_size + 1))
    return ids[:, :-1].copy(), ids[:, 1:].copy()


def setting(name: str, block: int | None, batch_size: int | None) -> tuple[GPTConfig, int]:
    """(the model, the sequences a batch) of a configuration, with another block or batch where one is given."""
    config, sequences, _ = CONFIGS[name]
    if block:
        sequences = max(1, sequences * config.block_size // block)
        config = replace(config, block_size=block)
    return config, batch_size or sequences


def measure(
    name: str, block: int | None, sequences: int | None, engines: list[str], steps: int, threads: int
) -> list[dict[str, Any]]:
    """Train all in turn and return a row of the table for each of tinylm's engines."""
    config, batch_size = setting(name, block, sequences)
    step = {engine: make_step(engine, config, batch_size, threads) for engine in engines}
    seconds: dict[str, list[float]] = {engine: [] for engine in engines}
    losses: dict[str, list[float]] = {engine: [] for engine in engines}
    for number in range(WARMUP + steps):
        x, y = batch(config, batch_size, number)
        for engine in engines:
            started = perf_counter()
            losses[engine].append(step[engine](x, y))
            seconds[engine].append(perf_counter() - started)
    ms = {engine: 1e3 * statistics.median(times[WARMUP:]) for engine, times in seconds.items()}
    mb = {engine: peak_mb(name, config.block_size, batch_size, engine, threads) for engine in engines}
    return [
        {
            "config": name,
            "engine": engine,
            "threads": threads,
            "block": config.block_size,
            "batch": batch_size,
            "tokens": batch_size * config.block_size,
            "tinylm_ms": ms[engine],
            "torch_ms": ms["torch"],
            "compile_ms": ms.get("compile"),
            "ratio": ms["torch"] / ms[engine],
            "ratio_to_compile": ms["compile"] / ms[engine] if "compile" in ms else None,
            "tinylm_mb": mb[engine],
            "torch_mb": mb["torch"],
            "loss": losses[engine][-1],
            "loss_difference": max(abs(a - b) for a, b in zip(losses[engine], losses["torch"], strict=True)),
        }
        for engine in engines
        if engine not in ("torch", "compile")
    ]


def peak_mb(name: str, block: int, batch_size: int, engine: str, threads: int) -> float:
    """Peak resident memory, in MB, of a process that trains only one of them for a few steps."""
    options = {"config": name, "block": block, "batch-size": batch_size, "peak-of": engine, "threads": threads}
    command = [sys.executable, __file__, *(str(x) for name, value in options.items() for x in (f"--{name}", value))]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def print_peak(name: str, block: int, batch_size: int, engine: str, threads: int) -> None:
    if engine in ("numba", "mkl"):
        tinylm.fused.load()
    config, batch_size = setting(name, block, batch_size)
    step = make_step(engine, config, batch_size, threads)
    for number in range(5):
        step(*batch(config, batch_size, number))
    print(peak_rss() / 1e6)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", nargs="+", choices=CONFIGS, default=list(CONFIGS))
    parser.add_argument(
        "--engine", nargs="+", choices=("numpy", "numba", "mkl"), help="default: all that are installed"
    )
    parser.add_argument(
        "--compile", action="store_true", help="also torch.compile, which takes a minute and a C++ compiler"
    )
    parser.add_argument("--batch-size", nargs="+", type=int, default=[None], help="sequences a step (S: 12, M: 8)")
    parser.add_argument("--block", nargs="+", type=int, default=[None], help="tokens a sequence (S: 64, M: 256)")
    parser.add_argument("--steps", type=int, help="counted steps of each (default: 100 for S, 10 for M)")
    parser.add_argument("--threads", type=int, default=available_cores(), help="of each (default: the cores)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the table as JSON")
    parser.add_argument("--peak-of", help=argparse.SUPPRESS)
    args = parser.parse_args()
    import tinylm.fused

    if args.peak_of:
        return print_peak(args.config[0], args.block[0], args.batch_size[0], args.peak_of, args.threads)

    engines = args.engine or ["numpy"]
    if args.engine is None or engines != ["numpy"]:
        installed = tinylm.fused.load()
        engines = args.engine or ["numpy", *installed]
        if missing := set(engines) - {"numpy", *installed}:
            parser.error(f"not installed, or of no use here: {', '.join(sorted(missing))}")
    rivals = ["torch", "compile"] if args.compile else ["torch"]

    print(f"{'':23}{'ms/step':^27}{'tokens/s':^18}{'speed against':^16}{'peak MB':^16}{'losses':>10}")
    print(
        f"{'':3}{'block':>6}{'batch':>6} {'engine':7}{'tinylm':>9}{'eager':>9}{'compile':>9}{'tinylm':>9}{'eager':>9}",
        end="",
    )
    print(f"{'eager':>8}{'compile':>8}{'tinylm':>8}{'eager':>8}{'differ by':>11}", flush=True)
    rows = []
    for name, block, batch_size in itertools.product(args.config, args.block, args.batch_size):
        steps = args.steps or CONFIGS[name][2]
        for row in measure(name, block, batch_size, [*engines, *rivals], steps, args.threads):
            rows.append(row)
            ms, torch_ms, tokens = row["tinylm_ms"], row["torch_ms"], row["tokens"]
            compiled, ratio = (f"{row[key]:.{digits}f}" if row[key] else "-" for key, digits in COMPILED)
            print(
                f"{name:3}{row['block']:6,d}{row['batch']:6d} {row['engine']:7}"
                f"{ms:9.1f}{torch_ms:9.1f}{compiled:>9}{tokens / ms * 1e3:9,.0f}"
                f"{tokens / torch_ms * 1e3:9,.0f}{row['ratio']:8.2f}{ratio:>8}{row['tinylm_mb']:8.0f}"
                f"{row['torch_mb']:8.0f}{row['loss_difference']:11.0e}",
                flush=True,
            )
            if row["loss_difference"] > 1e-3:
                sys.exit(f"the losses of {name} differ by {row['loss_difference']:.2g}: this is not the same model")
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n")


COMPILED = (("compile_ms", 1), ("ratio_to_compile", 2))

if __name__ == "__main__":
    main()
