"""The checker itself: it passes what is right, fails on a table of wrong backwards, and says where."""

import inspect
import re
from pathlib import Path

import numpy as np
import pytest
from helpers import host, normal, positive

import tinylm
from tinylm import GradcheckError, Op, gradcheck, is_grad_enabled, nn, no_grad, ops
from tinylm.array import array_module
from tinylm.ops.gelu import Gelu as GeluReference
from tinylm.ops.softmax import Softmax as SoftmaxReference
from tinylm.recompute import checkpoint


def line_of(text, file=__file__):
    """'file:line' of the only line of a file that begins with `text`."""
    lines = Path(file).read_text(encoding="utf-8").splitlines()
    (number,) = [i for i, line in enumerate(lines, 1) if line.strip().startswith(text)]
    return f"{file}:{number}"


# Small ops of this file's own, so that what the wrong backwards below find in `saved` is known.


class Softmax(Op):
    def forward(self, x):
        xp = array_module(x)
        y = xp.exp(x - x.max(axis=-1, keepdims=True))
        y /= y.sum(axis=-1, keepdims=True)
        self.save(y)
        return y

    def backward(self, dy):
        (y,) = self.saved
        return y * (dy - (dy * y).sum(axis=-1, keepdims=True))


class LayerNorm(Op):
    def forward(self, x, w):
        xp = array_module(x)
        centred = x - x.mean(axis=1, keepdims=True)
        rstd = 1 / xp.sqrt((centred * centred).mean(axis=1, keepdims=True) + 1e-5)
        self.save(centred * rstd, rstd, w)
        return centred * rstd * w

    def backward(self, dy):
        xhat, rstd, w = self.saved
        g = dy * w
        dx = rstd * (g - g.mean(axis=1, keepdims=True) - xhat * (g * xhat).mean(axis=1, keepdims=True))
        return dx, (dy * xhat).sum(axis=0)


def layer_norm_dx(self, dy, mean=True, variance=True, rstd=True):
    xhat, scale, w = self.saved
    g = dy * w
    dx = g - mean * g.mean(axis=1, keepdims=True) - variance * xhat * (g * xhat).mean(axis=1, keepdims=True)
    return dx * scale if rstd else dx


class Rows(Op):
    """Rows of x by number, one of them twice."""

    def forward(self, x):
        self.was, self.ids = x.shape, array_module(x).asarray([0, 2, 2])
        return x[self.ids]

    def backward(self, dy):
        dx = array_module(dy).zeros(self.was, dy.dtype)
        array_module(dy).add.at(dx, self.ids, dy)
        return dx


def scatter_by_assignment(self, dy):
    dx = array_module(dy).zeros(self.was, dy.dtype)
    dx[self.ids] = dy
    return dx


class AddRow(Op):
    """(N, C) + (1, C)."""

    def forward(self, x, row):
        return x + row

    def backward(self, dy):
        return dy, dy.sum(axis=0, keepdims=True)


class MatMul(Op):
    def forward(self, a, b):
        self.save(a, b)
        return a @ b

    def backward(self, dy):
        a, b = self.saved
        return dy @ b.T, a.T @ dy


class CrossEntropy(Op):
    """Of targets 0, 1, 2, the mean."""

    def forward(self, x):
        xp = array_module(x)
        p = xp.exp(x - x.max(axis=1, keepdims=True))
        p /= p.sum(axis=1, keepdims=True)
        onehot = xp.eye(len(x), x.shape[1])
        self.save(p, onehot)
        return -(xp.log(p) * onehot).sum() / len(x)

    def backward(self, dy):
        p, onehot = self.saved
        return (p - onehot) * (dy / len(p))


class Cube(Op):
    def forward(self, x):
        self.save(x)
        return x * x * x

    def backward(self, dy):
        (x,) = self.saved
        return dy * 3 * x * x


class Tanh(Op):
    def forward(self, x):
        y = array_module(x).tanh(x)
        self.save(y)
        return y

    def backward(self, dy):
        (y,) = self.saved
        return dy * (1 - y * y)


class Two(Op):
    """Two outputs."""

    def forward(self, x):
        return x * 2, x * 3

    def backward(self, dy, dz):
        return 2 * dy + 3 * dz


