"""Plots of a training run. matplotlib is imported when one is drawn, and needs no display."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def smooth(values: Sequence[float], reach: int = 25) -> np.ndarray:
    """Centred moving average over up to `reach` values on each side, fewer at the ends: it does not lag behind."""
    sums = np.concatenate([[0.0], np.cumsum(values)])
    at = np.arange(len(values))
    start = at - np.minimum(at, reach)
    end = np.minimum(2 * at - start, len(values) - 1) + 1
    return (sums[end] - sums[start]) / (end - start)


def loss_curve(metrics: Sequence[dict[str, Any]], title: str = "") -> "Figure":
    """The training loss of every step (faint) and smoothed, and the validation loss where it was measured.

    `metrics` are the lines of a run's metrics.jsonl (see `runs.read_metrics`).
    """
    from matplotlib.figure import Figure

    at = [line["step"] for line in metrics if "loss" in line]
    losses = [line["loss"] for line in metrics if "loss" in line]
    measured = [(line["step"], line["val_loss"]) for line in metrics if "val_loss" in line]

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    axes.plot(at, losses, color="#4477aa", alpha=0.35, linewidth=0.8, label="training, each batch")
    axes.plot(at, smooth(losses), color="#4477aa", linewidth=2, label="training, smoothed")
    if measured:
        axes.plot(*zip(*measured, strict=True), "o-", color="#ee6677", linewidth=2, markersize=5, label="validation")
        step, loss = measured[-1]
        axes.annotate(f"{loss:.3f}", (step, loss), (0, 9), textcoords="offset points", ha="right", color="#ee6677")
    axes.set(xlabel="step", ylabel="loss (nats a token)", title=title, xlim=(0, max(at, default=1) * 1.02))
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    return figure
