"""Microseconds per op in tinylm and in PyTorch, forward and backward together, on tiny arrays.

    python benchmarks/overhead.py [--length N] [--rounds N] [--json FILE]

Chains of one op on arrays of 1 and of 4 x 4 numbers, where most of an op's time is the tape's: checking inputs,
recording, walking back, summing gradients. The table shows the whole time, NumPy's time for the same arithmetic
without a tape, and the difference. Both libraries alternate on one core; the figure is the fastest round's processor
time, because other programs can only slow a round down.
"""

from collections.abc import Callable
from time import process_time
from typing import Any

import common
import numpy as np
import torch

import tinylm

BAR = 5.0  # microseconds

# One op on y, the end of the chain so far, and the leaves x and c; then its arithmetic alone, forward and backward.
OPS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "-y": (lambda y, x, c: -y, lambda y, x, c, g: (-y, -g)),
    "y + x": (lambda y, x, c: y + x, lambda y, x, c, g: (y + x, np.add(x, g, out=x))),
    "y + 1.0": (lambda y, x, c: y + 1.0, lambda y, x, c, g: y + 1.0),
    "y * c": (lambda y, x, c: y * c, lambda y, x, c, g: (y * c, g * c, np.add(c, g * y, out=c))),
    "y * 1.0": (lambda y, x, c: y * 1.0, lambda y, x, c, g: (y * 1.0, g * 1.0)),
    "y.tanh()": (lambda y, x, c: y.tanh(), lambda y, x, c, g: (np.tanh(y), g * (1 - y * y))),
}


def chain(op: Callable[..., Any], leaf: Callable[[], Any], seed: Any, length: int) -> Callable[[], None]:
    """A function that runs `op` `length` times, each on the result of the one before, and walks back."""

    def run() -> None:
        x, c = leaf(), leaf()
        y = x
        for _ in range(length):
            y = op(y, x, c)
        y.backward(seed)

    return run


def bare(arithmetic: Callable[..., Any], shape: tuple[int, ...], length: int) -> Callable[[], None]:
    """A function that does the same arithmetic on NumPy's arrays, and nothing else."""

    def run() -> None:
        y, x, c, g = (np.ones(shape, np.float32) for _ in range(4))
        for _ in range(length):
            arithmetic(y, x, c, g)

    return run


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--length", type=int, default=2000, help="ops in a chain")
    parser.add_argument("--rounds", type=int, default=15, help="how often each chain is run; the fastest counts")
    args = parser.parse_args()
    length, rounds = (50, 2) if args.quick else (args.length, args.rounds)
    torch.set_num_threads(1)

    print("microseconds an op, forward and backward together")
    columns = {"op": ("op", ">8"), "shape": ("shape", ">6")}
    columns |= {name: (name, ".2f") for name in ("tinylm", "numpy", "tape", "torch")}
    columns |= {"ratio": ("torch/tinylm", ".2f")}
    table = common.Table(columns)
    for shape in ((1,), (4, 4)):
        ones = np.ones(shape, np.float32)
        for name, (op, arithmetic) in OPS.items():
            runs = {
                "tinylm": chain(op, lambda a=ones: tinylm.tensor(a, requires_grad=True), ones, length),
                "torch": chain(op, lambda a=ones: torch.tensor(a, requires_grad=True), torch.tensor(ones), length),
                "numpy": bare(arithmetic, shape, length),
            }
            us = {who: 1e6 * min(s) / length for who, s in common.in_turn(runs, rounds, clock=process_time).items()}
            us["tape"] = us["tinylm"] - us["numpy"]
            table.row(op=name, shape="x".join(map(str, shape)), **us, ratio=us["torch"] / us["tinylm"])
    mean = {who: float(np.mean([row[who] for row in table.rows])) for who in us}
    worst = max(row["tape"] for row in table.rows)
    table.row(op="mean", shape="", **mean, ratio=mean["torch"] / mean["tinylm"])
    print(f"the tape itself: at most {worst:.2f} us an op, {'under' if worst < BAR else 'NOT under'} {BAR:g} us")
    common.save(args.json, table.rows)


if __name__ == "__main__":
    main()
