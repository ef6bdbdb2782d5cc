"""The checker itself: it passes what is right, fails on a table of wrong backwards, and says where."""

import contextlib
import re
import warnings

import numpy as np
import pytest
from helpers import host, normal, positive

import tinylm
from tinylm import GradcheckError, Op, gradcheck, is_grad_enabled, nn, no_grad, ops, reference_only, registry, tensor
from tinylm.array import array_module
from tinylm.recompute import checkpoint

GeluReference, SoftmaxReference = (op.__globals__[name] for op, name in ((ops.gelu, "Gelu"), (ops.softmax, "Softmax")))


@contextlib.contextmanager
def in_force(op, twin):
    """Inside, `twin` runs for `op`, for the inputs that it supports."""
    registry.fused(op, engine="test")(twin)
    try:
        with registry.engines("test"):
            yield
    finally:
        registry._twins[op]["test"].remove(twin)


class Float32:
    """What a twin inherits that takes only float32, as the compiled ones do."""

    @classmethod
    def supports(cls, *arrays, **params):
        return all(a.dtype == np.float32 for a in arrays)


def line_of(text):
    """' (file:line)' of the only line of this file that begins with `text`."""
    lines = [line.strip() for line in open(__file__, encoding="utf-8")]  # noqa: SIM115
    (number,) = [i for i, line in enumerate(lines, 1) if line.startswith(text)]
    return f"{__file__}:{number}"


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
    gradcheck(lambda x: (x * x, Tensor_of(x, np.inf)), device.array(normal(2)))


def Tensor_of(x, value):
    """A constant beside the tensor x."""
    return tinylm.Tensor(array_module(x.data).full(2, value, x.dtype))


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
    # It may run in float32 alone.
    twin = type("Fused", (Float32, Tanh), {"forward": Tanh.forward, "backward": Tanh.backward})
    with in_force(Tanh, twin):
        assert gradcheck(Tanh.apply, x, must_run=twin)
        assert gradcheck(Tanh.apply, x, must_run=Tanh)
    with pytest.raises(GradcheckError, match=r"Fused .* never ran; what ran: Tanh"):
        gradcheck(Tanh.apply, x, must_run=twin)


# --- twins ------------------------------------------------------------------------------------------------------


class Negated(Float32, Cube):
    """The mistake that a check in float64 alone cannot see."""

    def forward(self, x):  # of Negated
        return super().forward(x)

    def backward(self, dy):
        return -super().backward(dy)


def cube_twin(forward=lambda self, x: Cube.forward(self, x), backward=lambda self, dy: Cube.backward(self, dy)):
    """A twin of Cube for float32."""
    return type("Twin", (Float32, Cube), {"forward": forward, "backward": backward})


def test_a_twin_for_float32_with_a_wrong_backward_fails_and_is_named(device):
    x = positive(2, 3)
    with in_force(Cube, Negated), pytest.raises(GradcheckError) as caught:
        gradcheck(lambda x: Cube.apply(x) * 2, device.array(x))
    place = f"Negated ({line_of('def forward(self, x):  # of Negated')})"
    number = r"(-?[\d.]+(?:e-?\d+)?)"
    found = re.fullmatch(
        rf"gradcheck: input 0, index \((\d), (\d)\): in float32 {re.escape(place)} gives {number}, "
        rf"the reference {number} \(relative error 2; 6 of 6 elements differ\); what ran: {re.escape(place)}, Mul",
        str(caught.value),
    )
    assert found, str(caught.value)
    assert float(found[3]) == -float(found[4])
    cotangent = tinylm.random.generator(0).standard_normal(x.shape)
    at = int(found[1]), int(found[2])
    assert float(found[4]) == pytest.approx((6 * x * x * cotangent)[at], rel=1e-5)
    gradcheck(Cube.apply, device.array(x))  # nothing is left of the twin
    with in_force(Cube, Negated), reference_only():
        gradcheck(Cube.apply, device.array(x))


