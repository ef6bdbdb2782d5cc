"""zeros, ones, randn and arange: shapes, dtypes, devices, randomness."""

import numpy as np
import pytest
import torch
from helpers import host

import tinylm
from tinylm import arange, ones, randn, zeros


@pytest.mark.parametrize("make", [zeros, ones, randn])
def test_shapes_dtypes_and_devices(device, make):
    for x in (make(2, 3, device=device.name), make((2, 3), device=device.name), make([2, 3], device=device.name)):
        assert (x.shape, x.dtype, x.device, x.requires_grad) == ((2, 3), np.float32, device.name, False)
    assert make(()).shape == make().shape == ()
    assert make(0, 2).shape == (0, 2)
    assert make(2, dtype=np.float16).dtype == np.float16
    assert make(2, dtype="float64", requires_grad=True).requires_grad
    assert make(2, requires_grad=True).is_leaf


def test_values():
    assert zeros(2).tolist() == [0.0, 0.0]
    assert ones(2, dtype=np.int64).tolist() == [1, 1]
    assert ones(1, dtype=bool).dtype == bool


@pytest.mark.parametrize("args", [(5,), (2, 5), (5, 2, -1), (0, 1, 0.25), (2.5,), (3, 3)])
def test_arange_is_pytorchs(device, args):
    x, expected = arange(*args, device=device.name), torch.arange(*args)
    assert (str(x.dtype), x.device) == (str(expected.dtype).removeprefix("torch."), device.name)
    assert x.tolist() == expected.tolist()
    assert arange(3, dtype=np.float64, requires_grad=True).dtype == np.float64


def test_randn_is_a_function_of_the_seed(device):
    def draw(seed):
        tinylm.random.seed(seed)
        return [host(randn(50, 40, device=device.name)) for _ in range(2)]

    (a, b), (again, _), (other, _) = draw(1), draw(1), draw(2)
    np.testing.assert_array_equal(a, again)
    assert (a != b).all()
    assert (a != other).all()
    assert abs(a.mean()) < 0.1
    assert a.std() == pytest.approx(1, abs=0.05)


def test_wrong_arguments():
    with pytest.raises(TypeError, match="randn makes floating numbers, not int64"):
        randn(2, dtype=np.int64)
    with pytest.raises(TypeError, match="only a floating tensor can require a gradient"):
        arange(3, requires_grad=True)
    with pytest.raises(ValueError, match="device must be 'cpu' or 'cuda', not 'gpu'"):
        zeros(2, device="gpu")
