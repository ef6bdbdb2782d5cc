"""The product of a few rows and a transposed weight: equal to NumPy's, used for no other."""

import numpy as np
import pytest

from tinylm.ops.matmul import product
from tinylm.registry import implementation
from tinylm.settings import current

f32 = np.float32


def runs(a, b, **params):
    """The name of the function that runs for these arrays."""
    return implementation(product, current(), (a, b), params).__name__


@pytest.mark.parametrize("shape", [(1, 1), (1, 16), (16, 1), (4, 16), (64,), (2, 3, 5)])
def test_a_few_rows_are_multiplied_as_numpy_does(twins, shape):
    rng = np.random.default_rng(0)
    a, w = rng.normal(size=(*shape, 24)).astype(f32), rng.normal(size=(33, 24)).astype(f32)
    assert runs(a, w.T) == "few_rows"
    y = product(a, w.T)
    assert y.flags.c_contiguous
    np.testing.assert_allclose(y, a @ w.T, rtol=1e-5, atol=1e-5)


def test_many_rows_and_other_layouts_are_left_alone(twins):
    a, w = np.ones((4, 24), f32), np.ones((33, 24), f32)
    assert runs(a, w.T) == "few_rows"
    assert runs(np.ones((65, 24), f32), w.T) == "product"
    assert runs(a, np.ones((24, 33), f32)) == "product"
    assert runs(a.astype(np.float64), w.T) == runs(a, w.T.astype(np.float64)) == "product"
    assert runs(a, np.ones((2, 24, 33), f32)) == "product"
    assert runs(a, w.T, out=np.empty((4, 33), f32)) == "product"
    with pytest.raises(ValueError, match="mismatch"):
        product(a, np.ones((33, 23), f32).T)