class Div(Op):
    def forward(self, a, b):
        self.save(a, b)
        return a / b

    def backward(self, dy):
        a, b = self.saved
        return dy / b, -dy * a / (b * b)


INPUTS = {
    Softmax: [normal(3, 4)],
    LayerNorm: [normal(3, 4), normal(4, seed=1)],
    Rows: [normal(3, 2)],
    AddRow: [normal(3, 2), normal(1, 2)],
    MatMul: [normal(3, 3), normal(3, 3, seed=1)],
    CrossEntropy: [normal(3, 4)],
    Cube: [normal(2, 3)],
    Tanh: [normal(2, 3)],
    Two: [normal(2, 3)],
    Div: [normal(2, 3), 2 + abs(normal(2, 3, seed=1))],
}


def one_element_wrong(self, dy):
    dx = Cube.backward(self, dy)
    dx[1, 2] *= 1.001
    return dx


def one_nan(self, dy):
    dx = Cube.backward(self, dy)
    dx[0, 1] = np.nan
    return dx


WRONG = {
    "softmax: the sum term is missing": (Softmax, lambda self, dy: self.saved[0] * dy),
    "softmax: only the diagonal": (Softmax, lambda self, dy: dy * self.saved[0] * (1 - self.saved[0])),
    "softmax: one sum for all rows": (Softmax, lambda self, dy: self.saved[0] * (dy - (dy * self.saved[0]).sum())),
    "softmax: zeros, which a cotangent of ones would not see": (Softmax, lambda self, dy: 0 * dy),
    "layer norm: the mean term is missing": (
        LayerNorm,
        lambda self, dy: (layer_norm_dx(self, dy, mean=False), LayerNorm.backward(self, dy)[1]),
    ),
    "layer norm: the variance term is missing": (
        LayerNorm,
        lambda self, dy: (layer_norm_dx(self, dy, variance=False), LayerNorm.backward(self, dy)[1]),
    ),
    "layer norm: both terms are missing": (
        LayerNorm,
        lambda self, dy: (layer_norm_dx(self, dy, mean=False, variance=False), LayerNorm.backward(self, dy)[1]),
    ),
    "layer norm: rstd is missing": (
        LayerNorm,
        lambda self, dy: (layer_norm_dx(self, dy, rstd=False), LayerNorm.backward(self, dy)[1]),
    ),
    "layer norm: dx is zeros": (LayerNorm, lambda self, dy: (0 * dy, LayerNorm.backward(self, dy)[1])),
    "layer norm: dw of the first row alone": (
        LayerNorm,
        lambda self, dy: (LayerNorm.backward(self, dy)[0], (dy * self.saved[0])[0]),
    ),
    "layer norm: dw without xhat": (
        LayerNorm,
        lambda self, dy: (LayerNorm.backward(self, dy)[0], dy.sum(axis=0)),
    ),
    "rows: scatter by assignment": (Rows, scatter_by_assignment),
    "broadcasting undone by the first row": (AddRow, lambda self, dy: (dy, dy[:1].copy())),
    "broadcasting undone by the mean": (AddRow, lambda self, dy: (dy, dy.mean(axis=0, keepdims=True))),
    "matmul: b is not transposed": (MatMul, lambda self, dy: (dy @ self.saved[1], self.saved[0].T @ dy)),
    "matmul: a is not transposed": (MatMul, lambda self, dy: (dy @ self.saved[1].T, self.saved[0] @ dy)),
    "matmul: the gradients are swapped": (MatMul, lambda self, dy: MatMul.backward(self, dy)[::-1]),
    "cross-entropy: the target is not subtracted": (CrossEntropy, lambda self, dy: self.saved[0] * (dy / 3)),
    "cross-entropy: not divided by N": (CrossEntropy, lambda self, dy: (self.saved[0] - self.saved[1]) * dy),
    "cross-entropy: dy is ignored": (CrossEntropy, lambda self, dy: (self.saved[0] - self.saved[1]) / 3),
    "the sign": (Cube, lambda self, dy: -Cube.backward(self, dy)),
    "a factor of 2": (Cube, lambda self, dy: 2 * Cube.backward(self, dy)),
    "a factor of 1.0001": (Cube, lambda self, dy: 1.0001 * Cube.backward(self, dy)),
    "dy is ignored": (Cube, lambda self, dy: 3 * self.saved[0] * self.saved[0]),
    "dy is used twice": (Cube, lambda self, dy: dy * Cube.backward(self, dy)),
    "one element of six, by a thousandth": (Cube, one_element_wrong),
    "a NaN": (Cube, one_nan),
    "an infinity": (Cube, lambda self, dy: dy * np.inf),
    "zeros": (Cube, lambda self, dy: 0 * dy),
    "the square is missing": (Tanh, lambda self, dy: dy * (1 - self.saved[0])),
    "the first output alone": (Two, lambda self, dy, dz: 2 * dy),
    "the outputs are swapped": (Two, lambda self, dy, dz: 2 * dz + 3 * dy),
    "quotient: the sign of db": (Div, lambda self, dy: (dy / self.saved[1], dy * self.saved[0] / self.saved[1] ** 2)),
    "quotient: db over b, not its square": (
        Div,
        lambda self, dy: (dy / self.saved[1], -dy * self.saved[0] / self.saved[1]),
    ),
}


