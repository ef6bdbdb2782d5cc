"""Element-wise ops: values and gradients, broadcasting, dtypes, and the operators of Tensor."""

import math
import operator

import numpy as np
import pytest
import torch
from helpers import FLOAT32, assert_close, broadcastable, check, distinct, host, normal, positive, shapes
from hypothesis import given

import tinylm
from tinylm import ops

UNARY = {
    "neg": (ops.neg, torch.neg, normal),
    "exp": (ops.exp, torch.exp, normal),
    "log": (ops.log, torch.log, positive),
    "sqrt": (ops.sqrt, torch.sqrt, positive),
    "tanh": (ops.tanh, torch.tanh, normal),
    "sin": (ops.sin, torch.sin, normal),
    "cos": (ops.cos, torch.cos, normal),
    "sigmoid": (ops.sigmoid, torch.sigmoid, normal),
    "relu": (ops.relu, torch.relu, distinct),
    "abs": (ops.abs, torch.abs, distinct),
    "abs()": (abs, abs, distinct),
    "clamp": (lambda x: x.clamp(-0.5, 0.75), lambda x: x.clamp(-0.5, 0.75), normal),
    "clamp from below": (lambda x: ops.clamp(x, min=0.2), lambda x: x.clamp(min=0.2), normal),
    "clamp from above": (lambda x: ops.clamp(x, max=np.float64(0.2)), lambda x: x.clamp(max=0.2), normal),
    "clamp to the smaller of two": (lambda x: ops.clamp(x, 1, -1), lambda x: x.clamp(1, -1), normal),
    "clone": (ops.clone, torch.clone, normal),
    "pow 0": (lambda x: ops.pow(x, 0), lambda x: x**0, normal),
    "pow 1": (lambda x: ops.pow(x, 1), lambda x: x**1, normal),
    "pow 2": (lambda x: x**2, lambda x: x**2, normal),
    "pow 3": (lambda x: x**3, lambda x: x**3, normal),
    "pow 4": (lambda x: x**4, lambda x: x**4, normal),
    "pow -1": (lambda x: x**-1, lambda x: x**-1, positive),
    "pow 0.5": (lambda x: x**0.5, lambda x: x**0.5, positive),
    "pow -2.5": (lambda x: x**-2.5, lambda x: x**-2.5, positive),
    "add a number": (lambda x: 2 + x + 0.5, lambda x: 2 + x + 0.5, normal),
    "sub a number": (lambda x: 2 - (x - 0.5), lambda x: 2 - (x - 0.5), normal),
    "mul a number": (lambda x: 2 * x * 0.3, lambda x: 2 * x * 0.3, normal),
    "div by a number": (lambda x: x / 3, lambda x: x / 3, normal),
    "divide a number": (lambda x: 3 / x, lambda x: 3 / x, positive),
    "maximum of a number": (lambda x: ops.maximum(0.2, x), lambda x: torch.clamp(x, min=0.2), distinct),
    "the same twice": (lambda x: x * x + x, lambda x: x * x + x, normal),
}
BINARY = {
    "add": (operator.add, operator.add, normal),
    "sub": (operator.sub, operator.sub, normal),
    "mul": (operator.mul, operator.mul, normal),
    "div": (operator.truediv, operator.truediv, positive),
    "maximum": (ops.maximum, torch.maximum, None),
}


@pytest.mark.parametrize("name", UNARY)
@given(shape=shapes())
def test_unary(device, name, shape):
    fn, torch_fn, inputs = UNARY[name]
    check(device, fn, torch_fn, inputs(*shape))


@pytest.mark.parametrize("name", BINARY)
@given(two=broadcastable())
def test_binary_broadcasts(device, name, two):
    fn, torch_fn, inputs = BINARY[name]
    if inputs is None:  # no ties, which no finite difference can judge: tested below
        inputs = lambda *shape, seed: distinct(*shape) + 0.05 * seed  # noqa: E731
    check(device, fn, torch_fn, *(inputs(*shape, seed=i) for i, shape in enumerate(two)))


@given(three=broadcastable(n=3))
def test_where_broadcasts(device, three):
    condition = normal(*three[0], seed=3) > 0
    check(device, ops.where, torch.where, condition, *(normal(*shape, seed=i) for i, shape in enumerate(three[1:])))


