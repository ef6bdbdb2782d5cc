"""Which dtype comes out: of two operands as torch.result_type has it, of one tensor as PyTorch's op has it.

One difference is deliberate: mean, var, softmax and the like of integers are float32, where PyTorch raises.
"""

import itertools
import operator

import numpy as np
import pytest
import torch

from tinylm import nn, ops, tensor

FLOATS = ("float16", "float32", "float64")
DTYPES = ("bool", "uint8", "int8", "int16", "int32", "int64", *FLOATS)
MATRICES = [(dtype, (2, 2)) for dtype in DTYPES]
SCALARS = [(dtype, ()) for dtype in DTYPES]  # tensors of shape ()
NUMBERS = [True, 2, 2.0]
ALL = [*MATRICES, *SCALARS, *NUMBERS]

PAIRS = {
    "add": (operator.add, ALL),
    "sub": (operator.sub, ALL),
    "mul": (operator.mul, ALL),
    "div": (operator.truediv, ALL),
    "maximum": (ops.maximum, ALL),
    "where": (lambda a, b, device: ops.where(device.array([[True], [False]]), a, b), ALL),
    "matmul": (operator.matmul, MATRICES),
    "linear": (ops.linear, MATRICES),
    "linear's bias": (lambda x, b: ops.linear(x, x, b[0]), MATRICES),
    "cat": (lambda a, b: ops.cat([a, b]), MATRICES),
    "stack": (lambda a, b: ops.stack([a, b]), MATRICES),
    "stack of ()": (lambda a, b: ops.stack([a, b]), SCALARS),
}


def floating(x):
    """`x` itself, or as float32 where it has integers or booleans."""
    return x if x.is_floating_point() else x.float()


# tinylm's op, PyTorch's.
SINGLE = {
    **{name: (getattr(ops, name), getattr(torch, name)) for name in ("clone", "neg", "relu", "abs", "sum", "tril")},
    **{name: (getattr(ops, name), getattr(torch, name)) for name in ("exp", "log", "sqrt")},
    **{name: (getattr(ops, name), getattr(torch, name)) for name in ("tanh", "sigmoid", "sin", "cos")},
    **{f"x**{n}": (lambda x, n=n: x**n, lambda x, n=n: x**n) for n in (2, 3, 2.0, 0.5)},
    "1 / x": (lambda x: 1 / x, lambda x: 1 / x),
    "x < 2": (lambda x: x < 2, lambda x: x < 2),
    "sum over an axis": (lambda x: x.sum(0), lambda x: x.sum(0)),
    **{f"clamp to {n}": (lambda x, n=n: x.clamp(n),) * 2 for n in (0, 0.5)},
    **{f"masked_fill with {n}": (lambda x, n=n: x.masked_fill(x < 2, n),) * 2 for n in (0, 0.5)},
    "max": (ops.max, torch.amax),
    "min": (ops.min, torch.amin),
    "max over an axis": (lambda x: x.max(0), lambda x: x.amax(0)),
    "argmax": (lambda x: x.argmax(), lambda x: floating(x).argmax()),
    "logsumexp": (lambda x: x.logsumexp(1), lambda x: x.logsumexp(1)),
    "mean": (ops.mean, lambda x: floating(x).mean()),
    "var": (ops.var, lambda x: floating(x).var()),
    "std": (ops.std, lambda x: floating(x).std()),
    "softmax": (ops.softmax, lambda x: floating(x).softmax(-1)),
    "log_softmax": (ops.log_softmax, lambda x: floating(x).log_softmax(-1)),
    "gelu": (ops.gelu, lambda x: torch.nn.functional.gelu(floating(x))),
    "layer_norm": (lambda x: ops.layer_norm(x, x[0], x[0]), floating),
    "causal_attention": (lambda x: ops.causal_attention(*[x.reshape(1, 1, 2, 2)] * 3), floating),
    "moved": (lambda x: x.reshape(4).expand_dims(0).T[1:].split(2)[0], lambda x: x),
}