@pytest.mark.parametrize("op", INPUTS, ids=lambda op: op.__name__)
def test_passes_what_is_right(device, op):
    assert gradcheck(op.apply, *(device.array(x) for x in INPUTS[op])) is True


@pytest.mark.parametrize("name", WRONG)
@pytest.mark.parametrize("seed", [0, 1])
def test_fails_on_what_is_wrong(device, name, seed):
    op, backward = WRONG[name]
    wrong = type(op.__name__, (op,), {"forward": op.forward, "backward": backward})
    with pytest.raises(GradcheckError, match=r"backward gives .*, finite differences give"):
        gradcheck(wrong.apply, *(device.array(x) for x in INPUTS[op]), seed=seed)


def test_the_message_names_input_index_both_values_the_error_and_what_ran(device):
    class Wrong(Op):
        def forward(self, a, b):  # of Wrong
            self.save(a, b)
            return a * b

        def backward(self, dy):
            a, b = self.saved
            db = dy * a
            db[1, 0] *= 1.5
            return dy * b, db

    a, b = normal(2, 2), normal(2, 2, seed=1)
    with pytest.raises(GradcheckError) as caught:
        gradcheck(lambda a, b: ops.exp(Wrong.apply(a, b)), device.array(a), device.array(b))
    number = r"(-?[\d.]+(?:e-?\d+)?)"
    found = re.fullmatch(
        rf"gradcheck: input 1, index \(1, 0\): backward gives {number}, finite differences give {number} "
        rf"\(relative error {number}; 1 of 4 elements differ\); "
        rf"what ran: Wrong \({re.escape(line_of('def forward(self, a, b):  # of Wrong'))}\), Exp",
        str(caught.value),
    )
    assert found, str(caught.value)
    analytic, numeric, relative = map(float, found.groups())
    assert analytic == pytest.approx(1.5 * numeric, rel=1e-6)
    assert relative == pytest.approx(1 / 3, rel=0.05)


def test_the_relative_error_is_that_of_the_larger_value(device):
    for factor, relative in ((0.5, 0.5), (4.0, 0.75)):
        wrong = type("Wrong", (Cube,), {"backward": lambda self, dy, factor=factor: factor * Cube.backward(self, dy)})
        with pytest.raises(GradcheckError, match=rf"relative error {relative};"):
            gradcheck(wrong.apply, device.array(positive(3)))


def test_it_reports_the_worst_element(device):
    class Wrong(Op):
        def forward(self, x):
            return x * 1

        def backward(self, dy):
            return dy * array_module(dy).asarray([1.0, 1.01, 1.5, 1.1])

    with pytest.raises(GradcheckError, match=r"index \(2,\).*3 of 4 elements differ"):
        gradcheck(Wrong.apply, device.array(normal(4)))


