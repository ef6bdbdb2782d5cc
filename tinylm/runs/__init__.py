"""A run's folder: checkpoints, metrics, diagnosis, report, plots, and what is shown on the screen."""

from .checkpoint import Checkpoint, DamagedError
from .metrics import read_metrics, read_samples
from .run import Run, load_model, newest_run

__all__ = ["Checkpoint", "DamagedError", "Run", "load_model", "newest_run", "read_metrics", "read_samples"]