def make(device, spec):
    """tinylm's tensor and PyTorch's for (dtype, shape); a number is itself for both."""
    if not isinstance(spec, tuple):
        return spec, spec
    ones = np.ones(spec[1], spec[0])
    return device.tensor(ones, requires_grad=spec[0] in FLOATS), torch.tensor(ones)


def name(dtype):
    return str(dtype).removeprefix("torch.")


def found(y, expected, *leaves):
    """What is wrong with y's dtype or with those of the leaves' gradients; None where nothing is."""
    if name(y.dtype) != name(expected):
        return f"{y.dtype}, not {name(expected)}"
    leaves = [x for x in leaves if getattr(x, "requires_grad", False)]
    if leaves and y.dtype.kind == "f":
        y.sum().backward()
        return next((f"a gradient of {x.grad.dtype} for {x.dtype}" for x in leaves if x.grad.dtype != x.dtype), None)
    return None


@pytest.mark.parametrize("op", PAIRS)
def test_two_operands(device, op):
    fn, operands = PAIRS[op]
    wrong = []
    for a, b in itertools.product(operands, operands):
        (x, torch_x), (y, torch_y) = make(device, a), make(device, b)
        expected = torch.result_type(torch_x, torch_y)
        if op == "div" and not expected.is_floating_point:
            expected = torch.float32
        if op == "where":
            z = fn(x, y, device)
        elif a in NUMBERS and b in NUMBERS:
            continue  # Python's own arithmetic
        elif op == "sub" and expected == torch.bool:
            with pytest.raises(TypeError):  # as in PyTorch and NumPy
                fn(x, y)
            continue
        else:
            z = fn(x, y)
        if what := found(z, expected, x, y):
            wrong.append(f"{a}, {b}: {what}")
    assert wrong == []


@pytest.mark.parametrize("op", SINGLE)
def test_one_operand(device, op):
    fn, torch_fn = SINGLE[op]
    wrong = []
    for spec in MATRICES:
        if op in ("neg", "relu", "abs", "clamp to 0", "clamp to 0.5") and spec[0] == "bool":
            continue  # PyTorch raises
        x, torch_x = make(device, spec)
        if what := found(fn(x), torch_fn(torch_x).dtype, x):
            wrong.append(f"{spec[0]}: {what}")
    assert wrong == []


@pytest.mark.parametrize("dtype", FLOATS)
def test_ops_with_targets(device, dtype):
    x, _ = make(device, (dtype, (2, 2)))
    ids = device.array([0, 1])
    loss = "float64" if dtype == "float64" else "float32"  # PyTorch's is float16 for float16
    assert found(ops.embedding(x, ids), dtype, x) is None
    assert found(ops.cross_entropy(x, ids), loss, x) is None
    assert found(ops.cross_entropy(x, ids, reduction="none"), loss, x) is None
    assert found(ops.linear_cross_entropy(x, x, ids), loss, x) is None
    assert found(ops.dropout(x, 0.5), dtype, x) is None


@pytest.mark.parametrize(("before", "after"), list(itertools.product(DTYPES, DTYPES)))
def test_cast(device, before, after):
    x = device.tensor(np.ones(2, before))
    assert x.to(after).dtype == ops.cast(x, np.dtype(after)).dtype == after
    if before in FLOATS and after in FLOATS:
        assert found(x.requires_grad_().to(after), after, x) is None


def test_what_a_tensor_is_made_of():
    assert tensor([1.0]).dtype == tensor(1.0).dtype == "float32"
    assert tensor([1]).dtype == tensor(1).dtype == "int64"
    assert tensor([True]).dtype == tensor(True).dtype == "bool"
    for dtype in DTYPES:
        assert tensor(np.ones(1, dtype)).dtype == dtype
        assert tensor([1], dtype).dtype == dtype


def test_a_parameter_is_float32_unless_another_dtype_is_asked_for():
    ones = np.ones(2)
    assert nn.Parameter(ones).dtype == nn.Parameter([1.0]).dtype == nn.Parameter(tensor(ones)).dtype == "float32"
    assert nn.Parameter(ones, np.float64).dtype == "float64"
    assert nn.Parameter(ones.astype(np.float16)).dtype == "float16"