ROUNDING = ("a factor of 1.0001", "one element of six, by a thousandth")  # of float32, as far as one can tell


@pytest.mark.parametrize("name", [name for name, (op, _) in WRONG.items() if op is Cube and name not in ROUNDING])
def test_a_twin_fails_on_what_is_wrong_by_more_than_float32_rounds(device, name):
    expected = r"input 0, index .*: in float32 Twin \(.*\) gives .*, the reference"
    with in_force(Cube, cube_twin(backward=WRONG[name][1])), pytest.raises(GradcheckError, match=expected):
        gradcheck(Cube.apply, device.array(normal(2, 3)))


def test_a_twin_with_a_wrong_forward_fails(device):
    def forward(self, x):
        y = Cube.forward(self, x)
        y[0, 2] *= 1.01
        return y

    expected = (
        r"output 1, index \(0, 2\): in float32 Twin .* gives .*, the reference .* \(relative error 0.0099; 1 of 6"
    )
    with in_force(Cube, cube_twin(forward)), pytest.raises(GradcheckError, match=expected):
        gradcheck(lambda x: (x + 1, Cube.apply(x)), device.array(normal(2, 3)))


def test_a_twin_that_is_right_passes(device):
    def forward(self, x):
        self.save(x)
        return x * (x * x) * (1 + 3e-6)

    with in_force(Cube, cube_twin(forward)):
        assert gradcheck(Cube.apply, device.array(normal(2, 3)))
        assert gradcheck(Cube.apply, device.array(normal(0, 3)))
        assert gradcheck(Cube.apply, device.array(0.7))


@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e6])
def test_a_twins_tolerance_is_that_of_the_array(device, scale):
    """An element is compared with the largest; small ones need not be right in all their digits, large ones must."""
    x = scale * np.array([1.0, -1.3, 1e-2])

    def off_by(part, where):
        def backward(self, dy):
            dx = Cube.backward(self, dy)
            dx[where] += part * abs(dx).max()
            return dx

        return cube_twin(backward=backward)

    step = 1e-5 * min(1, scale)
    for where in (1, 2):
        with in_force(Cube, off_by(3e-5, where)):
            assert gradcheck(Cube.apply, device.array(x), eps=step, atol=0)
        with (
            in_force(Cube, off_by(1e-3, where)),
            pytest.raises(GradcheckError, match=rf"index \({where},\): in float32"),
        ):
            gradcheck(Cube.apply, device.array(x), eps=step, atol=0)


def test_a_small_element_of_a_twin_that_passes_is_not_reported(device):
    """Index 0 is off by a tenth, but by little for the array; index 1, the wrong one, by a hundredth."""

    def backward(self, dy):
        dx = Cube.backward(self, dy)
        return dx * array_module(dx).asarray([1.1, 1.01], dtype=dx.dtype)

    with (
        in_force(Cube, cube_twin(backward=backward)),
        pytest.raises(GradcheckError, match=r"index \(1,\): in .* 1 of 2 el"),
    ):
        gradcheck(Cube.apply, device.array([1e-2, 1.0]))


def test_a_twin_may_round_where_terms_cancel(device):
    """x^3 - 39 near its root: what is left is mostly rounding, of the reference as well."""
    x = device.array(39 ** (1 / 3) + 1e-5 * normal(20))

    def off_by(d):
        """A twin that is off by `d` where y, before 39 was subtracted, has a resolution of 3.8e-6."""
        return cube_twin(lambda self, x: Cube.forward(self, x) + d)

    with in_force(Cube, off_by(3e-5)):
        assert gradcheck(lambda x: Cube.apply(x) - 39, x)
    with in_force(Cube, off_by(2e-4)), pytest.raises(GradcheckError, match=r"output 0, .*: in float32 Twin"):
        gradcheck(lambda x: Cube.apply(x) - 39, x)


class Constant(Op):
    """1, whatever x is."""

    def forward(self, x):
        return array_module(x).ones_like(x)

    def backward(self, dy):
        return 0 * dy


