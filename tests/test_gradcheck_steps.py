"""gradcheck raises no false alarm: large outputs and strong curvature pass, and no mistake passes with them."""

import re
import warnings

import numpy as np
import pytest
from test_gradcheck import INPUTS, WRONG

import tinylm
from tinylm import GradcheckError, Op, gradcheck, ops
from tinylm.array import array_module


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
