"""Probes: what a loss curve does not show. A model, an op, an optimizer or a loop with a silent bug trains on.

    report = probe.run(state, train_tokens, val_tokens)
    print(report)

Each probe is one small experiment on deep copies of the state, and is a function of its own: `probe.causality(state,
train_tokens)`. A loop of your own is tested as a black box; it takes all it needs from the state:

    def step(state, tokens):           # one update; state.config has batch_size, accumulate, clip; seed
        ...                            # forward and backward by state.model.loss(x, y), state.scaler if you use it
        state.optimizer.set_lr(state.schedule(state.step))
        state.optimizer.step()
        state.step += 1

    probe.run(state, train_tokens, step=step, evaluate=..., save=..., load=...)

`evaluate(state, tokens)` returns a loss, `save(state)` what `load(state, saved)` restores. Without them it is tinylm's
own loop that is tested.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from ..training import TrainState
from .gradients import gradient, held, ops
from .loop import accumulation, batches, clipping, evaluation, leakage, resuming, schedule, unscaling, zeroing
from .model import causality, first_loss, loss, positions, samples, scale
from .subject import Result, Subject
from .update import decay, update

# In the order in which `run` runs them: a cause before its consequences.
PROBES = {
    each.__name__: each
    for each in (
        *(batches, samples, causality, positions, scale, loss, first_loss),
        *(ops, gradient, held),
        *(update, decay),
        *(accumulation, zeroing, unscaling, clipping, schedule, evaluation, resuming, leakage),
    )
}


@dataclass(frozen=True)
class Report:
    """The results of all probes; printed, a table."""

    results: list[Result]

    @property
    def findings(self) -> list[Result]:
        """Those that found a bug. The first is the likeliest cause: later ones may be its consequences."""
        return [result for result in self.results if result.bug]

    def __str__(self) -> str:
        return "\n".join(map(str, self.results))


def run(state: TrainState, train_tokens: np.ndarray, val_tokens: np.ndarray | None = None, **loop: Any) -> Report:
    """Run all probes. The state, its gradients and the random streams are bit for bit as they were.

    `loop`: `step`, `evaluate`, `save` and `load`, see above. An error inside a probe is its finding. Raises ValueError
    for too few tokens.
    """
    Subject(state, train_tokens, val_tokens, **loop)
    results = []
    for name, call in PROBES.items():
        try:
            results.append(call(state, train_tokens, val_tokens, **loop))
        except Exception as error:
            lines = str(error).splitlines() or [""]
            results.append(Result(name, "did not finish", f"{type(error).__name__}: {lines[0]}"))
    return Report(results)
