"""Layers: modules with a forward, most of them an op with its weights; and lists of modules."""

import math
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from .. import ops, random
from ..array import Array
from ..errors import check_flag, check_number, check_probability, check_sizes
from ..tensor import Tensor
from .module import Module, Parameter


def _normal(shape: tuple[int, ...], std: float) -> Array:
    return random.next_generator().normal(0.0, std, shape).astype(np.float32)


def _uniform(shape: tuple[int, ...], bound: float) -> Array:
    return random.next_generator().uniform(-bound, bound, shape).astype(np.float32)


class Linear(Module):
    """x (..., n_in) -> x W^T + b (..., n_out). Initialised uniformly in +-1/sqrt(n_in), as PyTorch does."""

    def __init__(self, n_in: int, n_out: int, bias: bool = True):
        check_sizes("Linear", n_in=n_in, n_out=n_out)
        check_flag("Linear", bias=bias)
        bound = 1 / math.sqrt(n_in)
        self.weight = Parameter(_uniform((n_out, n_in), bound))
        self.bias = Parameter(_uniform((n_out,), bound)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return ops.linear(x, self.weight, self.bias)


class Embedding(Module):
    """Integers (...) -> rows (..., n_embd) of a table of `n_rows`. Initialised from N(0, 1)."""

    def __init__(self, n_rows: int, n_embd: int):
        check_sizes("Embedding", n_rows=n_rows, n_embd=n_embd)
        self.weight = Parameter(_normal((n_rows, n_embd), 1.0))

    def forward(self, ids: Tensor | Array) -> Tensor:
        return ops.embedding(self.weight, ids)


class LayerNorm(Module):
    """Normalise the last axis, of length `n_embd`; see `ops.layer_norm`."""

    def __init__(self, n_embd: int, bias: bool = True, eps: float = 1e-5):
        check_sizes("LayerNorm", n_embd=n_embd)
        check_flag("LayerNorm", bias=bias)
        check_number("LayerNorm", eps=eps)
        if not eps >= 0:
            raise ValueError(f"LayerNorm: eps must not be negative: {eps}")
        self.eps = eps
        self.weight = Parameter(np.ones(n_embd, np.float32))
        self.bias = Parameter(np.zeros(n_embd, np.float32)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return ops.layer_norm(x, self.weight, self.bias, self.eps)


class Dropout(Module):
    """Zero elements with probability `p` while training."""

    def __init__(self, p: float):
        check_probability("Dropout", p=p)
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        return ops.dropout(x, self.p, self.training)


class ReLU(Module):
    """max(x, 0)."""

    def forward(self, x: Tensor) -> Tensor:
        return ops.relu(x)


class GELU(Module):
    """Gaussian error linear unit in its tanh form: PyTorch's GELU(approximate="tanh")."""

    def forward(self, x: Tensor) -> Tensor:
        return ops.gelu(x)


class Tanh(Module):
    """Hyperbolic tangent."""

    def forward(self, x: Tensor) -> Tensor:
        return ops.tanh(x)


class Sigmoid(Module):
    """1 / (1 + exp(-x))."""

    def forward(self, x: Tensor) -> Tensor:
        return ops.sigmoid(x)


class ModuleList(Module):
    """A list of modules, whose parameters are named by index: '0.weight'. It has no forward: write the loop yourself.

    A plain list as an attribute of a Module works as well. Raises TypeError for what is no Module.
    """

    def __init__(self, modules: Iterable[Module] = ()):
        self.extend(modules)

    def append(self, module: Module) -> Any:
        """Add a module at the end; returns the list."""
        self._put(len(self), module)
        return self

    def extend(self, modules: Iterable[Module]) -> Any:
        """Add modules at the end; returns the list."""
        for module in modules:
            self.append(module)
        return self

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __iter__(self) -> Iterator[Any]:
        return iter([x for name, x in vars(self).items() if name.isdigit()])

    def __getitem__(self, i: int | slice) -> Any:
        """The module at `i`; for a slice, a list of the same kind with the same modules."""
        return type(self)().extend(list(self)[i]) if isinstance(i, slice) else list(self)[i]

    def __setitem__(self, i: int, module: Module) -> None:
        self._put(range(len(self))[i], module)

    def _put(self, i: int, module: Module) -> None:
        if not isinstance(module, Module):
            raise TypeError(f"{type(self).__name__} takes modules, not {type(module).__name__}")
        setattr(self, str(i), module)  # an attribute, as a module's other parts are


class Sequential(ModuleList):
    """Modules called one after another: Sequential(Linear(2, 8), ReLU(), Linear(8, 1))(x)."""

    def __init__(self, *modules: Module):
        super().__init__(modules)

    def forward(self, x: Any) -> Any:
        for module in self:
            x = module(x)
        return x
