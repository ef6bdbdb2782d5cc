"""A strict stand-in for CuPy that needs no GPU: NumPy arrays in a wrapper that refuses what a GPU array refuses.

tinylm asks `array_module(x)` for the module of an array and takes whatever answers to the name cupy. With `module` in
its place (`sys.modules["cupy"]`), the whole code for the GPU runs on the CPU, and fails where it

- converts a device array to a NumPy array implicitly, or passes one to a NumPy function or ufunc,
- indexes with, writes from, or computes with an array that is still on the host,
- calls a function, a method or a keyword that CuPy does not have (`FUNCTIONS` and `METHODS` list what it has of what
  tinylm may need; the keywords are those of CuPy 14),
- relies on NumPy returning scalars: here, as in CuPy, a result without axes is an array of shape ().

In one thing it is stricter than CuPy, which would convert silently: NumPy functions, NumPy scalars and lists of indices
are refused too, because each costs a copy between host and device.
"""

import operator
import types
from collections.abc import Callable
from typing import Any

import numpy as np

# Names -> the keywords that they take.
FUNCTIONS = {
    "abs absolute add cos divide equal exp expm1 floor_divide greater greater_equal isfinite isinf isnan less "
    "less_equal log log1p logical_and logical_not logical_or maximum minimum multiply negative not_equal power "
    "reciprocal sign sin sqrt square subtract tanh true_divide": "out dtype casting",
    "sum mean prod": "axis dtype out keepdims",
    "std var": "axis dtype ddof out keepdims",
    "max min amax amin all any": "axis out keepdims",
    "argmax argmin": "axis dtype out keepdims",
    "cumsum": "axis dtype out",
    "take": "axis out",
    "argsort": "axis kind",
    "empty ones zeros full": "dtype order",
    "empty_like ones_like zeros_like full_like": "dtype order shape",
    "eye": "M k dtype order",
    "tri": "M k dtype",
    "arange": "dtype",
    "linspace": "num endpoint dtype axis",
    "array": "dtype copy order ndmin blocking",
    "asarray": "dtype order blocking",
    "ascontiguousarray": "dtype",
    "matmul": "out dtype casting",
    "dot outer": "out",
    "einsum": "dtype optimize",
    "tensordot": "axes",
    "concatenate stack": "axis out dtype casting",
    "copyto": "casting where",
    "clip": "a_min a_max out",
    "ravel reshape": "order",
    "transpose": "axes",
    "expand_dims repeat split squeeze": "axis",
    "tril triu": "k",
    "broadcast_to moveaxis nonzero result_type swapaxes vdot where": "",
}
METHODS = {
    "sum mean prod": "axis dtype out keepdims",
    "std var": "axis dtype ddof out keepdims",
    "max min all any": "axis out keepdims",
    "argmax argmin": "axis dtype out keepdims",
    "cumsum": "axis dtype out",
    "take": "axis out",
    "astype": "order casting copy",
    "copy flatten ravel reshape": "order",
    "dot": "out",
    "view": "dtype",
    "argsort repeat squeeze": "axis",
    "fill nonzero swapaxes transpose": "",
}
CONSTANTS = (
    "bool_ e float16 float32 float64 inf int8 int16 int32 int64 nan newaxis pi uint8 uint16 uint32 uint64 dtype finfo"
)


class ndarray:
    """One array on the simulated device; `host` is the NumPy array that holds its values."""

    def __init__(self, host: np.ndarray):
        self.host = host

    # --- what CuPy refuses --------------------------------------------------------------------------------------

    def __array__(self, *_: Any, **__: Any) -> Any:
        raise TypeError("implicit conversion of a device array to a NumPy array; use cupy.asnumpy or .get()")

    def __array_ufunc__(self, ufunc: Any, *_: Any, **__: Any) -> Any:
        raise TypeError(f"numpy.{ufunc.__name__} met a device array; use array_module(x)")

    def __array_function__(self, function: Any, *_: Any, **__: Any) -> Any:
        raise TypeError(f"numpy.{function.__name__} met a device array; use array_module(x)")

    # --- what it is ---------------------------------------------------------------------------------------------

    shape = property(lambda self: self.host.shape)
    dtype = property(lambda self: self.host.dtype)
    ndim = property(lambda self: self.host.ndim)
    size = property(lambda self: self.host.size)
    nbytes = property(lambda self: self.host.nbytes)
    itemsize = property(lambda self: self.host.itemsize)
    strides = property(lambda self: self.host.strides)
    flags = property(lambda self: self.host.flags)
    T = property(lambda self: ndarray(self.host.T))

    @property
    def base(self) -> "ndarray | None":
        """None for an array with memory of its own."""
        return None if self.host.base is None else ndarray(self.host.base)

    def __repr__(self) -> str:
        return f"strict({self.host!r})"

    def __len__(self) -> int:
        return len(self.host)

    def __iter__(self) -> Any:
        return (self[i] for i in range(len(self)))

    # --- explicit copies to the host ----------------------------------------------------------------------------

    def get(self) -> np.ndarray:
        return self.host.copy()

    def item(self, *args: int) -> Any:
        return self.host.item(*args)

    def tolist(self) -> Any:
        return self.host.tolist()

    def __bool__(self) -> bool:
        return bool(self.host)

    def __float__(self) -> float:
        return float(self.host.item())

    def __int__(self) -> int:
        return int(self.host.item())

    # --- indexing -----------------------------------------------------------------------------------------------

    def __getitem__(self, key: Any) -> "ndarray":
        key = _host_key(key)
        y = self.host[key]
        if isinstance(y, np.generic) and not any(isinstance(k, np.ndarray | bool) for k in key):
            y = self.host[(*key, ...)]  # a view of one element, where NumPy copies it into a scalar
        return _device(y)

    def __setitem__(self, key: Any, value: Any) -> None:
        self.host[_host_key(key)] = _operand(value, "assignment")