def test_a_gradient_that_never_arrives(device):
    """An input cut off from the graph: backward leaves nothing, and the difference is not zero."""
    with pytest.raises(GradcheckError, match=r"input 1, index .*: backward gives 0, finite differences give"):
        gradcheck(lambda a, b: a * b.detach(), device.array(normal(2)), device.array(normal(2, seed=1)))
    with pytest.raises(GradcheckError, match="no output of fn depends on an input that requires a gradient"):
        gradcheck(lambda x: x.detach(), device.array(normal(2)))


def test_a_gradient_of_the_wrong_shape_is_the_engines_error(device):
    """A missing unbroadcast: the engine names the op before the checker has anything to compare."""
    wrong = type("AddRow", (AddRow,), {"backward": lambda self, dy: (dy, dy)})
    expected = r"AddRow.backward: the gradient of input 1 is \(3, 2\) float64, but must be \(1, 2\) float64"
    with pytest.raises(RuntimeError, match=expected):
        gradcheck(wrong.apply, device.array(normal(3, 2)), device.array(normal(1, 2)))


def test_an_fn_that_leaves_float64(device):
    with pytest.raises(GradcheckError, match="fn returned float32, but a gradient check needs float64 all the way"):
        gradcheck(lambda x: x.float(), device.array(normal(2)))


def test_inputs_of_any_kind(device):
    """Lists, Tensors and float32 are copied to float64; integers pass through; nothing given is changed."""
    x = device.leaf([1.0, 2.0])
    ids = device.array([1, 0, 1])
    seen = []

    def fn(a, b, i, n):
        seen.append((a.dtype, b.dtype, i is ids, n, is_grad_enabled()))
        return a[i] * n + ops.exp(b[i])

    gradcheck(fn, x, device.array([0.5, 1.5], np.float32), ids, 3)
    wide, narrow = ((np.dtype(dtype), np.dtype(dtype), True, 3) for dtype in (np.float64, np.float32))
    assert seen == [
        (*wide, True),
        *[(*wide, False)] * (1 + 2 * 4),
        *[(*narrow, True)] * 2,
    ]  # differences record nothing
    assert x.grad is None
    assert (x.dtype, host(x).tolist()) == (np.float32, [1.0, 2.0])
    if device.name == "cpu":
        assert gradcheck(lambda x: x * x, [0.1, 2.0])
        with pytest.raises(LookupError, match=r"^0\.1$"):  # not as float32 has it
            gradcheck(raise_first, [0.1])


def raise_first(x):
    raise LookupError(x.tolist()[0])


def test_several_outputs_and_scalars(device):
    gradcheck(lambda x: (x * 2, x.sum(), ops.exp(x)), device.array(normal(3)))
    gradcheck(lambda x: [x * x], device.array(0.5))


def test_the_inputs_are_put_back(device):
    """Of each forward in float64, at most one element is not where it was."""
    x = normal(2, 3)
    inside = []

    def fn(t):
        if t.dtype == np.float64:
            inside.append(host(t).copy())
        return t * t

    gradcheck(fn, device.array(x))
    assert [int((t != x).sum()) for t in inside] == [0, 0] + [1] * 12
    np.testing.assert_allclose([abs(t - x).max() for t in inside[2:]], 1e-5 * np.maximum(1, abs(x)).ravel().repeat(2))


def test_what_was_given_is_not_written_to(device):
    """Not even for a moment: an error may come at any."""
    given = device.array(normal(3))
    calls = iter(range(100))

    def fn(x):
        if next(calls) == 4:
            raise OSError
        return x * x

    with pytest.raises(OSError):  # noqa: PT011
        gradcheck(fn, given)
    np.testing.assert_array_equal(host(given), normal(3))


def test_large_and_tiny_inputs(device):
    """The step grows with x, and near zero it is eps itself."""
    for inputs in ([1e6, -3e6], [1e-9, 0.0], [1.0, 1e-3]):
        gradcheck(lambda x: x * x, device.array(inputs))


def test_it_is_an_assertion_error_for_tests():
    assert issubclass(GradcheckError, AssertionError)


def test_outputs_are_told_apart_from_other_things(device):
    """What is no Tensor among the outputs has no gradient, and is left out."""
    gradcheck(lambda x: (x * x, None, 3.0), device.array(normal(2)))
    with pytest.raises(GradcheckError, match="no output of fn depends on an input"):
        gradcheck(lambda x: None, device.array(normal(2)))
    gradcheck(lambda x: (x * x, infinities(x)), device.array(normal(2)))


