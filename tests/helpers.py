"""What the tests of ops and layers share: devices, and `check`, which compares an op with PyTorch in one line."""

from dataclasses import dataclass

import numpy as np
import torch
from hypothesis import strategies as st

from tinylm import Tensor, gradcheck, random
from tinylm.array import array_module, device_of, to_device
from tinylm.autograd import backward

FLOAT64 = {"rtol": 1e-10, "atol": 1e-10}
FLOAT32 = {"rtol": 2e-5, "atol": 2e-5}


@dataclass(frozen=True)
class Device:
    """Where a test runs: makes arrays and Tensors there."""

    name: str  # tinylm's name for it: 'cpu' or 'cuda'

    @property
    def xp(self):
        """The module of its arrays."""
        return array_module(self.array(0.0))

    def array(self, x, dtype=None):
        return to_device(np.asarray(x, dtype), self.name)

    def tensor(self, x, dtype=None, requires_grad=False):
        """A Tensor on this device; float32 for lists of floats, as `tinylm.tensor` has it."""
        return Tensor(x, dtype, device=self.name, requires_grad=requires_grad)

    def leaf(self, x, dtype=None):
        """A Tensor on this device that requires a gradient."""
        return self.tensor(x, dtype, requires_grad=True)


def host(x):
    """A Tensor's or array's values as a NumPy array."""
    return to_device(x.data if isinstance(x, Tensor) else x, "cpu")


def assert_close(got, expected, rtol=1e-7, atol=0.0, what="value"):
    """Equal shape, and values equal up to the tolerances (also NaN and infinities)."""
    got, expected = host(got), np.asarray(expected)
    assert got.shape == expected.shape, f"{what}: shape {got.shape}, expected {expected.shape}"
    np.testing.assert_allclose(got, expected, rtol=rtol, atol=atol, err_msg=what)


def normal(*shape, seed=0):
    """Standard normal float64 numbers: the same for the same shape and seed."""
    return np.asarray(random.generator(seed, *shape).standard_normal(shape))


def positive(*shape, seed=0):
    """Numbers in [0.5, 2)."""
    return np.asarray(random.generator(seed, *shape).uniform(0.5, 2.0, shape))


def distinct(*shape, seed=0):
    """Numbers at least 0.1 apart and away from 0: no ties or kinks that would disturb finite differences."""
    n = int(np.prod(shape))
    return (random.generator(seed, *shape).permutation(n).reshape(shape) - n // 2 + 0.5) / 4


def check(device, fn, torch_fn, *inputs, differences=True, tolerance=FLOAT32):
    """Compare `fn` with `torch_fn` on the same inputs: the value and every gradient under a random cotangent.

    In float64 to 1e-10; in float32, from arrays that are not C-contiguous, to `tolerance`; then, in float64, with
    finite differences. `inputs` are NumPy arrays: floating ones require a gradient, others do not. Both return one
    tensor, or a tuple of them. Neither inputs nor cotangents may be changed.
    """
    for dtype, order, close in ((np.float64, "C", FLOAT64), (np.float32, "F", tolerance)):
        ours = [device.tensor(_like(x, dtype, order), requires_grad=x.dtype.kind == "f") for x in inputs]
        theirs = [torch.tensor(_like(x, dtype, "C"), requires_grad=x.dtype.kind == "f") for x in inputs]
        ys, torch_ys = _tuple(fn(*ours)), _tuple(torch_fn(*theirs))
        cotangents = [_like(normal(*y.shape, seed=i), dtype, order) for i, y in enumerate(ys)]
        dys = [device.array(c) for c in cotangents]
        backward(ys, dys)
        torch.autograd.backward(torch_ys, [torch.tensor(c) for c in cotangents])

        for i, (y, torch_y) in enumerate(zip(ys, torch_ys, strict=True)):
            assert (y.dtype, y.device) == (dtype, device.name)
            assert_close(y, torch_y.detach(), **close, what=f"output {i} in {np.dtype(dtype)}")
            assert_close(dys[i], cotangents[i], what="backward changed its dy")
        for i, (x, torch_x) in enumerate(zip(ours, theirs, strict=True)):
            if x.requires_grad:
                expected = np.zeros(x.shape) if torch_x.grad is None else torch_x.grad
                assert (x.grad.dtype, device_of(x.grad)) == (dtype, device.name)
                assert_close(x.grad, expected, **close, what=f"gradient of input {i} in {np.dtype(dtype)}")
            assert_close(x, _like(inputs[i], dtype, order), what=f"the op changed its input {i}")
    if differences:
        gradcheck(fn, *(device.array(x) for x in inputs))


def _like(x, dtype, order):
    """A copy of `x` in the memory order 'C' or 'F', floating numbers as `dtype`."""
    return np.array(x, dtype if x.dtype.kind == "f" else None, order=order)


def _tuple(y):
    return tuple(y) if isinstance(y, tuple | list) else (y,)


# --- what Hypothesis draws --------------------------------------------------------------------------------------


def shapes(min_dims=0, max_dims=3, min_side=1, max_side=3):
    return st.lists(st.integers(min_side, max_side), min_size=min_dims, max_size=max_dims).map(tuple)


def axes(ndim, whole=True):
    """None, an axis or a tuple of axes of an array of `ndim` dimensions; negative ones too."""
    one = st.integers(-ndim, ndim - 1) if ndim else st.nothing()
    several = st.lists(st.integers(0, max(0, ndim - 1)), min_size=1, max_size=ndim, unique=True).map(tuple)
    return st.one_of(*([st.none()] if whole else []), *([one, several] if ndim else []))


@st.composite
def broadcastable(draw, n=2, max_dims=3, max_side=3):
    """`n` shapes that broadcast together: some axes stretched, some absent."""
    full = draw(shapes(max_dims=max_dims, max_side=max_side))
    result = []
    for _ in range(n):
        kept = full[draw(st.integers(0, len(full))) :]
        result.append(tuple(1 if draw(st.booleans()) else side for side in kept))
    return result


def steps_of(optimizer):
    """How many updates each parameter has had."""
    return [optimizer.state[p]["step"] if p in optimizer.state else 0 for p in optimizer.parameters()]


def moments_of(optimizer):
    """{"0.exp_avg": ...}: the moments of each parameter."""
    state = optimizer.state_dict()["state"]
    return {f"{i}.{name}": x for i, entry in state.items() for name, x in entry.items() if name != "step"}
