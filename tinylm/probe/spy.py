"""Which ops a model runs, on what inputs: an override that looks, and lets the implementation in force run."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..autograd import Op
from ..settings import Block, current
from ..tensor import Tensor


@dataclass
class Call:
    """One call of an op."""

    op: type[Op]
    inputs: tuple[Any, ...]
    params: dict[str, Any]
    output: Any  # a Tensor, or a tuple of them

    @property
    def outputs(self) -> tuple[Any, ...]:
        return self.output if isinstance(self.output, tuple) else (self.output,)


@contextmanager
def listen() -> Iterator[list[Call]]:
    """Inside, each op that runs adds a Call to the list; also the ops that another is composed of."""
    calls: list[Call] = []
    before = current().overrides
    with Block(overrides={op: _Spy(op, before.get(op), calls) for op in _all_ops(Op)}):
        yield calls


class _Spy:
    """Stands in place of an `override`: a replacement that notes the call and runs what it replaces."""

    def __init__(self, op: type[Op], before: Any, calls: list[Call]):
        def replacement(*inputs: Any, **params: Any) -> Any:
            with Block(overrides={op: before}):
                output = op.apply(*inputs, **params)
            calls.append(Call(op, inputs, params, output))
            return output

        self.replacement: Callable[..., Any] = replacement

    def saw(self, target: Any) -> None:
        pass

    def went_back(self) -> None:
        pass


def plain_ops() -> Block:
    """Inside, no `override` is in force."""
    return Block(overrides=dict.fromkeys(current().overrides))


def arrays_of(output: Any) -> list[np.ndarray]:
    return [y.data if isinstance(y, Tensor) else y for y in (output if isinstance(output, tuple) else (output,))]


def _all_ops(op: type[Op]) -> list[type[Op]]:
    return [each for direct in op.__subclasses__() for each in (direct, *_all_ops(direct))]
