"""The checker itself: it passes what is right, fails on a table of wrong backwards, and says where."""

import re

import numpy as np
import pytest
from helpers import host, normal

import tinylm
from tinylm import GradcheckError, Op, gradcheck, ops
from tinylm.array import array_module

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
    gradcheck(op.apply, *(device.array(x) for x in INPUTS[op]))


@pytest.mark.parametrize("name", WRONG)
@pytest.mark.parametrize("seed", [0, 1])
def test_fails_on_what_is_wrong(device, name, seed):
    op, backward = WRONG[name]
    wrong = type(op.__name__, (op,), {"forward": op.forward, "backward": backward})
    with pytest.raises(GradcheckError, match=r"backward gives .*, finite differences give"):
        gradcheck(wrong.apply, *(device.array(x) for x in INPUTS[op]), seed=seed)


def test_the_message_names_input_index_both_values_and_the_error(device):
    class Wrong(Op):
        def forward(self, a, b):
            self.save(a, b)
            return a * b

        def backward(self, dy):
            a, b = self.saved
            db = dy * a
            db[1, 0] *= 1.5
            return dy * b, db

    a, b = normal(2, 2), normal(2, 2, seed=1)
    with pytest.raises(GradcheckError) as caught:
        gradcheck(Wrong.apply, device.array(a), device.array(b))
    number = r"(-?[\d.]+(?:e-?\d+)?)"
    found = re.fullmatch(
        rf"gradcheck: input 1, index \(1, 0\): backward gives {number}, finite differences give {number} "
        rf"\(relative error {number}; 1 of 4 elements differ\)",
        str(caught.value),
    )
    assert found, str(caught.value)
    analytic, numeric, relative = map(float, found.groups())
    assert analytic == pytest.approx(1.5 * numeric, rel=1e-6)
    assert relative == pytest.approx(1 / 3, rel=0.05)


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
        seen.append((a.dtype, b.dtype, i is ids, n))
        return a[i] * n + ops.exp(b[i])

    gradcheck(fn, x, device.array([0.5, 1.5], np.float32), ids, 3)
    assert set(seen) == {(np.dtype(np.float64), np.dtype(np.float64), True, 3)}
    assert x.grad is None
    assert (x.dtype, host(x).tolist()) == (np.float32, [1.0, 2.0])
    if device.name == "cpu":
        gradcheck(lambda x: x * x, [1.0, 2.0])


def test_several_outputs_and_scalars(device):
    gradcheck(lambda x: (x * 2, x.sum(), ops.exp(x)), device.array(normal(3)))
    gradcheck(lambda x: [x * x], device.array(0.5))


def test_the_inputs_are_put_back(device):
    x = normal(2, 3)
    inside = []

    def fn(t):
        inside.append(t)
        return t * t

    gradcheck(fn, device.array(x))
    np.testing.assert_array_equal(host(inside[-1]), x)


def test_large_and_tiny_inputs(device):
    """The step grows with x, and near zero it is eps itself."""
    for inputs in ([1e6, -3e6], [1e-9, 0.0], [1.0, 1e-3]):
        gradcheck(lambda x: x * x, device.array(inputs))


def test_it_is_an_assertion_error_for_tests():
    assert issubclass(GradcheckError, AssertionError)


def test_replaced_ops_are_checked_too(device):
    """A student's version, put in force with override, is what runs."""

    class Wrong(ops.softmax.__globals__["Softmax"]):
        def forward(self, x):
            return super().forward(x)

        def backward(self, dy):
            return dy

    with tinylm.override(ops.softmax.__globals__["Softmax"], Wrong), pytest.raises(GradcheckError):
        gradcheck(ops.softmax, device.array(normal(3)))
    gradcheck(ops.softmax, device.array(normal(3)))
