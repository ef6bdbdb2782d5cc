"""One training step in tinylm and in PyTorch eager: the same weights, the same batches, in turn.

    python benchmarks/train_step.py [--config S M] [--steps N] [--json FILE]

Both train in one process, one step of the one after one step of the other, so that a machine that slows down or is
shared slows both; the ratio of the medians is the figure to quote. Peak memory is that of a process of its own for
each. A step is: forward, backward, clipping by the global norm, AdamW (foreach=True, PyTorch's fastest here).
"""

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from time import perf_counter

import numpy as np

import tinylm
from tinylm import GPT, GPTConfig
from tinylm.array import keep_freed_memory
from tinylm.memory import peak_rss
from tinylm.optim import AdamW, clip_grad_norm_, decay_groups

CONFIGS = {
    "S": (GPTConfig(65, block_size=64, n_layer=4, n_head=4, n_embd=128), 12, 100),
    "M": (GPTConfig(65, block_size=256, n_layer=6, n_head=6, n_embd=384), 8, 10),
}  # name: (model, sequences a batch, default number of steps)
LR, WEIGHT_DECAY, CLIP = 1e-3, 0.1, 1.0
WARMUP = 3  # steps not counted

Step = Callable[[np.ndarray, np.ndarray], float]  # (inputs, targets) -> loss


def tinylm_step(model: GPT) -> Step:
    """A function that trains `model` by one step."""
    keep_freed_memory()
    optimizer = AdamW(decay_groups(model, WEIGHT_DECAY), LR)

    def step(x: np.ndarray, y: np.ndarray) -> float:
        optimizer.zero_grad()
        loss = model.loss(x, y)
        loss.backward()
        clip_grad_norm_(optimizer.parameters(), CLIP)
        optimizer.step()
        return loss.item()

    return step


def torch_step(model: GPT) -> Step:
    """A function that trains a PyTorch twin of `model` by one step."""
    sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
    import torch
    from torch_gpt import from_tinylm

    twin = from_tinylm(model)
    matrices = [p for p in twin.parameters() if p.ndim >= 2]
    vectors = [p for p in twin.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": WEIGHT_DECAY}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=LR, foreach=True)

    def step(x: np.ndarray, y: np.ndarray) -> float:
        optimizer.zero_grad(set_to_none=True)
        loss = twin.loss(torch.from_numpy(x), torch.from_numpy(y))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(twin.parameters(), CLIP)
        optimizer.step()
        return loss.item()

    return step


STEPS = {"tinylm": tinylm_step, "torch": torch_step}


def batch(config: GPTConfig, batch_size: int, number: int) -> tuple[np.ndarray, np.ndarray]:
    """Random tokens: what they say does not matter for speed."""
    ids = np.random.default_rng(number).integers(config.vocab_size, size=(batch_size, config.block_size + 1))
    return ids[:, :-1].copy(), ids[:, 1:].copy()


def measure(name: str, steps: int) -> dict[str, object]:
    """Train both in turn and return the row of the table."""
    config, batch_size, _ = CONFIGS[name]
    tinylm.random.seed(0)
    model = GPT(config)
    step = {which: make(model) for which, make in reversed(STEPS.items())}
    seconds: dict[str, list[float]] = {which: [] for which in step}
    losses: dict[str, list[float]] = {which: [] for which in step}
    for number in range(WARMUP + steps):
        x, y = batch(config, batch_size, number)
        for which in step:
            started = perf_counter()
            losses[which].append(step[which](x, y))
            seconds[which].append(perf_counter() - started)
    ms = {which: 1e3 * statistics.median(times[WARMUP:]) for which, times in seconds.items()}
    return {
        "config": name,
        "tokens": batch_size * config.block_size,
        "tinylm_ms": ms["tinylm"],
        "torch_ms": ms["torch"],
        "ratio": ms["torch"] / ms["tinylm"],
        "tinylm_mb": peak_mb(name, "tinylm"),
        "torch_mb": peak_mb(name, "torch"),
        "loss_difference": max(abs(a - b) for a, b in zip(losses["tinylm"], losses["torch"], strict=True)),
        "loss": losses["tinylm"][-1],
    }


def peak_mb(name: str, which: str) -> float:
    """Peak resident memory, in MB, of a process that trains only one of them for a few steps."""
    command = [sys.executable, __file__, "--config", name, "--peak-of", which]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def print_peak(name: str, which: str) -> None:
    config, batch_size, _ = CONFIGS[name]
    step = STEPS[which](GPT(config))
    for number in range(5):
        step(*batch(config, batch_size, number))
    print(peak_rss() / 1e6)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", nargs="+", choices=CONFIGS, default=list(CONFIGS))
    parser.add_argument("--steps", type=int, help="counted steps of each (default: 100 for S, 10 for M)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the table as JSON")
    parser.add_argument("--peak-of", choices=STEPS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.peak_of:
        return print_peak(args.config[0], args.peak_of)

    print(f"{'':6}{'ms/step':^18}{'tokens/s':^18}{'ratio of':^10}{'peak MB':^16}{'losses':>10}")
    print(
        f"{'':6}{'tinylm':>9}{'torch':>9}"
        + f"{'tinylm':>9}{'torch':>9}{'speeds':>9}{'tinylm':>9}{'torch':>8}{'differ by':>11}"
    )
    rows = []
    for name in args.config:
        row = measure(name, args.steps or CONFIGS[name][2])
        rows.append(row)
        speed = {which: row["tokens"] / row[f"{which}_ms"] * 1e3 for which in STEPS}
        print(
            f"{name:6}{row['tinylm_ms']:9.1f}{row['torch_ms']:9.1f}{speed['tinylm']:9,.0f}{speed['torch']:9,.0f}"
            f"{row['ratio']:9.2f}{row['tinylm_mb']:9.0f}{row['torch_mb']:8.0f}{row['loss_difference']:11.0e}",
            flush=True,
        )
        if row["loss_difference"] > 1e-3:
            sys.exit(
                f"the losses of {name} differ by {row['loss_difference']:.2g}: the two do not train the same model"
            )
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