@given(two=broadcastable())
def test_masked_fill(device, two):
    mask, x = normal(*two[0], seed=3) > 0, normal(*two[1])
    for value in (-1.5, 0, np.float64(2), -math.inf):
        check(
            device,
            lambda m, x, value=value: ops.masked_fill(x, m, value),
            lambda m, x, value=value: x.masked_fill(m, float(value)),
            mask,
            x,
            differences=value != -math.inf,
        )
    check(device, lambda m, x, v: x.masked_fill(m, v), lambda m, x, v: x.masked_fill(m, v), mask, x, normal(seed=1))


def test_masked_fill_hides_the_future(device):
    """The usual masked softmax, with names that a PyTorch user knows."""
    scores, ones = device.leaf(normal(2, 3, 3)), tinylm.ones(3, 3, device=device.name)
    p = scores.masked_fill(ones.tril() == 0, -math.inf).softmax()
    assert_close(p[:, 0], [[1, 0, 0]] * 2)
    p[:, 1].max().backward()
    assert_close(scores.grad[:, :, 2], np.zeros((2, 3)))


def test_what_masked_fill_refuses(device):
    x, mask = device.tensor([1.0, 2.0]), device.array([True, False])
    for wrong, kind in ((device.array([1, 0]), "int64"), ([True, False], "list")):
        with pytest.raises(TypeError, match=f"masked_fill takes a boolean mask, not {kind}"):
            x.masked_fill(wrong, 0.0)
    for wrong, seen in ((x, r"\(2,\)"), ([1.0], "list"), (None, "NoneType")):
        with pytest.raises(TypeError, match=rf"masked_fill takes one value, not {seen}; where\(mask, values, x\)"):
            x.masked_fill(mask, wrong)


@pytest.mark.parametrize(
    ("limits", "error"),
    [
        ({}, "clamp needs min, max or both"),
        ({"min": "0"}, "clamp takes numbers as min and max, not str"),
        ({"max": tinylm.tensor(1.0)}, "clamp takes numbers as min and max, not Tensor"),
    ],
)
def test_what_clamp_refuses(limits, error):
    with pytest.raises((TypeError, ValueError), match=error):
        tinylm.tensor([1.0]).clamp(**limits)


EDGES = [-math.inf, -2.0, -1.0, -0.0, 0.0, 1.0, 2.0, math.inf, math.nan]


@pytest.mark.filterwarnings("ignore:invalid value")
@pytest.mark.parametrize("dy", [1.0, math.inf, math.nan])
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize(
    "fn",
    [
        lambda x: abs(x),
        lambda x: x.clamp(-1, 1),
        lambda x: x.clamp(min=0),
        lambda x: x.clamp(max=-1),
        lambda x: x.sigmoid(),
        lambda x: x.sin(),
        lambda x: x.cos(),
    ],
    ids=["abs", "clamp", "min", "max", "sigmoid", "sin", "cos"],
)
def test_edges_are_pytorchs(device, fn, dtype, dy):
    """Kinks, borders, infinities and NaN: the value and the gradient of each."""
    x, torch_x = device.leaf(EDGES, dtype), torch.tensor(np.array(EDGES, dtype), requires_grad=True)
    y, torch_y = fn(x), fn(torch_x)
    y.backward(device.array(np.full(len(EDGES), dy), dtype))
    torch_y.backward(torch.full_like(torch_y, dy))
    close = {"rtol": 1e-3, "atol": 1e-3} if dtype == np.float16 else {"rtol": 1e-6, "atol": 1e-7}
    assert_close(y, torch_y.detach(), **close)
    assert_close(x.grad, torch_x.grad, **close, what="gradient")


def test_sigmoid_far_out_does_not_overflow(device):
    x = device.leaf([-1e4, -100.0, 100.0, 1e4], np.float64)
    with np.errstate(all="raise", under="ignore"):
        y = x.sigmoid()
        y.sum().backward()
    assert_close(y, [0.0, math.exp(-100), 1.0, 1.0])
    assert_close(x.grad[1], math.exp(-100))


