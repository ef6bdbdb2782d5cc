"""Half precision: autocast and loss scaling (Micikevicius et al., 2018).

float16 has 11 significant bits from 6e-5 to 65504, and fewer down to 6e-8. Activations fit into that range; gradients
of a mean over thousands of tokens do not: the small ones underflow to zero. So the loss is multiplied by a large scale
before backward. Every gradient is then multiplied by it too, and is divided by it in float32 before the update. If the
scale was too large, some gradient overflows: then this step is skipped and the scale is halved.

    scaler = GradScaler()
    with autocast("float16"):
        loss = model.loss(x, y)
    scaler.scale(loss).backward()          # k times, when accumulating
    scaler.unscale_(optimizer)
    clip_grad_norm_(parameters, 1.0)
    scaler.step(optimizer)
    scaler.update()

On a CPU float16 is emulated: products are formed in float32 and rounded. That saves memory and teaches; it is not
faster.
"""

from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import numpy as np

from . import ops
from .array import Array, all_finite, is_array
from .optimizer import Optimizer
from .registry import replaceable
from .settings import Block
from .tensor import Tensor


def autocast(dtype: Any = "float16", enabled: bool = True) -> Block:
    """Inside, the ops that multiply matrices cast their floating inputs to `dtype` (float16), embeddings their output.

    The cast is recorded, and its backward returns the gradient in the input's dtype: a float32 parameter keeps a
    float32 gradient. All other ops compute in the dtype of their inputs; losses are float32.
    """
    with suppress(TypeError):  # NumPy has no bfloat16: the error below says so
        dtype = np.dtype(dtype)
    if dtype not in (np.float16, np.float32):
        raise ValueError(f"autocast: dtype must be float16 or float32, not {dtype}")

    def cast(x: Any) -> Any:
        data = x.data if isinstance(x, Tensor) else x
        return ops.cast(x, dtype) if is_array(data) and data.dtype.kind == "f" else x

    return Block(autocast=cast if enabled and dtype == np.float16 else None)


class GradScaler:
    """Dynamic loss scaling, with PyTorch's names, order of calls and decisions.

    The scale starts at `init_scale`. A step with a gradient that is not finite is skipped and multiplies the scale by
    `backoff_factor`; `growth_interval` good steps in a row multiply it by `growth_factor`. A scaler that is not
    `enabled` changes nothing.
    """

    def __init__(
        self,
        init_scale: float = 2.0**16,
        growth_factor: float = 2.0,
        backoff_factor: float = 0.5,
        growth_interval: int = 2000,
        enabled: bool = True,
    ):
        if not (init_scale > 0 and growth_factor > 1 and 0 < backoff_factor < 1 and growth_interval >= 1):
            raise ValueError(
                "GradScaler: init_scale > 0, growth_factor > 1, 0 < backoff_factor < 1, growth_interval >= 1"
            )
        self.growth_factor = growth_factor
        self.backoff_factor = backoff_factor
        self.growth_interval = growth_interval
        self.enabled = enabled
        self._scale = float(init_scale)
        self._good_steps = 0  # in a row
        self._found_inf: bool | None = None  # of this step; None before unscale_
        self._stepped = False  # in this step
        self._unscaled: Optimizer | None = None  # whose gradients unscale_ divided, until step() or update()

    def get_scale(self) -> float:
        return self._scale if self.enabled else 1.0

    def scale(self, loss: Tensor) -> Tensor:
        """The loss times the scale, in float32.

        If an error ended the last step between unscale_() and step(), and its gradients were set to None since, a new
        step begins here. (PyTorch's would want an update() first.)
        """
        if not self.enabled:
            return loss
        abandoned = self._unscaled
        if abandoned is not None and all(p.grad is None for p in abandoned.parameters()):
            self._found_inf = self._unscaled = None
        return ops.cast(loss, np.float32) * self._scale

    def unscale_(self, optimizer: Optimizer) -> None:
        """Divide the gradients by the scale, and check whether all are finite. Call it once a step, before clipping.

        Raises RuntimeError for a second call in a step, and if no parameter has a gradient; ValueError for float16
        gradients: the weights should be float32.
        """
        if not self.enabled:
            return
        if self._found_inf is not None:
            raise RuntimeError("GradScaler.unscale_ was already called in this step; call update() after step()")
        grads = [p.grad for p in optimizer.parameters() if p.grad is not None]
        if not grads:
            raise RuntimeError(
                "GradScaler.unscale_: no parameter of the optimizer has a gradient; call backward() first"
            )
        if any(g.dtype == np.float16 for g in grads):
            raise ValueError("GradScaler.unscale_: gradients of float16 weights; keep the weights in float32")
        self._found_inf = not unscale(grads, 1 / self._scale)
        self._unscaled = optimizer

    def step(self, optimizer: Optimizer, coefficient: Any = 1.0) -> bool:
        """Call optimizer.step(coefficient) unless a gradient is not finite; returns whether it was called."""
        if self.enabled and self._stepped:
            raise RuntimeError("GradScaler.step was already called in this step; call update() after step()")
        if self.enabled and self._found_inf is None:
            self.unscale_(optimizer)
        if not self._found_inf:
            optimizer.step(coefficient)
        self._stepped, self._unscaled = True, None
        return not self._found_inf

    def update(self) -> None:
        """Set the scale for the next step."""
        if not self.enabled:
            return
        if self._found_inf is None:
            raise RuntimeError("GradScaler.update needs step() or unscale_() before it")
        if self._found_inf:
            self._scale *= self.backoff_factor
            self._good_steps = 0
        else:
            self._good_steps += 1
            if self._good_steps == self.growth_interval:
                grown = self._scale * self.growth_factor
                if grown < float(np.finfo(np.float32).max):  # halving could not undo an infinite scale
                    self._scale = grown
                self._good_steps = 0
        self._found_inf, self._stepped, self._unscaled = None, False, None

    def state_dict(self) -> dict[str, Any]:
        """The state for a checkpoint, under PyTorch's names."""
        return {
            "scale": self._scale,
            "growth_factor": self.growth_factor,
            "backoff_factor": self.backoff_factor,
            "growth_interval": self.growth_interval,
            "_growth_tracker": self._good_steps,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._scale = float(state["scale"])
        self.growth_factor = state["growth_factor"]
        self.backoff_factor = state["backoff_factor"]
        self.growth_interval = state["growth_interval"]
        self._good_steps = state["_growth_tracker"]


@replaceable
def unscale(grads: Sequence[Array], factor: float) -> bool:
    """Multiply every gradient by `factor`, in place; returns whether all are finite."""
    for g in grads:
        g *= factor
    return all_finite(grads)
