"""The stand-in for CuPy refuses what its docstring says; what it allows exists in CuPy."""

import inspect

import numpy as np
import pytest
import strict_cupy

cp = strict_cupy.module


@pytest.fixture
def x():
    return cp.asarray(np.arange(6.0).reshape(2, 3))


MISUSES = {
    "implicit conversion": lambda x: np.asarray(x),
    "a NumPy ufunc": lambda x: np.exp(x),
    "a NumPy function": lambda x: np.sum(x),
    "a NumPy list of arrays": lambda x: np.stack([x, x]),
    "a host array on the right": lambda x: x + np.ones(3),
    "a host array on the left": lambda x: np.ones(3) * x,
    "a NumPy scalar on the right": lambda x: x * np.float64(2),
    "a NumPy scalar on the left": lambda x: np.float64(2) * x,
    "a host array in place": lambda x: x.__iadd__(np.ones(3)),
    "into a host array in place": lambda x: np.ones((2, 3)).__iadd__(x),
    "a comparison with a host array": lambda x: x == np.ones(3),
    "a host array of indices": lambda x: x[np.array([0, 1])],
    "a host mask": lambda x: x[np.ones((2, 3), bool)],
    "a host list of indices": lambda x: x[[0, 1]],
    "a host index among others": lambda x: x[:, np.array([0])],
    "assignment of a host array": lambda x: x.__setitem__(0, np.ones(3)),
    "assignment at host indices": lambda x: x.__setitem__(np.array([0]), 1.0),
    "assignment into a host array": lambda x: np.ones((2, 3)).__setitem__(0, x[0]),
    "a function of a host array": lambda x: cp.exp(np.ones(3)),
    "a function of both": lambda x: cp.concatenate([x, np.ones((2, 3))]),
    "a matrix product of both": lambda x: x @ np.ones((3, 2)),
    "out on the host": lambda x: cp.exp(x, out=np.ones((2, 3))),
    "a keyword that CuPy lacks": lambda x: cp.einsum("ij->i", x, out=x),
    "a method's keyword that CuPy lacks": lambda x: x.sum(where=True),
    "iteration into a NumPy array": lambda x: np.array(list(x)),
}


@pytest.mark.parametrize("name", MISUSES)
def test_refuses(x, name):
    with pytest.raises(TypeError, match=r"host|implicit|device array|takes no"):
        MISUSES[name](x)


def test_lacks_what_cupy_lacks(x):
    assert not hasattr(cp.add, "reduceat")
    assert not hasattr(cp, "errstate")


def test_results_are_arrays_never_scalars(x):
    for y in (x.sum(), cp.max(x), x[0, 0], x.mean(), x[0] @ x[0], x.argmax(), cp.einsum("ij,ij->", x, x)):
        assert isinstance(y, cp.ndarray)
        assert y.shape == ()
    assert float(x.sum()) == 15.0
    assert bool(x.sum() > 3)


def test_an_element_is_a_view(x):
    x[1, 2][...] = 7
    assert x[1, 2].item() == 7


def test_base_tells_owned_memory_from_views(x):
    assert (x + 1).base is None
    assert x.copy().base is None
    assert cp.asarray(np.arange(6)[1:]).base is None
    for view in (x[0], x.T, (x + 1).reshape(6), cp.broadcast_to(x, (4, 2, 3)), cp.split(x, 2)[0]):
        assert view.base is not None


def test_identity_is_kept(x):
    assert x.astype(x.dtype, copy=False) is x
    assert cp.asarray(x) is x
    assert cp.exp(x, out=x) is x
    before = x
    x += 1
    assert x is before


def test_cupy_has_what_the_stand_in_has():
    """Where CuPy can be imported (no GPU needed): all functions, methods and keywords of the tables exist there."""
    cupy = pytest.importorskip("cupy")
    for owner, table in ((cupy, strict_cupy.FUNCTIONS), (cupy.ndarray, strict_cupy.METHODS)):
        for names, keywords in table.items():
            for name in names.split():
                function = getattr(owner, name)
                if isinstance(function, cupy.ufunc) or name == "einsum":  # einsum takes **kwargs and checks them itself
                    continue
                try:
                    has = str(inspect.signature(function))
                except ValueError:  # a compiled method: its docstring starts with its signature
                    has = function.__doc__.partition("\n")[0]
                for keyword in keywords.split():
                    assert keyword in has, f"{name} of CuPy is {has}, without {keyword}"