def test_where_with_numbers(device):
    condition = normal(2, 3) > 0
    check(device, lambda c, x: ops.where(c, x, 0.0), lambda c, x: torch.where(c, x, 0.0), condition, normal(3))
    check(device, lambda c, x: ops.where(c, 1.5, x), lambda c, x: torch.where(c, 1.5, x), condition, normal(2, 1))


def test_the_side_not_taken_gets_an_exact_zero(device):
    """Multiplying dy by a mask would give 0 * inf = NaN where dy is infinite."""
    a, b = device.leaf([1.0, 2.0]), device.leaf([3.0, 4.0])
    y = ops.where(device.array([True, False]), a, b)
    y.backward(device.array([np.inf, np.inf], np.float32))
    assert_close(a.grad, [np.inf, 0.0])
    assert_close(b.grad, [0.0, np.inf])


def test_ties_and_kinks(device):
    a, b = device.leaf([1.0, 2.0, 3.0]), device.leaf([1.0, 3.0, 2.0])
    ops.maximum(a, b).sum().backward()
    assert_close(a.grad, [0.5, 0.0, 1.0])
    assert_close(b.grad, [0.5, 1.0, 0.0])
    x = device.leaf([-1.0, 0.0, 1.0])
    ops.relu(x).sum().backward()
    assert_close(x.grad, [0.0, 0.0, 1.0])


def test_pow_at_zero(device):
    """0**0 and the derivative n * 0**(n-1) are finite for n = 0, 1, 2: no 0 * inf."""
    for n, slope in ((0, 0.0), (1, 1.0), (2, 0.0), (3, 0.0)):
        x = device.leaf([0.0])
        (x**n).sum().backward()
        assert_close(x.grad, [slope])


DTYPES = [np.float16, np.float32, np.float64]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "number", [2, 2.0, True, np.float64(2), np.float32(2), np.int64(2)], ids=lambda n: type(n).__name__
)
def test_numbers_keep_the_dtype(device, dtype, number):
    x = device.leaf([1.0, 2.0], dtype)
    results = [x + number, number + x, x - number, number - x, x * number, number * x, x / number, number / x]
    results += [x**number, ops.maximum(x, number), ops.where(device.array([True, False]), x, number)]
    for y in results:
        assert isinstance(y, tinylm.Tensor)
        assert y.dtype == dtype
        y.sum().backward()
        assert x.grad.dtype == dtype
    assert_close(number / x, np.array([2.0, 1.0]) * (float(number) / 2))
    assert_close(number - x, float(number) - np.array([1.0, 2.0]))


def test_promotion_is_numpys_and_gradients_come_back_in_each_inputs_dtype(device):
    for fn in (ops.add, ops.sub, ops.mul, ops.div, ops.maximum):
        a, b = device.leaf([[1.0, 2.0]], np.float32), device.leaf([[3.0], [4.0]], np.float64)
        y = fn(a, b)
        assert y.dtype == np.float64
        y.sum().backward()
        assert (a.grad.dtype, a.grad.shape) == (np.float32, (1, 2))
        assert (b.grad.dtype, b.grad.shape) == (np.float64, (2, 1))


def test_a_float16_gradient_is_unbroadcast_in_float32(device):
    """4096 ones added up in float16 stop at 2048."""
    b = device.leaf(np.zeros(1), np.float16)
    (device.tensor(np.zeros(4096), np.float16) + b).backward(device.array(np.ones(4096), np.float16))
    assert_close(b.grad, [4096.0])
    assert b.grad.dtype == np.float16