def test_zero_may_be_a_little_more_in_a_twin(device):
    for tiny, right in ((3e-6, True), (1e-4, False)):
        halves = {"forward": Constant.forward, "backward": lambda self, dy, tiny=tiny: tiny * dy}
        with in_force(Constant, type("Twin", (Float32, Constant), halves)):
            if right:
                assert gradcheck(Constant.apply, device.array(normal(3)))
            else:
                with pytest.raises(GradcheckError, match="in float32 Twin"):
                    gradcheck(Constant.apply, device.array(normal(3)))


def test_a_gradient_that_is_zero_may_be_rounding_in_a_twin(device):
    """Softmax does not mind what is added to all of x: the gradient of that is 0, or what rounding leaves of it."""

    def backward(self, dy):
        (y,) = self.saved
        return y * dy - y * (dy * y).sum(axis=-1, keepdims=True)

    twin = type("Twin", (Float32, Softmax), {"forward": lambda self, x: Softmax.forward(self, x), "backward": backward})
    with in_force(Softmax, twin):
        assert gradcheck(lambda x, a: Softmax.apply(x + a), device.array(normal(3, 40)), device.array(normal(3, 1)))


def test_where_float32_overflows_there_is_nothing_to_compare(device):
    """1e15^3 is infinite in float32. The twin may say so in another way; elsewhere, it must be right."""

    def forward(self, x):
        y = Cube.forward(self, x)
        return array_module(x).where(array_module(x).isinf(y), np.nan, y)

    x = device.array([1e15, 2.0])
    with in_force(Cube, cube_twin(forward)), warnings.catch_warnings():
        warnings.simplefilter("error")
        assert gradcheck(Cube.apply, x)
    with in_force(Cube, Negated), pytest.raises(GradcheckError, match=r"index \(.,\): in float32 Negated"):
        gradcheck(Cube.apply, x)


class Masked(Op):
    """-inf in place of every second element."""

    def forward(self, x):
        y = x.copy()
        y[1::2] = -np.inf
        return y

    def backward(self, dy):
        dx = dy.copy()
        dx[1::2] = 0
        return dx


def test_infinities_that_belong_there_must_be_the_same(device):
    assert gradcheck(Masked.apply, device.array(normal(4)))

    def forward(self, x):
        y = Masked.forward(self, x)
        y[1] = -1e9
        return y

    twin = type("Twin", (Float32, Masked), {"forward": forward, "backward": Masked.backward})
    with in_force(Masked, twin), pytest.raises(GradcheckError, match=r"output 0, index \(1,\): .* the reference -inf"):
        gradcheck(Masked.apply, device.array(normal(4)))


def test_a_twin_that_returns_another_shape_or_dtype(device):
    wide = cube_twin(
        lambda self, x: Cube.forward(self, x).astype(np.float64),
        lambda self, dy: Cube.backward(self, dy).astype(np.float32),
    )
    row = cube_twin(lambda self, x: Cube.forward(self, x)[None], lambda self, dy: Cube.backward(self, dy[0]))
    for twin, was in ((wide, "(3,) float64"), (row, "(1, 3) float32")):
        expected = re.escape(f"gives {was}, not (3,) float32")
        with in_force(Cube, twin), pytest.raises(GradcheckError, match=rf"output 0: in float32 Twin .* {expected}"):
            gradcheck(Cube.apply, device.array(normal(3)))


def test_a_twin_for_float64_too_is_checked_by_finite_differences(device):
    twin = type("Twin", (Cube,), {"forward": Cube.forward, "backward": lambda self, dy: 2 * Cube.backward(self, dy)})
    with in_force(Cube, twin), pytest.raises(GradcheckError, match=r"backward gives .*; what ran: Twin \("):
        gradcheck(Cube.apply, device.array(normal(3)))


