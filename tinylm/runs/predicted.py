"""What was predicted for a run, beside what was measured.

All but the time follows from the configuration, by the formulas of `tinylm estimate`. The time is predicted as
`estimate` does it, from a few steps: the run's own first ones, so that nothing runs twice.
"""

import math
import statistics
from collections.abc import Mapping
from dataclasses import fields
from typing import Any, TypeVar

import numpy as np

from .. import estimate
from ..gpt import GPTConfig
from ..settings import Block
from ..training import TrainConfig

Config = TypeVar("Config", GPTConfig, TrainConfig)
MEASURED = "measured"  # in config.json: {"parameters": ..., "tape": bytes} of the first step under this configuration
UNITS = {  # of the rows, in their order
    "parameters": "",
    "first loss": "nats a token",
    "peak of the tape": "bytes",
    "FLOPs a token": "FLOP",
    "steps": "",
    "FLOPs in all": "FLOP",
    "time": "seconds",
}


def rows(config: Mapping[str, Any], columns: Mapping[str, np.ndarray]) -> list[dict[str, Any]]:
    """[{"name", "unit", "predicted", "measured"}] of everything in UNITS; None for what is not known.

    `config` is that of config.json, flat; `columns` has "step", "tokens", "seconds", "loss" and "tokens_per_second".
    """
    step, loss, tokens = (columns[name] for name in ("step", "loss", "tokens"))
    predicted = from_config(config)
    with np.errstate(divide="ignore", invalid="ignore"):
        times = np.diff(tokens, prepend=0) / columns["tokens_per_second"]
    if "steps" in predicted and (a_step := step_time(times[np.isfinite(times)])):
        predicted["time"] = predicted["steps"] * a_step
    measured = {
        "parameters": config.get(f"{MEASURED}.parameters"),
        "first loss": loss[0] if step[0] == 1 else None,
        "peak of the tape": config.get(f"{MEASURED}.tape"),
        "steps": _last(step[np.isfinite(loss)]),
        "FLOPs in all": _last(tokens) * predicted.get("FLOPs a token", math.nan),
        "time": _last(columns["seconds"]),
    }
    return [
        {"name": name, "unit": unit, "predicted": _finite(predicted.get(name)), "measured": _finite(measured.get(name))}
        for name, unit in UNITS.items()
    ]


def from_config(config: Mapping[str, Any]) -> dict[str, float]:
    """What the configuration of a GPT and its training predicts; less, or nothing, for another configuration."""
    model, training = _made(GPTConfig, config), _made(TrainConfig, config)
    predicted: dict[str, float] = {}
    if model is not None:
        predicted |= {"parameters": sum(estimate.parameters(model).values()), "first loss": math.log(model.vocab_size)}
    if training is not None:
        predicted["steps"] = training.steps
    engine = config.get("engine")
    if model is None or training is None or not isinstance(engine, list) or "composed" in engine:
        return predicted
    with Block(engines=tuple(engine)):  # the names suffice: nothing runs, so they need not be installed here
        flops = sum(estimate.step_flops(model, training).values())
        held = estimate.memory(model, training)
    predicted["FLOPs a token"] = flops / (training.batch_size * (training.block_size or model.block_size))
    predicted["FLOPs in all"] = training.steps * flops
    # What the tape holds; the parameters and AdamW's moments, which are there all the time, follow from their number.
    predicted["peak of the tape"] = sum(held.values()) - held["parameters"] - held["optimizer state"]
    return predicted


def step_time(times: np.ndarray) -> float | None:
    """Seconds of a step, predicted from the first steps; None where there are no others."""
    some = estimate.first_steps(times)
    return statistics.median(some[1:]) if len(some) < len(times) else None


def _made(cls: type[Config], config: Mapping[str, Any]) -> Config | None:
    """The dataclass, if `config` has all its fields, and no size beyond what a machine has."""
    try:
        made = cls(**{field.name: config[field.name] for field in fields(cls)})
        sizes = [value for value in vars(made).values() if isinstance(value, int)]
        walked = [config.get("n_layer", 0), config.get("threads", 0)]  # one by one
        return made if max(sizes) < 10**12 and max(walked) < 10**4 else None
    except (LookupError, TypeError, ValueError):
        return None


def _last(values: np.ndarray) -> float:
    finite = values[np.isfinite(values)]
    return float(finite[-1]) if len(finite) else math.nan


def _finite(value: Any) -> float | None:
    """The value, if it is a number, finite and not too large for a float."""
    return value if isinstance(value, int | float) and abs(value) < 1e300 else None
