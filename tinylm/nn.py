"""Modules: parameters with names, and the layers a GPT is made of."""

import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from . import ops, random
from .array import Array, to_device
from .tensor import Tensor, owned


class Parameter(Tensor):
    """A tensor that an optimizer updates; as an attribute of a Module it is named after the attribute.

    It copies `data`. float64 data become float32 unless `dtype` says otherwise.
    """

    __slots__ = ()

    def __init__(self, data: Any, dtype: Any = None, device: str | None = None):
        if dtype is None and getattr(data, "dtype", None) == np.float64:
            dtype = np.float32
        super().__init__(data, dtype, device, requires_grad=True)
        owned(self, data)


class Module:
    """A part of a model. Its parameters are those of its attributes, in the order of their assignment.

    An attribute may be a Parameter or a Module, or a list, tuple or dict of them, nested to any depth. A parameter with
    two names (tied weights) counts once, under the first.
    """

    training = True

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError(f"{type(self).__name__} has no forward")

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.forward(*args, **kwargs)

    def children(self) -> Iterator[tuple[str, "Module"]]:
        """(name, module) of the modules directly below this one; those in a list are named 'attribute.index'."""
        return ((name, x) for name, x in self._members() if isinstance(x, Module))

    def modules(self) -> Iterator["Module"]:
        """This module and all below it."""
        yield self
        for _, child in self.children():
            yield from child.modules()

    def named_parameters(self) -> Iterator[tuple[str, Parameter]]:
        """(dotted name, parameter) in definition order, each parameter once."""
        seen: set[int] = set()
        for name, parameter in self._all_parameters():
            if id(parameter) not in seen:
                seen.add(id(parameter))
                yield name, parameter

    def _all_parameters(self) -> Iterator[tuple[str, Parameter]]:
        for name, x in self._members():
            if isinstance(x, Parameter):
                yield name, x
            else:
                yield from ((f"{name}.{below}", parameter) for below, parameter in x._all_parameters())

    def _members(self) -> Iterator[tuple[str, Any]]:
        """(name, Parameter or Module) of the attributes, and of the items of lists, tuples and dicts among them."""
        for name, x in vars(self).items():
            if isinstance(x, _HOLDERS):  # most attributes are plain: skip them fast
                yield from _members_of(name, x)

    def parameters(self) -> Iterator[Parameter]:
        return (parameter for _, parameter in self.named_parameters())

    def num_parameters(self) -> int:
        """Number of elements of all parameters; a tied weight counts once."""
        return sum(p.size for p in self.parameters())

    def train(self, mode: bool = True) -> "Module":
        """Switch to training behaviour (dropout on), everywhere below; returns the module."""
        for module in self.modules():
            module.training = mode
        return self

    def eval(self) -> "Module":
        """Switch to evaluation behaviour (dropout off); returns the module."""
        return self.train(False)

    def zero_grad(self) -> None:
        for p in self.parameters():
            p.grad = None

    def to(self, device: str) -> "Module":
        """Move every parameter to 'cpu' or 'cuda', in place; returns the module."""
        for p in self.parameters():
            p.data = to_device(p.data, device)
            p.grad = None if p.grad is None else to_device(p.grad, device)
        return self

    def state_dict(self) -> dict[str, Array]:
        """name -> array of each parameter: the live arrays, not copies."""
        return {name: p.data for name, p in self.named_parameters()}

    def load_state_dict(self, state: Mapping[str, Array]) -> None:
        """Copy arrays into the parameters of the same names. The names and shapes must match exactly.

        Raises ValueError that lists every missing, unexpected and mis-shaped name; then nothing is loaded.
        """
        own = dict(self.named_parameters())
        wrong = [f"missing {name}" for name in own if name not in state]
        wrong += [f"unexpected {name}" for name in state if name not in own]
        wrong += [
            f"{name} is {tuple(state[name].shape)}, not {p.shape}"
            for name, p in own.items()
            if name in state and tuple(state[name].shape) != p.shape
        ]
        if wrong:
            raise ValueError("load_state_dict: " + "; ".join(wrong))
        for name, p in own.items():
            p.data[...] = to_device(state[name], p.device)

    def __repr__(self) -> str:
        shapes = [f"{name}={x.shape}" for name, x in self._members() if isinstance(x, Parameter)]
        below = [f"  {name}: " + repr(child).replace("\n", "\n  ") for name, child in self.children()]
        return "\n".join([f"{type(self).__name__}({', '.join(shapes)})", *below])


_HOLDERS = (Parameter, Module, list, tuple, dict)  # a tuple: a union would be built at every call


def _members_of(name: str, x: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(x, (Parameter, Module)):
        yield name, x
    else:
        for key, y in x.items() if isinstance(x, dict) else enumerate(x):
            if isinstance(y, _HOLDERS):
                yield from _members_of(f"{name}.{key}", y)


def _normal(shape: tuple[int, ...], std: float) -> Array:
    return random.next_generator().normal(0.0, std, shape).astype(np.float32)


def _uniform(shape: tuple[int, ...], bound: float) -> Array:
    return random.next_generator().uniform(-bound, bound, shape).astype(np.float32)


class Linear(Module):
    """x (..., n_in) -> x W^T + b (..., n_out). Initialised uniformly in +-1/sqrt(n_in), as PyTorch does."""

    def __init__(self, n_in: int, n_out: int, bias: bool = True):
        bound = 1 / math.sqrt(n_in)
        self.weight = Parameter(_uniform((n_out, n_in), bound))
        self.bias = Parameter(_uniform((n_out,), bound)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return ops.linear(x, self.weight, self.bias)


class Embedding(Module):
    """Integers (...) -> rows (..., n_embd) of a table of `n_rows`. Initialised from N(0, 1)."""

    def __init__(self, n_rows: int, n_embd: int):
        self.weight = Parameter(_normal((n_rows, n_embd), 1.0))

    def forward(self, ids: Tensor | Array) -> Tensor:
        return ops.embedding(self.weight, ids)


class LayerNorm(Module):
    """Normalise the last axis, of length `n_embd`; see `ops.layer_norm`."""

    def __init__(self, n_embd: int, bias: bool = True, eps: float = 1e-5):
        self.eps = eps
        self.weight = Parameter(np.ones(n_embd, np.float32))
        self.bias = Parameter(np.zeros(n_embd, np.float32)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return ops.layer_norm(x, self.weight, self.bias, self.eps)


class Dropout(Module):
    """Zero elements with probability `p` while training."""

    def __init__(self, p: float):
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        return ops.dropout(x, self.p, self.training)
