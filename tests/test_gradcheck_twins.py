"""gradcheck of ops with faster twins: those that take only float32 are compared with the reference."""

import contextlib
import re
import warnings

import numpy as np
import pytest
from helpers import host, normal, positive
from test_gradcheck import WRONG, Cube, Softmax, Tanh, line_of, on

import tinylm
from tinylm import GradcheckError, Op, gradcheck, nn, ops, reference_only, registry, tensor
from tinylm.array import array_module


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
    place = f"Negated ({line_of('def forward(self, x):  # of Negated', __file__)})"
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


@pytest.mark.parametrize("scale", [0, 1e-20])
def test_zero_may_be_a_little_more_in_a_twin(device, scale):
    """Where terms cancel exactly in the reference (layer norm of one number), zeros do not tell how large they were."""
    tiny = 1e-8 if scale else 3e-5
    for more, right in ((tiny, True), (30 * tiny, False)):
        halves = {"forward": Constant.forward, "backward": lambda self, dy, more=more: (scale + more) * dy}
        reference = type("Constant", (Constant,), {"backward": lambda self, dy: scale * dy})
        with in_force(reference, type("Twin", (Float32, reference), halves)):
            if right:
                assert gradcheck(reference.apply, device.array(normal(3)))
            else:
                with pytest.raises(GradcheckError, match="in float32 Twin"):
                    gradcheck(reference.apply, device.array(normal(3)))


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


def test_must_run_finds_a_twin_that_ran_in_float32_alone(device):
    x = device.array(normal(3))
    twin = type("Fused", (Float32, Tanh), {"forward": Tanh.forward, "backward": Tanh.backward})
    with in_force(Tanh, twin):
        assert gradcheck(Tanh.apply, x, must_run=twin)
        assert gradcheck(Tanh.apply, x, must_run=Tanh)
    with pytest.raises(GradcheckError, match=r"Fused .* never ran; what ran: Tanh"):
        gradcheck(Tanh.apply, x, must_run=twin)


def test_a_twin_inside_a_module_is_checked_in_float32(device):
    class Layer(nn.Module):
        def __init__(self):
            self.weight = nn.Parameter(np.asarray([0.5, -0.7], np.float32))

        def forward(self):
            return Cube.apply(self.weight)

    with in_force(Cube, Negated), pytest.raises(GradcheckError, match=r"parameter weight, index .*: in float32 Neg"):
        gradcheck(on(device, Layer()))


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