def infinities(x):
    """A constant beside the tensor x."""
    return tinylm.Tensor(array_module(x.data).full(2, np.inf, x.dtype))


# --- what ran ---------------------------------------------------------------------------------------------------


class WrongSoftmax(SoftmaxReference):
    def forward(self, x):  # of WrongSoftmax
        return super().forward(x)

    def backward(self, dy):
        return dy


def test_an_override_is_checked_and_named_with_its_place(device):
    """A student's version, put in force with override, is what runs."""
    with tinylm.override(SoftmaxReference, WrongSoftmax), pytest.raises(GradcheckError) as caught:
        gradcheck(lambda x: ops.exp(ops.softmax(x * 2)), device.array(normal(3)))
    assert str(caught.value).endswith(
        f"what ran: Mul, WrongSoftmax ({line_of('def forward(self, x):  # of WrongSoftmax')}), Exp"
    )
    gradcheck(ops.softmax, device.array(normal(3)))


def test_each_class_is_named_once_in_the_order_of_the_graph(device):
    wrong = type("Tanh", (Tanh,), {"backward": lambda self, dy: dy})
    with pytest.raises(GradcheckError, match=r"what ran: Exp, Mul, Tanh \(.*\)$"):
        gradcheck(lambda x: wrong.apply(ops.exp(ops.exp(x) * x) * x), device.array(normal(3)))


def test_must_run(device):
    x = device.array(normal(3))
    assert gradcheck(lambda x: Tanh.apply(ops.exp(x)), x, must_run=Tanh)
    with pytest.raises(GradcheckError) as caught:
        gradcheck(ops.exp, x, must_run=Tanh)
    assert re.fullmatch(r"gradcheck: Tanh \(.*test_gradcheck.py:\d+\) never ran; what ran: Exp", str(caught.value))
    # Whoever asks for the reference does not mean what replaced it, nor the other way round.
    right = type("MyTanh", (Tanh,), {"forward": Tanh.forward, "backward": Tanh.backward})
    with tinylm.override(Tanh, right):
        assert gradcheck(Tanh.apply, x, must_run=right)
        with pytest.raises(GradcheckError, match=r"Tanh .* never ran; what ran: MyTanh"):
            gradcheck(Tanh.apply, x, must_run=Tanh)


# --- Modules ----------------------------------------------------------------------------------------------------


class WrongLinear(nn.Linear):
    """Its bias gets half the gradient."""

    def forward(self, x):
        return ops.linear(x, self.weight) + (self.bias * 0.5 + self.bias.detach() * 0.5)


class Net(nn.Module):
    def __init__(self, layer=nn.Linear):
        self.first = nn.Linear(3, 4)
        self.rest = [layer(4, 2), nn.LayerNorm(2)]

    def forward(self, x):
        x = ops.gelu(self.first(x))
        for module in self.rest:
            x = module(x)
        return x


def on(device, module):
    return module.to(device.name)


def test_a_modules_parameters_are_checked_and_named(device):
    assert gradcheck(on(device, Net()), device.array(normal(5, 3)), must_run=GeluReference)
    with pytest.raises(GradcheckError, match=r"gradcheck: parameter rest.0.bias, index \(.,\): backward gives"):
        gradcheck(on(device, Net(WrongLinear)), device.array(normal(5, 3)))


def test_a_modules_parameters_are_checked_where_no_input_is_floating(device):
    ids = device.array([[1, 0, 2], [3, 3, 1]])
    config = tinylm.GPTConfig(vocab_size=5, block_size=4, n_layer=1, n_head=2, n_embd=4)
    assert gradcheck(on(device, tinylm.GPT(config)), ids)


def test_a_module_in_a_closure_is_not_found(device):
    model = on(device, Net(WrongLinear))
    assert gradcheck(lambda x: model(x), device.array(normal(5, 3)))


class Broken(nn.Linear):
    """Raises at the call of that number; 0 is the first."""

    calls = -1
    at = -1

    def forward(self, x):
        self.calls += 1
        if self.calls == self.at:
            raise OSError("the plug was pulled")
        return super().forward(x)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("at", [-1, 0, 1, 5, 30, 43])