def _operand(x: Any, where: str) -> Any:
    """An argument of an operator or function, checked and converted for NumPy."""
    if isinstance(x, ndarray):
        return x.host
    if isinstance(x, np.ndarray | np.generic):
        raise TypeError(f"{where}: a NumPy {type(x).__name__} ({x.dtype}) met a device array; move it with asarray")
    if isinstance(x, list | tuple):
        return type(x)(_operand(each, where) for each in x)
    return x


def _host_key(key: Any) -> tuple[Any, ...]:
    for k in key if isinstance(key, tuple) else (key,):
        if not (k is None or k is Ellipsis or isinstance(k, int | slice | ndarray)):
            raise TypeError(f"a device array was indexed with a {type(k).__name__} of the host; move it with asarray")
    key = _operand(key, "index")
    return key if isinstance(key, tuple) else (key,)


def _device(y: Any, *given: Any) -> Any:
    """NumPy's result as device arrays; if it is one of the arrays `given`, the same object."""
    for x in given:
        if isinstance(x, ndarray) and y is x.host:
            return x
    if isinstance(y, np.ndarray | np.generic):
        return ndarray(np.asarray(y))
    return type(y)(_device(each) for each in y) if isinstance(y, list | tuple) else y


def _strict(name: str, numpy_call: Callable[..., Any], keywords: str) -> Callable[..., Any]:
    allowed = set(keywords.split())

    def call(*args: Any, **kwargs: Any) -> Any:
        if unknown := kwargs.keys() - allowed:
            raise TypeError(f"cupy's {name} takes no {', '.join(sorted(unknown))}")
        out = kwargs.get("out")
        if not (out is None or isinstance(out, ndarray)):
            raise TypeError(f"cupy's {name}: out must be a device array, not {type(out).__name__}")
        kwargs.pop("blocking", None)
        y = numpy_call(*_operand(args, name), **{k: _operand(v, name) for k, v in kwargs.items()})
        return _device(y, out, *args)

    call.__name__ = name
    return call


def _binary(name: str) -> Callable[..., Any]:
    """The method of an operator: arrays of the device and Python numbers only."""
    plain = getattr(operator, name.replace("__r", "__") if name.startswith("__r") else name)
    reflected = name.startswith("__r")

    def method(self: ndarray, other: Any) -> Any:
        if not isinstance(other, ndarray | bool | int | float | np.ndarray | np.generic):
            return NotImplemented
        host = _operand(other, name)
        return _device(plain(host, self.host) if reflected else plain(self.host, host), self)

    return method


def _each(table: dict[str, str]) -> Any:
    return ((name, keywords) for names, keywords in table.items() for name in names.split())


for _name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul", "and", "or", "xor"):
    for _form in (f"__{_name}__", f"__r{_name}__", f"__i{_name}__"):
        setattr(ndarray, _form, _binary(_form))
for _name in ("__eq__", "__ne__", "__lt__", "__le__", "__gt__", "__ge__"):
    setattr(ndarray, _name, _binary(_name))
ndarray.__hash__ = None  # type: ignore[assignment]
for _name in ("__neg__", "__pos__", "__abs__", "__invert__"):
    setattr(ndarray, _name, _strict(_name, getattr(operator, _name), ""))
for _name, _keywords in _each(METHODS):
    setattr(ndarray, _name, _strict(_name, getattr(np.ndarray, _name), _keywords))

module = types.ModuleType("cupy", __doc__)
module.ndarray = ndarray
for _name, _keywords in _each(FUNCTIONS):
    setattr(module, _name, _strict(_name, getattr(np, _name), _keywords))
for _name in CONSTANTS.split():
    setattr(module, _name, getattr(np, _name))


def _from_host(name: str) -> Callable[..., ndarray]:
    """cupy.asarray and cupy.array: copy from the host to the device, always into new memory."""
    between_devices = getattr(module, name)

    def call(x: Any, *args: Any, **kwargs: Any) -> ndarray:
        if not isinstance(x, ndarray):
            x = ndarray(np.array(x))
        return between_devices(x, *args, **kwargs)

    return call


def asnumpy(x: Any) -> np.ndarray:
    return x.get() if isinstance(x, ndarray) else np.asarray(x)


module.asarray = _from_host("asarray")
module.array = _from_host("array")
module.asnumpy = asnumpy
module.get_array_module = lambda *xs: module if any(isinstance(x, ndarray) for x in xs) else np
module.add.at = _strict("add.at", np.add.at, "")
