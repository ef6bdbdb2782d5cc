"""Module: a part of a model, whose parameters and buffers have names."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from ..array import Array, is_array, to_device
from ..tensor import Tensor, owned


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
    two names (tied weights) counts once, under the first. A buffer is a tensor that belongs to the model but is not
    trained, such as a mask: see `register_buffer`.
    """

    training = True
    _buffers: tuple[str, ...] = ()  # names of attributes

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError(f"{type(self).__name__} has no forward")

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.forward(*args, **kwargs)

    def children(self) -> Iterator[tuple[str, "Module"]]:
        """(name, module) of the modules directly below this one; those in a list are named 'attribute.index'."""
        return ((name, x) for name, x in self._members() if isinstance(x, Module))

    def modules(self) -> Iterator["Module"]:
        """This module and all below it, each once."""
        return (module for _, module in self.named_modules())

    def named_modules(self) -> Iterator[tuple[str, "Module"]]:
        """(dotted name, module) of this module, whose name is '', and of all below it; each once, parents first."""
        seen: set[int] = set()
        stack: list[tuple[str, Module]] = [("", self)]
        while stack:
            name, module = stack.pop()
            if id(module) not in seen:
                seen.add(id(module))
                yield name, module
                stack += reversed([(_dotted(name, below), child) for below, child in module.children()])

    def apply(self, fn: Callable[["Module"], Any]) -> "Module":
        """Call fn(module) for every module below this one, then for this one; returns the module."""
        for child in {id(child): child for _, child in self.children()}.values():
            child.apply(fn)
        fn(self)
        return self

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

    def register_buffer(self, name: str, array: Array | Tensor) -> None:
        """Make `array` the attribute `name`, a Tensor that shares its memory: moved and saved with the parameters.

        What is assigned to the attribute later is the buffer then. Replicas of the model share a buffer's memory, and
        what a replica assigns stays in it: a buffer that forward changes takes a single worker. Raises ValueError for
        a name that is no identifier or is taken.
        """
        if not (isinstance(name, str) and name.isidentifier()):
            raise ValueError(f"register_buffer: the name must be an identifier, not {name!r}")
        if hasattr(self, name) and name not in self._buffers:
            raise ValueError(f"register_buffer: {type(self).__name__} already has an attribute {name!r}")
        buffer = Tensor(array)
        self._buffers = (*(other for other in self._buffers if other != name), name)
        setattr(self, name, buffer)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in self._buffers and not isinstance(value, Tensor):
            value = Tensor(value)
        super().__setattr__(name, value)

    def named_buffers(self) -> Iterator[tuple[str, Tensor]]:
        """(dotted name, buffer) of this module and of those below it, each buffer once."""
        found: dict[int, tuple[str, Tensor]] = {}
        for path, module in self.named_modules():
            for name in module._buffers:
                buffer = getattr(module, name)
                found.setdefault(id(buffer), (_dotted(path, name), buffer))
        return iter(found.values())

    def buffers(self) -> Iterator[Tensor]:
        return (buffer for _, buffer in self.named_buffers())

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
        """Move every parameter and buffer to 'cpu' or 'cuda', in place; returns the module."""
        for x in (*self.parameters(), *self.buffers()):
            x.data = to_device(x.data, device)
            x.grad = None if x.grad is None else to_device(x.grad, device)
        return self

    def state_dict(self) -> dict[str, Array]:
        """name -> array of each parameter, then of each buffer: the live arrays, not copies."""
        return {name: x.data for name, x in (*self.named_parameters(), *self.named_buffers())}

    def load_state_dict(self, state: Mapping[str, Array]) -> None:
        """Copy arrays into the parameters and buffers of the same names. The names and shapes must match exactly.

        Raises ValueError that lists every missing, unexpected and mis-shaped name, and TypeError for what is no array;
        then nothing is loaded.
        """
        for name, a in state.items():
            if not is_array(a):
                raise TypeError(f"load_state_dict: {name} must be an array, not {type(a).__name__}; try .numpy()")
        own: dict[str, Tensor] = dict((*self.named_parameters(), *self.named_buffers()))
        wrong = [f"missing {name}" for name in own if name not in state]
        wrong += [f"unexpected {name}" for name in state if name not in own]
        wrong += [
            f"{name} is {tuple(state[name].shape)}, not {x.shape}"
            for name, x in own.items()
            if name in state and tuple(state[name].shape) != x.shape
        ]
        if wrong:
            raise ValueError("load_state_dict: " + "; ".join(wrong))
        for name, x in own.items():
            x.data[...] = to_device(state[name], x.device)

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


def _dotted(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name