def test_parameters_and_their_gradients_are_put_back(device, at, dtype):
    """The same arrays, of the same values; after an error too, whenever it comes."""
    layer = on(device, Broken(3, 2))
    layer.at = at
    for p in layer.parameters():
        p.data = p.data.astype(dtype)
    layer.weight.grad = device.array(np.ones((2, 3), dtype))
    before = [(p, p.data, p.grad, host(p).copy()) for p in layer.parameters()]
    x = device.array(normal(4, 3))
    if at < 0:
        gradcheck(layer, x)
        assert layer.calls == 43  # the last: of 2 + 2 * (12 + 6 + 2) in float64 and 2 in float32, counted from 0
    else:
        with pytest.raises(OSError, match="the plug was pulled"):
            gradcheck(layer, x)
    for p, data, grad, values in before:
        assert p.data is data
        assert p.grad is grad
        np.testing.assert_array_equal(host(p), values)
    np.testing.assert_array_equal(host(layer.weight.grad), 1)


def test_a_frozen_parameter_is_not_checked(device):
    layer = on(device, WrongLinear(3, 2))
    layer.bias.requires_grad_(False)
    assert gradcheck(layer, device.array(normal(4, 3)))
    assert layer.bias.dtype == np.float32


# --- fn itself --------------------------------------------------------------------------------------------------


def test_an_fn_that_is_not_deterministic(device):
    expected = "^gradcheck: fn must be deterministic; seed dropout inside"
    with pytest.raises(GradcheckError, match=expected):
        gradcheck(lambda x: ops.dropout(x, 0.5), device.array(normal(20)))
    count = iter(range(100))
    with pytest.raises(GradcheckError, match=expected):
        gradcheck(lambda x: x * (1e-6 * next(count)), device.array(normal(3)))
    with pytest.raises(GradcheckError, match=expected):  # beside an output that is much larger
        gradcheck(lambda x: (x * 1e8, x * next(count)), device.array(normal(3)))
    with pytest.raises(GradcheckError, match=expected):
        gradcheck(lambda x: ops.cat([x] * (1 + next(count))), device.array(normal(3)))


def test_what_differs_by_rounding_is_deterministic(device):
    """As on a GPU, where sums have no fixed order."""
    count = iter(range(100))
    assert gradcheck(lambda x: x * (1 + 2e-16 * (next(count) % 2)), device.array(normal(3)), rtol=1e-4)


def test_an_fn_that_returns_nan_is_deterministic(device):
    with pytest.raises(GradcheckError, match="finite differences give nan"):
        gradcheck(lambda x: ops.log(x), device.array([-1.0]))


def test_an_error_in_fn_passes_through(device):
    def fn(x):
        raise LookupError("no such thing")

    with pytest.raises(LookupError, match="no such thing"):
        gradcheck(fn, device.array(normal(3)))


def test_it_records_under_no_grad_too(device):
    with no_grad():
        assert gradcheck(ops.exp, device.array(normal(3)))
        with pytest.raises(GradcheckError, match="backward gives"):
            gradcheck(type("W", (Tanh,), {"backward": lambda self, dy: dy}).apply, device.array(normal(3)))


def test_ops_inside_checkpoint_are_checked(device):
    wrong = type("Wrong", (Tanh,), {"backward": lambda self, dy: dy})
    assert gradcheck(lambda x: checkpoint(Tanh.apply, x), device.array(normal(3)))
    with pytest.raises(GradcheckError, match="backward gives"):
        gradcheck(lambda x: checkpoint(wrong.apply, x), device.array(normal(3)))


def test_a_backward_that_changes_its_input_is_not_taken_for_randomness(device):
    class Wrong(Tanh):
        def backward(self, dy):
            (y,) = self.saved
            y *= y
            return dy * (1 - y * y)

    with pytest.raises(GradcheckError, match="backward gives"):
        gradcheck(Wrong.apply, device.array(normal(3)))


def test_the_signature_is_that_of_the_function():
    assert list(inspect.signature(gradcheck).parameters)[:3] == ["fn", "inputs", "must_run"]