@pytest.mark.parametrize("to", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_cast(device, dtype, to):
    x = device.leaf(normal(3), dtype)
    y = x.astype(to)
    assert y.dtype == to
    assert_close(y, host(x).astype(to))
    y.backward(device.array([1.0, 2.0, 3.0], to))
    assert x.grad.dtype == dtype
    assert_close(x.grad, [1.0, 2.0, 3.0])


def test_cast_gradcheck(device):
    check(device, lambda x: (x * x).double().astype(x.dtype) * 3, lambda x: x * x * 3, normal(2, 3))


def test_cast_to_integers(device):
    x = device.leaf([1.7])
    with pytest.raises(TypeError, match=r"cast to int64 has no gradient; detach\(\) the tensor first"):
        x.astype(np.int64)
    assert x.detach().astype(np.int64).tolist() == [1]


def test_clone_has_memory_of_its_own(device):
    x = device.tensor([1.0])
    x.clone().data[0] = 7
    assert x.item() == 1.0


# --- errors -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fn", [ops.add, ops.sub, ops.mul, ops.div, ops.maximum], ids=lambda fn: fn.__name__)
def test_shapes_that_do_not_broadcast(device, fn):
    a, b = device.tensor(np.zeros((2, 3)), np.float32), device.tensor(np.zeros(4), np.float32)
    name = fn.__name__.capitalize()
    with pytest.raises(
        ValueError,
        match=rf"broadcast[^$]*{name}.forward\(\(2, 3\) float32 {device.name}, \(4,\) float32 {device.name}\)",
    ):
        fn(a, b)


def test_pow_of_a_tensor_exponent(device):
    x = device.tensor([2.0])
    with pytest.raises(TypeError, match=r"pow takes a number as exponent, not Tensor; for a tensor write exp\(log"):
        x**x


def test_what_is_no_operand(device):
    with pytest.raises(TypeError, match=r"Add takes Tensors, arrays and numbers, not str; try tensor\(...\)"):
        device.tensor([2.0]) + "2"
    with pytest.raises(TypeError, match="Mul takes Tensors, arrays and numbers, not list"):
        device.tensor([2.0]) * [2.0]


def test_mixing_devices_names_both(strict_cupy_module):
    a, b = tinylm.tensor([1.0, 2.0]), tinylm.tensor([1.0, 2.0], device="cuda")
    for fn in (operator.add, operator.sub, operator.mul, operator.truediv, operator.matmul, ops.maximum):
        for left, right in ((a, b), (b, a), (a.data, b), (b, a.data), (b.data, a), (a, b.data)):
            with pytest.raises(
                TypeError, match=r"inputs on different devices: .*\b(cpu.*cuda|cuda.*cpu); move them with \.to"
            ):
                fn(left, right)
    with pytest.raises(TypeError, match="Where: inputs on different devices"):
        ops.where(a.data > 1, b, b)
    with pytest.raises(TypeError, match="different devices"):
        ops.cat([a, b])


# --- Tensor -----------------------------------------------------------------------------------------------------


def test_arrays_on_the_left(device):
    """`array op tensor` must call the Tensor's operator; NumPy alone would make an array of objects."""
    array, x = device.array([3.0, 4.0], np.float32), device.leaf([1.0, 2.0])
    for y, expected in (
        (array + x, [4.0, 6.0]),
        (array - x, [2.0, 2.0]),
        (array * x, [3.0, 8.0]),
        (array / x, [3.0, 2.0]),
        (array @ x, 11.0),
    ):
        assert isinstance(y, tinylm.Tensor)
        assert y.requires_grad
        assert_close(y, expected)


FUNCTIONS = "exp", "log", "sqrt", "sin", "cos", "tanh", "sigmoid", "relu", "gelu", "abs"
REDUCTIONS = "sum", "mean", "max", "min", "var", "std", "logsumexp"


def test_methods_are_the_functions(device):
    x = device.tensor([[0.5, 1.0], [1.5, 2.0]])
    for name in (*FUNCTIONS, *REDUCTIONS, "tril", "softmax"):
        assert_close(getattr(x, name)(), host(getattr(ops, name)(x)), what=name)
    assert_close(x.log_softmax(axis=0), host(ops.log_softmax(x, axis=0)))
    assert_close(x.pow(2), host(x) ** 2)
    assert_close(x.maximum(1.2), np.maximum(host(x), np.float32(1.2)))
    assert_close(x.clamp(0.75, 1.6), np.clip(host(x), np.float32(0.75), np.float32(1.6)))
    assert_close(x.masked_fill(x > 1, 9), [[0.5, 1.0], [9.0, 9.0]])
    assert_close(x.matmul(x), host(x) @ host(x))
    assert_close(-x, -host(x))
    assert (+x) is x


def test_comparisons(device):
    a, b = device.leaf([1.0, 2.0, 3.0]), device.tensor([2.0, 2.0, 2.0])
    for compare in (operator.eq, operator.ne, operator.lt, operator.le, operator.gt, operator.ge):
        for other in (b, b.data, 2, 2.0):
            result = compare(a, other)
            assert (result.dtype, result.requires_grad, result.device) == (bool, False, device.name)
            assert result.tolist() == compare(host(a), 2.0).tolist()
    assert (a == "text") is False
    assert (a != None) is True  # noqa: E711
    assert len({a, b, a}) == 2  # a Tensor is hashed by identity, as in PyTorch


def test_truth(device):
    assert device.tensor([1.0])
    assert not device.tensor(0)
    with pytest.raises(
        ValueError, match=r"the truth value of a tensor of shape \(2,\) is ambiguous; use \.any\(\) or \.all\(\)"
    ):
        bool(device.tensor([1.0, 2.0]))
    mixed = device.tensor([True, False])
    assert mixed.any() is True
    assert mixed.all() is False


def test_item_and_numbers(device):
    x = device.tensor([[2.5]])
    assert (x.item(), float(x), int(x)) == (2.5, 2.5, 2)
    assert type(x.item()) is float
    assert device.tensor([1, 2]).tolist() == [1, 2]
    with pytest.raises(ValueError, match=r"item\(\) needs a tensor of one element; this one has shape \(3,\)"):
        device.tensor([1.0, 2.0, 3.0]).item()


def test_iteration_and_length(device):
    x = device.leaf([[1.0, 2.0], [3.0, 4.0]])
    first, second = x
    assert len(x) == 2
    (first * 10 + second).sum().backward()
    assert_close(x.grad, [[10.0, 10.0], [1.0, 1.0]])
    with pytest.raises(TypeError, match=r"a Tensor of shape \(\) has no len\(\)"):
        len(device.tensor(1.0))
    with pytest.raises(TypeError, match="no len"):
        iter(device.tensor(1.0))


def test_repr(device):
    x = device.leaf([1.0, 2.0])
    assert repr(x) == f"Tensor([1., 2.], shape=(2,), dtype=float32, device={device.name}, requires_grad=True)"
    assert repr(x * 2) == f"Tensor([2., 4.], shape=(2,), dtype=float32, device={device.name}, op=Mul)"
    assert repr(device.tensor(3)) == f"Tensor(3, shape=(), dtype=int64, device={device.name})"
    assert len(repr(device.tensor(np.zeros((1000, 1000))))) < 300


def test_format(device):
    """A number where there is one, as in an f-string of a loss; otherwise the repr."""
    x, three = device.leaf(2.5), device.tensor([1.0, 2.0, 3.0])
    assert f"{x * 1:.3f}, {x:8.1e}, {x}" == f"2.500, {2.5:8.1e}, 2.5"
    assert f"{device.tensor([[2.5]]):.2f} {device.tensor(3):04d}" == "2.50 0003"
    assert f"{three}" == str(three) == repr(three)
    assert f"{x!r}" == repr(x)
    with pytest.raises(TypeError, match=r"'.3f' formats a tensor of one element; this one has shape \(3,\)"):
        f"{three:.3f}"


# What NumPy makes of a Tensor: the values, but never where that would cut the graph silently.
NUMPYS = {
    "asarray": lambda x: np.asarray(x),
    "array": lambda x: np.array(x),
    "concatenate": lambda x: np.concatenate([x, x]),
    "stack": lambda x: np.stack([x, x]),
    "an array beside": lambda x: np.concatenate([np.ones((2, 2)), x]),
    "allclose": lambda x: np.allclose(x, [[1, 2], [3, 4]]),
    "dot": lambda x: np.dot(x, x),
    "where": lambda x: np.where([True, False], x, 0),
}


@pytest.mark.parametrize("name", NUMPYS)
def test_numpys_functions_of_a_tensor(name):
    values = np.array([[1, 2], [3, 4]], np.float32)
    x = tinylm.Tensor(values)
    np.testing.assert_array_equal(NUMPYS[name](x), NUMPYS[name](values))
    for with_gradient in (x.clone().requires_grad_(), x.clone().requires_grad_() * 1):
        with pytest.raises(RuntimeError, match="requires a gradient, which a NumPy array loses; use ops"):
            NUMPYS[name](with_gradient)
        assert isinstance(with_gradient.numpy(), np.ndarray)


def test_a_numpy_array_of_a_tensor(strict_cupy_module):
    x = tinylm.tensor([1.0, 2.0])
    assert np.asarray(x) is x.data
    assert np.array(x) is not x.data
    assert np.asarray(x, np.float64).dtype == np.float64
    with pytest.raises(TypeError, match=r"this tensor is on a GPU, a NumPy array is not; use tensor\.numpy\(\)"):
        np.asarray(x.cuda())
    with pytest.raises(RuntimeError, match="requires a gradient"):  # stack() is for this
        tinylm.tensor([x.requires_grad_().sum(), x.sum()])


def test_properties(device):
    x = device.tensor(np.zeros((2, 3)), np.float32)
    assert x.numel() == 6
    assert (x.shape, x.ndim, x.size, x.nbytes, x.dtype, x.device) == ((2, 3), 2, 6, 24, np.float32, device.name)
    assert x.is_leaf


def test_what_a_tensor_is_made_of(device):
    assert device.tensor([1.0, 2.0]).dtype == np.float32
    assert device.tensor(1.0).dtype == np.float32
    assert device.tensor([1, 2]).dtype == np.int64
    assert device.tensor([True]).dtype == bool
    assert device.tensor(np.zeros(2)).dtype == np.float64
    assert device.tensor([1, 2], dtype=np.float16).dtype == np.float16
    with pytest.raises(TypeError, match="a Tensor holds floats, integers or booleans, not"):
        device.tensor(["a"])
    with pytest.raises(TypeError, match="only a floating tensor can require a gradient, not one of int64"):
        device.leaf([1, 2])
    with pytest.raises(TypeError, match="only a floating tensor can require a gradient"):
        device.tensor([1]).requires_grad_()
    with pytest.raises(
        RuntimeError, match=r"requires_grad_ is for leaves; this tensor was made by Mul \(detach\(\) it"
    ):
        (device.leaf([1.0]) * 2).requires_grad_()


def test_to_moves_and_casts(device):
    x = device.leaf([1.0, 2.0])
    assert x.to(device.name) is x
    there = x.cpu()
    assert (there.device, there.requires_grad, there.is_leaf) == ("cpu", True, True)
    assert isinstance(x.numpy(), np.ndarray)
    assert x.half().dtype == np.float16
    assert x.double().dtype == np.float64
    assert x.half().float().dtype == np.float32
    assert x.to(np.float64).op.name() == "Cast"
    assert x.argmax().item() == 1


def test_an_unknown_device():
    with pytest.raises(ValueError, match="device must be 'cpu' or 'cuda', not 'gpu'"):
        tinylm.tensor([1.0], device="gpu")


def test_exp_and_log_at_the_edges(device):
    with np.errstate(all="ignore"):
        assert_close(ops.exp(device.tensor([-np.inf, 1000.0])), [0.0, np.inf])
        assert_close(ops.log(device.tensor([0.0, -1.0])), [-np.inf, np.nan])
    assert_close(ops.tanh(device.tensor([-1e4, 1e4])), [-1.0, 1.0])


def test_tolerances_are_not_slack(device):
    """`check` detects a wrong value and a wrong gradient."""
    with pytest.raises(AssertionError, match="output 0 in float64"):
        check(device, lambda x: x * 1.00001, lambda x: x, normal(3), tolerance=FLOAT32)
    with pytest.raises(AssertionError, match="gradient of input 0"):
        check(device, lambda x: x.detach() * 2 + x - x.detach(), lambda x: 2 * x, normal(3))


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("op", [ops.mul, ops.matmul, ops.linear], ids=lambda op: op.__name__)
def test_what_no_gradient_needs_is_not_kept(op, which):
    """With a constant b, d(a b)/da needs b alone: a is not kept alive for backward."""
    tensors = [tinylm.tensor(normal(3, 3, seed=i), requires_grad=i == which) for i in range(2)]
    own = tensors[which].data
    assert not any(x is own or getattr(x, "base", None) is own for x in op(*tensors).op.saved)
