"""Rearranging ops: reshape, transpose, cat, stack, split, index, broadcast_to, tril."""

import itertools

import numpy as np
import pytest
import torch
from helpers import assert_close, check, normal, shapes
from hypothesis import given
from hypothesis import strategies as st

from tinylm import ops

draws = given(shape=shapes(min_dims=1), data=st.data())


@draws
def test_reshape(device, shape, data):
    sides = data.draw(st.permutations(shape))
    for new in (tuple(sides), (-1,), (1, -1), (*sides, 1)):
        check(device, lambda x, new=new: x.reshape(new), lambda x, new=new: x.reshape(new), normal(*shape))


def test_the_spellings_of_reshape(device):
    x = device.leaf(np.arange(6.0))
    for y in (x.reshape(2, 3), x.reshape((2, 3)), x.reshape([2, -1]), x.view(2, 3), ops.reshape(x, 2, 3)):
        assert_close(y, np.arange(6.0).reshape(2, 3))
    assert x.reshape(2, 3).flatten().shape == (6,)
    assert device.tensor([5.0]).reshape(()).shape == ()
    assert device.tensor(5.0).reshape(1, 1).shape == (1, 1)


@draws
def test_transpose(device, shape, data):
    order = data.draw(st.permutations(range(len(shape))))
    axes = tuple(a - len(shape) if data.draw(st.booleans()) else a for a in order)
    check(device, lambda x: x.permute(*axes), lambda x: x.permute(order), normal(*shape))
    check(device, lambda x: x.transpose(axes), lambda x: x.permute(order), normal(*shape))
    check(device, lambda x: x.T, lambda x: x.permute(*reversed(range(x.ndim))), normal(*shape))


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))), ids=str)
def test_every_order_of_three_axes(device, order):
    """Only with three axes is there an order that is not its own inverse."""
    check(device, lambda x: x.transpose(order), lambda x: x.permute(order), normal(2, 3, 4), differences=False)


def test_transpose_takes_two_axes_as_pytorch_does_and_a_tuple_as_numpy_does(device):
    x = normal(2, 3)
    for axes in ((0, 1), (1, 0), (-1, 0)):
        assert device.tensor(x).transpose(*axes).shape == torch.tensor(x).transpose(*axes).shape == (3, 2)
    assert device.tensor(x).transpose((0, 1)).shape == (2, 3)
    assert device.tensor(x).permute(0, 1).shape == (2, 3)
    assert device.tensor(x).transpose().shape == (3, 2)
    assert device.tensor(normal(2, 3, 4)).transpose(2, 0, 1).shape == (4, 2, 3)


@draws
def test_swapaxes(device, shape, data):
    one, other = (data.draw(st.integers(-len(shape), len(shape) - 1)) for _ in range(2))
    check(device, lambda x: x.swapaxes(one, other), lambda x: x.swapaxes(one, other), normal(*shape))


def test_the_spellings_of_transpose(device):
    x = device.tensor(np.zeros((2, 3, 4)))
    for y in (x.transpose(1, 2, 0), x.transpose((1, 2, 0)), x.permute(1, 2, 0), ops.transpose(x, [1, 2, 0])):
        assert y.shape == (3, 4, 2)
    assert x.T.shape == (4, 3, 2)


@draws
def test_expand_dims_and_squeeze(device, shape, data):
    axis = data.draw(st.integers(-len(shape) - 1, len(shape)))
    check(device, lambda x: x.expand_dims(axis), lambda x: x.unsqueeze(axis), normal(*shape))
    check(device, lambda x: x.unsqueeze(axis).squeeze(axis) * 2, lambda x: x * 2, normal(*shape))
    check(device, lambda x: x.squeeze(), lambda x: x.squeeze(), normal(*shape))
    assert ops.expand_dims(device.tensor([1.0]), (0, 2)).shape == (1, 1, 1)
    assert ops.squeeze(device.tensor(np.zeros((1, 2, 1))), (0, -1)).shape == (2,)


@draws
def test_broadcast_to(device, shape, data):
    ones = tuple(1 if data.draw(st.booleans()) else n for n in shape)
    new = (2, *shape)
    check(device, lambda x: ops.broadcast_to(x, new), lambda x: x.broadcast_to(new), normal(*ones))


@given(shape=shapes(min_dims=2), diagonal=st.integers(-3, 3))
def test_tril(device, shape, diagonal):
    check(device, lambda x: x.tril(diagonal), lambda x: x.tril(diagonal), normal(*shape))
    check(device, lambda x: ops.tril(x), lambda x: x.tril(), normal(*shape), differences=False)


