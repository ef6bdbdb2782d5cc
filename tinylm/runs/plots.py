"""Plots of a training run. matplotlib is imported when one is drawn, and needs no display."""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def smooth(values: Any, reach: int = 25) -> np.ndarray:
    """Centred moving average over up to `reach` values on each side, fewer at the ends: it does not lag behind.

    Values that are not finite are left out, and stay NaN.
    """
    values = np.asarray(values, float)
    finite = np.isfinite(values)
    sums = np.concatenate([[0.0], np.cumsum(values[finite])])
    at = np.arange(len(sums) - 1)
    start = at - np.minimum(at, reach)
    end = np.minimum(2 * at - start, len(sums) - 2) + 1
    smoothed = np.full(len(values), np.nan)
    smoothed[finite] = (sums[end] - sums[start]) / (end - start)
    return smoothed


def loss_curve(metrics: Iterable[dict[str, Any]], title: str = "") -> "Figure":
    """The training loss of every step (faint) and smoothed, and the validation loss where it was measured.

    `metrics` are the records of a run (see `runs.read_metrics`). A loss that was not finite leaves a gap.
    """
    from matplotlib.figure import Figure

    metrics = list(metrics)
    at = [record["step"] for record in metrics if "loss" in record]
    losses = np.array([record["loss"] for record in metrics if "loss" in record], float)  # None becomes NaN
    measured = [(record["step"], record["val_loss"]) for record in metrics if record.get("val_loss") is not None]

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