def test_a_twin_that_is_wrong_in_float32_alone(device):
    """It runs in float64 too, so it is no news there: it must be compared all the same."""

    def backward(self, dy):
        return Cube.backward(self, dy) * (1 if dy.dtype == np.float64 else 2)

    twin = type("Twin", (Cube,), {"forward": Cube.forward, "backward": backward})
    with in_force(Cube, twin), pytest.raises(GradcheckError, match="in float32 Twin"):
        gradcheck(Cube.apply, device.array(normal(3)))


def test_a_function_that_an_engine_replaces_is_checked_too(device, monkeypatch):
    """No class tells of it, but the values do."""
    engines = ["some"]

    @contextlib.contextmanager
    def reference_only():
        none_of_them = engines.pop()
        yield
        engines.append(none_of_them)

    monkeypatch.setattr(registry, "reference_only", reference_only)
    with pytest.raises(GradcheckError, match=r"output 0, index .*: in float32 an engine in force gives"):
        gradcheck(lambda x: x * (3 if engines and x.dtype == np.float32 else 2), device.array(normal(3)))


def test_an_error_in_a_twin_passes_through(device):
    def forward(self, x):
        raise KeyError("no such kernel")

    with in_force(Cube, cube_twin(forward)), pytest.raises(KeyError, match="no such kernel"):
        gradcheck(Cube.apply, device.array(normal(3)))


def test_an_fn_for_float64_alone(device):
    def fn(x):
        if x.dtype != np.float64:
            raise TypeError("only in float64")
        return x * x

    assert gradcheck(fn, device.array(normal(3)))


@pytest.mark.parametrize("seed", [0, 5])
def test_twins_see_the_inputs_and_the_cotangent_of_the_check_in_float64(device, seed):
    seen = []

    class Look(Cube):
        def forward(self, x):
            return Cube.forward(self, x)

        def backward(self, dy):
            seen.append((host(self.saved[0]), host(dy)))
            return Cube.backward(self, dy)

    x = normal(2, 3)
    gradcheck(Look.apply, device.array(x), seed=seed)
    assert [x.dtype for x, _ in seen] == [dy.dtype for _, dy in seen] == [np.float64, np.float32, np.float32]
    cotangent = tinylm.random.generator(seed).standard_normal(x.shape)
    for got, dy in seen:
        np.testing.assert_array_equal(got, x.astype(got.dtype))
        np.testing.assert_array_equal(dy, cotangent.astype(dy.dtype))


def test_the_compiled_twins_are_checked(twins):
    x, w = normal(3, 8), normal(8, seed=1)
    for fn, inputs in (
        (ops.gelu, [x]),
        (ops.layer_norm, [x, 1 + 0.1 * w, w]),
        (ops.causal_attention, [normal(1, 2, 5, 4, seed=i) for i in range(3)]),
        (lambda h, w: ops.linear_cross_entropy(h, w, np.array([0, 1, 2])), [x, normal(5, 8)]),
    ):
        floats = [tensor(a, np.float32, requires_grad=True) for a in inputs]
        assert gradcheck(fn, *inputs, must_run=type(fn(*floats).op))


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


def test_a_twin_inside_a_module_is_checked_in_float32(device):
    class Layer(nn.Module):
        def __init__(self):
            self.weight = nn.Parameter(np.asarray([0.5, -0.7], np.float32))

        def forward(self):
            return Cube.apply(self.weight)

    with in_force(Cube, Negated), pytest.raises(GradcheckError, match=r"parameter weight, index .*: in float32 Neg"):
        gradcheck(on(device, Layer()))


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


def test_a_frozen_parameter_is_in_float64_but_not_checked(device):
    layer = on(device, WrongLinear(3, 2))
    layer.bias.requires_grad_(False)
    assert gradcheck(layer, device.array(normal(4, 3)))
    assert layer.bias.dtype == np.float32


# --- no false alarm ---------------------------------------------------------------------------------------------