def test_tril_drops_what_is_not_finite(device):
    x = device.leaf([[1.0, np.inf], [np.nan, 2.0]])
    y = x.tril()
    y.backward(device.array([[1, np.inf], [1, 1]], np.float32))
    assert_close(y, [[1.0, 0.0], [np.nan, 2.0]])
    assert_close(x.grad, [[1.0, 0.0], [1.0, 1.0]])
    assert device.tensor([[True, True], [True, True]]).tril().tolist() == [[True, False], [True, True]]
    with pytest.raises(ValueError, match=r"a triangle needs at least 2 axes[^$]*Tril.forward\(\(3,\) float32"):
        device.tensor([1.0, 2.0, 3.0]).tril()


@draws
def test_cat_and_stack(device, shape, data):
    axis = data.draw(st.integers(-len(shape), len(shape) - 1))
    lengths = data.draw(st.lists(st.integers(0, 3), min_size=1, max_size=3))
    parts = []
    for i, n in enumerate(lengths):
        size = list(shape)
        size[axis] = n
        parts.append(normal(*size, seed=i))
    check(device, lambda *xs: ops.cat(xs, axis), lambda *xs: torch.cat(xs, axis), *parts)
    same = [normal(*shape, seed=i) for i in range(len(lengths))]
    for where in (axis, len(shape)):
        check(device, lambda *xs, a=where: ops.stack(xs, a), lambda *xs, a=where: torch.stack(xs, a), *same)


def test_one_tensor_twice(device):
    check(device, lambda x: ops.cat([x, x * 2, x]), lambda x: torch.cat([x, x * 2, x]), normal(2, 2))
    check(device, lambda x: ops.stack([x, x], axis=1), lambda x: torch.stack([x, x], 1), normal(2, 2))


@draws
def test_split(device, shape, data):
    axis = data.draw(st.integers(-len(shape), len(shape) - 1))
    size = data.draw(st.integers(1, shape[axis] + 1))
    for n in (size, np.int64(size)):
        check(device, lambda x, n=n: x.split(n, axis), lambda x: torch.split(x, size, axis), normal(*shape))
    check(device, lambda x: x.chunk(size, axis), lambda x: torch.chunk(x, size, axis), normal(*shape))
    ends = sorted(data.draw(st.lists(st.integers(0, shape[axis]), max_size=3)))
    sizes = np.diff([0, *ends, shape[axis]]).tolist()
    check(device, lambda x: x.split(sizes, axis), lambda x: torch.split(x, sizes, axis), normal(*shape))


def test_parts_that_the_loss_ignores_get_zeros(device):
    x = device.leaf(np.arange(6.0).reshape(2, 3))
    _, middle, _ = x.chunk(3, axis=1)
    (middle * 2).sum().backward()
    assert_close(x.grad, [[0.0, 2.0, 0.0], [0.0, 2.0, 0.0]])


# --- index ------------------------------------------------------------------------------------------------------

I = np.array  # noqa: E741
KEYS = {
    "an integer": np.s_[1],
    "a negative integer": np.s_[-1],
    "a slice": np.s_[1:3],
    "a slice with a step": np.s_[::2],
    "an empty slice": np.s_[2:2],
    "slices": np.s_[:, 1:, :1],
    "all": np.s_[...],
    "Ellipsis and an integer": np.s_[..., 1],
    "integers": np.s_[1, 2, 0],
    "None": np.s_[None],
    "None inside": np.s_[:, None, 1],
    "None and Ellipsis": np.s_[None, ..., None],
    "an integer array": I([2, 0]),
    "repeats": I([1, 1, 3, 1]),
    "negative repeats": I([-1, 3, -1]),
    "a matrix of repeats": I([[0, 1], [1, 1]]),
    "an array of one": I(2),
    "an empty array": I([], dtype=np.int64),
    "a list": [0, 0, 2],
    "a tuple of repeats inside": np.s_[:, (0, 0, 1)],
    "a list of repeats inside": np.s_[1:, [2, 2, 0]],
    "two arrays": (I([0, 1, 0]), I([2, 2, 2])),
    "arrays that broadcast": (I([[0], [1]]), I([0, 2, 2])),
    "an array and a slice": (slice(1, 3), I([0, 0])),
    "arrays around a slice": (I([0, 0]), slice(None), I([1, 1])),
    "an array and an integer": (I([3, 3]), 1),
    "an array after Ellipsis": (..., I([1, 1, 0])),
    "an array and None": (None, I([0, 0])),
    "a mask": normal(4, 3, 2) > 0,
    "a mask of rows": I([True, False, True, True]),
    "an empty mask": np.zeros((4, 3, 2), bool),
    "a mask and a slice": (I([True, False, True, True]), slice(1, None)),
    "a mask inside": (slice(None), I([True, False, True])),
    "a mask and an integer": (I([True, False, True, True]), 1),
    "a mask and an array": (I([True, False, True, True]), I([0, 2, 0])),
    "a list of booleans": [True, False, False, True],
}


