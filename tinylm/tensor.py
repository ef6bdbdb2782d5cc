"""Tensor: an array, its gradient, and the op that made it.

The operators and methods are the functions of `tinylm.ops`, under the names that NumPy and PyTorch use.
"""

import copy
import weakref
from collections.abc import Iterator
from typing import Any

import numpy as np

from . import autograd, ops
from .array import Array, array_module, device_of, is_array, plain, to_device
from .errors import numpy_names
from .ops.gelu import gelu as _gelu  # not ops.gelu: to a type checker that is the module
from .ops.matmul import matmul as _matmul
from .ops.softmax import softmax as _softmax


class Tensor:
    """An n-dimensional array that records how it was computed.

    `data` is the raw array (NumPy or CuPy; its device is the tensor's device). `grad` is the raw array of the
    same shape and dtype that backward fills, on leaves that require a gradient and after `retain_grad()`. Lists of
    floats and Python floats become float32, or `dtype`; arrays keep their dtype. A tensor of integers or booleans has
    no gradient.

    `Tensor(array)` shares the array's memory; `tensor(array)` and `Parameter(array)` copy it. Raises TypeError for
    anything but an array of numbers (also for np.matrix and masked arrays).
    """

    __slots__ = ("__weakref__", "data", "grad", "op", "requires_grad", "slot")
    __array_ufunc__ = None  # so that `array * tensor` calls the Tensor's operator, and makes no array of objects
    __hash__ = object.__hash__

    data: Array
    grad: Array | None
    op: autograd.Op | None
    slot: int

    def __init__(self, data: Any, dtype: Any = None, device: str | None = None, requires_grad: bool = False):
        if isinstance(data, Tensor):
            data = data.data
        if is_array(data):
            data = plain(data, "a Tensor")
        else:
            if dtype is None and not isinstance(data, np.generic) and np.asarray(data).dtype == np.float64:
                dtype = np.float32
            data = np.asarray(data)
        if dtype is not None:
            data = data.astype(dtype, copy=False)
        if data.dtype.kind not in "fiub":
            raise TypeError(f"a Tensor holds floats, integers or booleans, not {data.dtype}")
        if requires_grad and data.dtype.kind != "f":
            raise TypeError(f"only a floating tensor can require a gradient, not one of {data.dtype}")
        self.data = data if device is None else to_device(data, device)
        self.grad = None
        self.op = None
        self.slot = 0
        self.requires_grad = requires_grad

    @staticmethod
    def _of(data: Array, op: autograd.Op | None, slot: int) -> "Tensor":
        """An op's output, without the checks of `Tensor(...)`."""
        self = Tensor.__new__(Tensor)
        self.data = np.asarray(data) if isinstance(data, np.generic) else data  # NumPy's sums return scalars
        self.grad = None
        self.op = op
        self.slot = slot
        self.requires_grad = op is not None
        return self

    # --- properties -------------------------------------------------------------------------------------------

    @property
    def shape(self) -> tuple[int, ...]:
        return self.data.shape

    @property
    def dtype(self) -> Any:
        return self.data.dtype

    @property
    def ndim(self) -> int:
        return self.data.ndim

    @property
    def size(self) -> int:
        """Number of elements."""
        return self.data.size

    def numel(self) -> int:
        """Number of elements: `size` under PyTorch's name."""
        return self.data.size

    @property
    def nbytes(self) -> int:
        return self.data.nbytes

    @property
    def device(self) -> str:
        """'cpu' or 'cuda'."""
        return device_of(self.data)

    @property
    def is_leaf(self) -> bool:
        """Whether no recorded op made it; backward leaves gradients on leaves only."""
        return self.op is None

    def __repr__(self) -> str:
        values = np.array2string(self.numpy(), separator=", ", prefix="Tensor(", threshold=100, precision=4)
        notes = [f"shape={self.shape}", f"dtype={self.dtype}", f"device={self.device}"]
        if self.op is not None:
            notes.append(f"op={self.op.name()}")
        elif self.requires_grad:
            notes.append("requires_grad=True")
        return f"{type(self).__name__}({values}, {', '.join(notes)})"

    def __len__(self) -> int:
        if self.ndim == 0:
            raise TypeError("a Tensor of shape () has no len()")
        return self.shape[0]

    def __iter__(self) -> Iterator["Tensor"]:
        return (self[i] for i in range(len(self)))

    # --- values -----------------------------------------------------------------------------------------------

    def numpy(self) -> np.ndarray:
        """The values as a NumPy array: the tensor's own memory on a CPU, a copy from a GPU."""
        return to_device(self.data, "cpu")

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        """For np.asarray and NumPy's functions. Raises RuntimeError where a gradient is required: it would be lost."""
        if self.requires_grad:
            raise RuntimeError(
                "this tensor requires a gradient, which a NumPy array loses; use ops, or tensor.numpy() for the values"
            )
        if self.device != "cpu":
            raise TypeError("this tensor is on a GPU, a NumPy array is not; use tensor.numpy(), which copies")
        return np.array(self.data, dtype, copy=copy)

    def item(self) -> Any:
        """The only value as a Python number. Raises ValueError unless the tensor has one element."""
        if self.size != 1:
            raise ValueError(f"item() needs a tensor of one element; this one has shape {self.shape}")
        return self.data.item()

    def tolist(self) -> Any:
        return self.data.tolist()

    def __float__(self) -> float:
        return float(self.item())

    def __int__(self) -> int:
        return int(self.item())

    def __format__(self, spec: str) -> str:
        """f"{loss:.3f}": the only value, formatted as a number. Raises TypeError for several elements."""
        if self.ndim == 0 or (spec and self.size == 1):
            return format(self.item(), spec)
        if spec:
            raise TypeError(f"{spec!r} formats a tensor of one element; this one has shape {self.shape}")
        return str(self)

    def __bool__(self) -> bool:
        if self.size != 1:
            raise ValueError(f"the truth value of a tensor of shape {self.shape} is ambiguous; use .any() or .all()")
        return bool(self.data.item())

    def any(self) -> bool:
        return bool(self.data.any())

    def all(self) -> bool:
        return bool(self.data.all())

    @numpy_names
    def argmax(self, axis: int | None = None) -> "Tensor":
        return Tensor(array_module(self.data).asarray(self.data.argmax(axis=axis)))

    # --- gradients --------------------------------------------------------------------------------------------

    def backward(self, grad: Any = None) -> None:
        """Add this tensor's gradient to `.grad` of every leaf it depends on; see `autograd.backward`."""
        autograd.backward(self, grad.data if isinstance(grad, Tensor) else grad)

    def detach(self) -> "Tensor":
        """The same values (and memory), cut off from the graph."""
        return Tensor(self.data)

    def requires_grad_(self, requires_grad: bool = True) -> "Tensor":
        """Set whether this leaf requires a gradient; returns the tensor itself."""
        if self.op is not None:
            raise RuntimeError(
                f"requires_grad_ is for leaves; this tensor was made by {self.op.name()} (detach() it first)"
            )
        if requires_grad and self.dtype.kind != "f":
            raise TypeError(f"only a floating tensor can require a gradient, not one of {self.dtype}")
        self.requires_grad = requires_grad
        return self

    def retain_grad(self) -> None:
        """Let backward fill `.grad` of this tensor too, though an op made it; nothing changes for a leaf.

        Raises RuntimeError for a tensor that requires no gradient.
        """
        if not self.requires_grad:
            raise RuntimeError("retain_grad needs a tensor that requires a gradient; this one was made without one")
        if self.op is not None and all(ref() is not self for ref in self.op.retained):
            self.op.retained = (*self.op.retained, weakref.ref(self))

    def zero_grad(self) -> None:
        self.grad = None

    def __deepcopy__(self, memo: dict[int, Any]) -> "Tensor":
        """A leaf with memory of its own. Raises RuntimeError for a tensor that an op made: its graph is not copied."""
        if self.op is not None:
            raise RuntimeError(
                f"only leaves can be deep-copied; this tensor was made by {self.op.name()} (detach() or clone() it)"
            )
        other = copy.copy(self)
        other.grad = None if self.grad is None else self.grad.copy()
        owned(other, self)
        memo[id(self)] = other
        return other

    # --- device and dtype -------------------------------------------------------------------------------------

    def to(self, target: Any) -> "Tensor":
        """On another device ('cpu', 'cuda': a new leaf, outside the graph) or in another dtype (recorded)."""
        if target in ("cpu", "cuda"):
            if target == self.device:
                return self
            return Tensor(self.data, device=target, requires_grad=self.requires_grad and self.is_leaf)
        return ops.cast(self, target)

    def cpu(self) -> "Tensor":
        return self.to("cpu")

    def cuda(self) -> "Tensor":
        return self.to("cuda")

    def half(self) -> "Tensor":
        return ops.cast(self, np.float16)

    def float(self) -> "Tensor":
        return ops.cast(self, np.float32)

    def double(self) -> "Tensor":
        return ops.cast(self, np.float64)

    # --- operators --------------------------------------------------------------------------------------------

    __add__ = ops.add
    __sub__ = ops.sub
    __mul__ = ops.mul
    __truediv__ = ops.div
    __pow__ = ops.pow
    __matmul__ = _matmul
    __neg__ = ops.neg
    __getitem__ = ops.index

    def __radd__(self, other: Any) -> "Tensor":
        return ops.add(other, self)

    def __rsub__(self, other: Any) -> "Tensor":
        return ops.sub(other, self)

    def __rmul__(self, other: Any) -> "Tensor":
        return ops.mul(other, self)

    def __rtruediv__(self, other: Any) -> "Tensor":
        return ops.div(other, self)

    def __rmatmul__(self, other: Any) -> "Tensor":
        return ops.matmul(other, self)

    def __pos__(self) -> "Tensor":
        return self

    # Comparisons return tensors of booleans, outside the graph.

    def __eq__(self, other: Any) -> Any:
        return Tensor(self.data == _raw(other)) if _comparable(other) else NotImplemented

    def __ne__(self, other: Any) -> Any:
        return Tensor(self.data != _raw(other)) if _comparable(other) else NotImplemented

    def __lt__(self, other: Any) -> "Tensor":
        return Tensor(self.data < _raw(other))

    def __le__(self, other: Any) -> "Tensor":
        return Tensor(self.data <= _raw(other))

    def __gt__(self, other: Any) -> "Tensor":
        return Tensor(self.data > _raw(other))

    def __ge__(self, other: Any) -> "Tensor":
        return Tensor(self.data >= _raw(other))

    # --- the operations: the functions of `tinylm.ops` themselves -----------------------------------------------

    exp = ops.exp
    log = ops.log
    sqrt = ops.sqrt
    sin = ops.sin
    cos = ops.cos
    tanh = ops.tanh
    sigmoid = ops.sigmoid
    relu = ops.relu
    gelu = _gelu
    abs = __abs__ = ops.abs
    clamp = ops.clamp
    pow = ops.pow
    maximum = ops.maximum
    masked_fill = ops.masked_fill
    clone = ops.clone
    astype = ops.cast

    sum = ops.sum
    mean = ops.mean
    max = ops.max
    min = ops.min
    var = ops.var
    std = ops.std
    logsumexp = ops.logsumexp
    softmax = _softmax
    log_softmax = ops.log_softmax
    matmul = _matmul

    reshape = view = ops.reshape
    flatten = ops.flatten
    transpose = ops.transpose
    permute = ops.permute
    T = property(ops.transpose)
    swapaxes = ops.swapaxes
    expand_dims = unsqueeze = ops.expand_dims
    squeeze = ops.squeeze
    split = ops.split
    chunk = ops.chunk
    tril = ops.tril


def _raw(x: Any) -> Any:
    return x.data if isinstance(x, Tensor) else x


def _comparable(x: Any) -> bool:
    return isinstance(x, Tensor | int | float | np.generic) or is_array(x)


def tensor(data: Any, dtype: Any = None, device: str | None = None, requires_grad: bool = False) -> Tensor:
    """A Tensor with its own memory, from a list, number, array or Tensor; see `Tensor`."""
    return owned(Tensor(data, dtype, device, requires_grad), data)


def owned(new: Tensor, given: Any) -> Tensor:
    """`new`, made from `given`, with its own memory."""
    given = _raw(given)
    if new.data is given or new.data.base is not None:
        new.data = new.data.copy(order="K") if isinstance(given, np.ndarray) else new.data.copy()
    return new