def test_a_large_output_does_not_drown_a_small_one(device):
    """1e8 has a resolution of 1e-8, and a step of 1e-5 moves x by 1e-5: their sum would be right to 1e-3."""

    def fn(x, y):
        return y * 1e8, x * 1.0

    assert gradcheck(fn, device.array([1.0, 2.0]), device.array([1.0]))
    with pytest.raises(GradcheckError, match="input 0"):
        gradcheck(lambda x, y: (y * 1e8, x.detach()), device.array([1.0, 2.0]), device.array([1.0]))


def custom(forward, derivative):
    """An op of one input, element by element, from its formula and its derivative's, as a function of (xp, x)."""

    def run(self, x):
        self.save(x)
        return forward(array_module(x), x)

    def backward(self, dy):
        return dy * derivative(array_module(dy), self.saved[0])

    return type("Custom", (Op,), {"forward": run, "backward": backward})


CURVED = {  # formula, derivative, and where a step of 1e-5 is too long
    "log": (lambda xp, x: xp.log(x), lambda xp, x: 1 / x, [1e-3, 1e-4, 3e-6, 1e-6]),
    "sqrt": (lambda xp, x: xp.sqrt(x), lambda xp, x: 0.5 / xp.sqrt(x), [1e-3, 1e-5, 1e-6]),
    "1/x": (lambda xp, x: 1 / x, lambda xp, x: -1 / (x * x), [1e-3, -1e-4, 1e-6]),
    "tanh 1000x": (
        lambda xp, x: xp.tanh(1000 * x),
        lambda xp, x: 1000 * (1 - xp.tanh(1000 * x) ** 2),
        [1e-4, -5e-4, 1e-3],
    ),
    "10000 + sqrt": (lambda xp, x: 1e4 + xp.sqrt(x), lambda xp, x: 0.5 / xp.sqrt(x), [9e-4, 8e-4, 7e-4, 6e-4, 5e-4]),
    "-relu(-x)": (lambda xp, x: xp.minimum(x, 0), lambda xp, x: (x < 0) * 1.0, [-3e-6, 3e-6, -9e-6, 9e-6]),
    "relu": (lambda xp, x: xp.maximum(x, 0), lambda xp, x: (x > 0) * 1.0, [3e-6, -3e-6, 9e-6, -9e-6]),
}

WRONG_DERIVATIVES = {
    "zeros": lambda dx: 0 * dx,
    "the sign": lambda dx: -dx,
    "a factor of 2": lambda dx: 2 * dx,
    "a factor of 1.0001": lambda dx: 1.0001 * dx,
    "a factor of 0.9": lambda dx: 0.9 * dx,
    "one element": lambda dx: dx * np.where(np.arange(dx.size) == 0, 1.001, 1.0),
    "a NaN": lambda dx: dx * np.nan,
    "an infinity": lambda dx: dx + np.inf,
}


@pytest.mark.parametrize("name", CURVED)
def test_strong_curvature_is_no_mistake(device, name):
    forward, derivative, x = CURVED[name]
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # log of a negative number, a step below
        assert gradcheck(custom(forward, derivative).apply, device.array(x))


@pytest.mark.parametrize("wrong", WRONG_DERIVATIVES)
@pytest.mark.parametrize("name", CURVED)
def test_a_mistake_does_not_pass_as_strong_curvature(name, wrong):
    forward, derivative, x = CURVED[name]
    op = custom(forward, lambda xp, x: WRONG_DERIVATIVES[wrong](derivative(xp, x)))
    with pytest.raises(GradcheckError, match="backward gives"):
        gradcheck(op.apply, np.asarray(x))


def test_a_gradient_of_zero_amid_strong_curvature(device):
    """Of (1000 x)^3 at 0, each step finds something, the shortest less than atol."""
    assert gradcheck(lambda x: (x * 1000) * (x * 1000) * (x * 1000), device.array([0.0]))