@pytest.mark.parametrize("name", KEYS)
def test_index(device, name):
    """Keys on the device, and the same keys as NumPy arrays, lists and Tensors."""
    key = KEYS[name]
    each = key if isinstance(key, tuple) else (key,)
    as_torch = tuple(torch.as_tensor(k) if isinstance(k, list | np.ndarray) else k for k in each)

    def torch_fn(x):
        # PyTorch takes no negative step and reads a 0-d tensor as an integer, as NumPy does.
        return x[as_torch]

    def using(convert):
        ours = tuple(convert(k) if isinstance(k, np.ndarray) else k for k in each)
        return lambda x: x[ours if isinstance(key, tuple) else ours[0]]

    check(device, using(device.array), torch_fn, normal(4, 3, 2))
    check(device, using(lambda k: k), torch_fn, normal(4, 3, 2), differences=False)
    check(device, using(device.tensor), torch_fn, normal(4, 3, 2), differences=False)


def test_index_by_numpy_integers_and_backwards(device):
    x = device.leaf([1.0, 2.0, 3.0])
    y = x[np.int64(1)] + x[::-1][0]
    y.sum().backward()
    assert y.item() == 5.0
    assert_close(x.grad, [0.0, 1.0, 1.0])


def test_an_index_that_repeats_adds_every_time(device):
    """Assignment in place of addition gives 1 here, and loses the gradient of every repeated token."""
    x = device.leaf(np.zeros(5), np.float32)
    x[device.array([2, 2, 0, 2])].backward(device.array([1.0, 10.0, 5.0, 100.0], np.float32))
    assert_close(x.grad, [5.0, 0.0, 111.0, 0.0, 0.0])


def test_repeats_in_float16_add_in_float32(device):
    x = device.leaf(np.zeros(1), np.float16)
    x[device.array(np.zeros(4096, np.int64))].backward(device.array(np.ones(4096), np.float16))
    assert x.grad.dtype == np.float16
    assert_close(x.grad, [4096.0])


@given(data=st.data())
def test_index_by_drawn_keys(device, data):
    ids = data.draw(st.lists(st.integers(-4, 3), min_size=1, max_size=6))
    start, stop = data.draw(st.integers(-5, 5)), data.draw(st.integers(-5, 5))
    for key in ((np.array(ids), slice(start, stop)), (slice(start, stop), np.array(ids) % 3)):
        check(
            device,
            lambda x, key=key: x[key],
            lambda x, key=key: x[tuple(torch.as_tensor(k) if isinstance(k, np.ndarray) else k for k in key)],
            normal(4, 3),
        )


# --- errors -----------------------------------------------------------------------------------------------------


def test_errors_name_the_op_and_the_shapes(device):
    x = device.tensor(np.zeros((2, 3)), np.float32)
    seen = rf".forward\(\(2, 3\) float32 {device.name}\)"
    with pytest.raises(ValueError, match="Reshape" + seen):
        x.reshape(4, 2)
    with pytest.raises(ValueError, match=r"axes \(0, 0\) must name each of 2 axes once[^$]*Transpose" + seen):
        x.permute(0, 0)
    with pytest.raises(ValueError, match=r"swapaxes\(i, j\) swaps just two[^$]*Transpose" + seen):
        x.transpose(1)
    with pytest.raises(ValueError, match=r"sizes \(1, 1\) add up to 2, not to 3[^$]*Split" + seen):
        x.split([1, 1], axis=1)
    for wrong in (lambda: x.split(0), lambda: x.chunk(0), lambda: x.split([-1, 3])):
        with pytest.raises(ValueError, match="must"):
            wrong()
    for wrong in (
        lambda: x.split(1, 2),
        lambda: x.chunk(1, -3),
        lambda: x.swapaxes(0, 2),
        lambda: x.sum().swapaxes(0, 0),
    ):
        with pytest.raises(IndexError, match=r"axis -?\d is out of range"):
            wrong()
    with pytest.raises(ValueError, match="Reshape" + seen):
        x.view(5)
    with pytest.raises(ValueError, match="BroadcastTo" + seen):
        ops.broadcast_to(x, (2, 4))
    with pytest.raises(IndexError, match="Index" + seen):
        x[2]
    with pytest.raises(IndexError, match="Index" + seen):
        x[0, 0, 0]


def test_errors_of_several_tensors(device):
    a, b = device.tensor(np.zeros((2, 3)), np.float32), device.tensor(np.zeros((2, 4)), np.float32)
    with pytest.raises(ValueError, match=r"Cat.forward\(\(2, 3\) float32 \w+, \(2, 4\) float32 \w+\)"):
        ops.cat([a, b], axis=0)
    with pytest.raises(ValueError, match=r"stack needs equal shapes, not \[\(2, 3\), \(2, 4\)\]"):
        ops.stack([a, b])
    with pytest.raises(ValueError, match="cat needs at least one tensor"):
        ops.cat([])
    with pytest.raises(ValueError, match=r"squeeze|size not equal to one"):
        a.squeeze(0)