def test_the_message_has_the_first_look(device):
    """Further ones, of 1e6 + x^2, are noise."""
    wrong = custom(lambda xp, x: 1e6 + x * x, lambda xp, x: 0 * x)
    with pytest.raises(GradcheckError) as caught:
        gradcheck(wrong.apply, device.array([0.8]))
    found = float(re.search("finite differences give ([^ ]+)", str(caught.value))[1])
    assert found == pytest.approx(1.6 * tinylm.random.generator(0).standard_normal(), rel=1e-4)


def test_rounding_of_large_outputs_is_no_mistake(device):
    assert gradcheck(lambda x: 1e8 + x, device.array([0.3, 1.7, -0.4]))


@pytest.mark.parametrize("offset", [1e6, 1e8, 1e10])
@pytest.mark.parametrize("hidden", [False, True], ids=["in the output", "inside"])
@pytest.mark.parametrize("wrong", WRONG_DERIVATIVES)
def test_a_mistake_does_not_pass_as_rounding(offset, hidden, wrong):
    """A short step does not move 1e10 + x at all: to it, a backward of zeros looks right."""
    op = custom(lambda xp, x: xp.tanh(x), lambda xp, x: WRONG_DERIVATIVES[wrong](1 - xp.tanh(x) ** 2))
    with pytest.raises(GradcheckError, match="backward gives"):
        gradcheck(lambda x: op.apply(x) + offset - hidden * offset, np.array([0.3, 1.2, -0.4]))


@pytest.mark.parametrize("x", [0.3, 0.35, 0.4, 0.45, 0.5, 0.55, 0.6, 0.65])
def test_zeros_do_not_pass_where_the_first_step_moves_an_output_to_one_side(x):
    """1e11 + x has a resolution of 1.5e-5: by a step of 1e-5 it moves up, or down, or not at all."""
    wrong = custom(lambda xp, x: 1e11 + x, lambda xp, x: 0 * x)
    above, below = 1e11 + (x + 1e-5), 1e11 + (x - 1e-5)
    if above != below:  # otherwise the first step sees nothing, and zeros look right to it
        with pytest.raises(GradcheckError, match="backward gives"):
            gradcheck(wrong.apply, np.array([x]))


def test_a_mistake_does_not_pass_as_the_error_of_a_longer_step():
    """A step of 1e-3 finds 2e-6 for the derivative of x^3, where it is 1e-6."""
    wrong = custom(lambda xp, x: x * x * x, lambda xp, x: 6 * x * x)
    with pytest.raises(GradcheckError, match="backward gives"):
        gradcheck(wrong.apply, np.array([5.8e-4]))


def test_a_step_is_too_short_if_some_output_stands_still(device):
    """Of x and 1e10 + x, only the first moves by the shortest steps: a backward that forgot the second is wrong."""
    with pytest.raises(GradcheckError):
        gradcheck(lambda x: (x * 1.0, 1e10 + x.detach()), device.array([0.3]))


@pytest.mark.parametrize("name", WRONG)
@pytest.mark.parametrize("eps", [1e-3, 1e-7])
def test_a_mistake_fails_by_any_step(name, eps):
    """As if the first look had disagreed for another reason."""
    op, backward = WRONG[name]
    wrong = type(op.__name__, (op,), {"forward": op.forward, "backward": backward})
    with pytest.raises(GradcheckError, match="backward gives"):
        gradcheck(wrong.apply, *INPUTS[op], eps=eps)


def test_a_second_look_costs_only_where_the_first_disagrees():
    calls = []

    def fn(x):
        calls.append(1)
        return ops.log(x)

    gradcheck(fn, np.array([1.0, 2.0, 1e-4]))
    assert len(calls) == 2 + 2 * (1 + 1 + 3) + 2  # of 1e-4: as ever, longer, and the shorter one agrees


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
        gradcheck(lambda x: ops.concatenate([x] * (1 + next(count))), device.array(normal(3)))


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
    import inspect

    assert list(inspect.signature(gradcheck).parameters)[:3] == ["fn", "inputs", "must_run"]
