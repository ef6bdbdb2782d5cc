"""float16's wrapper: pages compute in float32, and what goes in, comes out and is saved is rounded once."""

import weakref

import numpy as np
import pytest
from helpers import assert_close, host, normal

from tinylm import Op, Tensor, engines, fused, ops
from tinylm.half import in_half
from tinylm.ops.arith import Mul
from tinylm.ops.gelu import Gelu

f16, f32 = np.float16, np.float32


class Seen(Op):
    """x * w, and notes the dtypes that it sees."""

    def forward(self, x, w):
        self.dtypes_seen = [x.dtype, w.dtype]
        self.save(x, w)
        return x * w

    def backward(self, dy):
        x, w = self.saved
        self.dtypes_seen += [dy.dtype, x.dtype, w.dtype]
        return dy * w, dy * x


def leaf(*shape, dtype=f16, seed=0):
    return Tensor(normal(*shape, seed=seed).astype(dtype), requires_grad=True)


@pytest.mark.parametrize("dtypes", [(f16, f16), (f16, f32), (f32, f16)])
def test_a_page_sees_float32_and_gradients_come_back_in_their_inputs_dtypes(dtypes):
    x, w = (leaf(5, dtype=dtype, seed=i) for i, dtype in enumerate(dtypes))
    y = Seen.apply(x, w)
    op = y.op
    y.backward(np.ones(5, y.dtype))
    assert op.dtypes_seen == [np.dtype(f32)] * 5
    assert y.dtype == dtypes[0]  # the first floating input decides
    assert (x.grad.dtype, w.grad.dtype) == dtypes
    exact = x.data.astype(f32) * w.data
    np.testing.assert_array_equal(y.data, exact.astype(y.dtype))  # rounded once


def test_integers_numbers_and_float64_come_as_they_are():
    w = Tensor(np.arange(3.0), requires_grad=True)
    y = Seen.apply(leaf(3), w)
    assert (y.op.dtypes_seen, y.dtype) == ([np.dtype(f32), np.dtype(np.float64)], np.float64)
    y = Seen.apply(leaf(3), np.arange(3, dtype=np.int32))
    assert y.op.dtypes_seen[1] == np.int32


def test_arrays_without_dimensions_of_which_numpy_makes_scalars():
    x = Tensor(np.array(3, f16), requires_grad=True)
    y = Seen.apply(x, x)
    y.backward()
    assert (y.dtype, y.item(), x.grad.dtype, x.grad.item()) == (f16, 9, f16, 6)


def test_backward_computes_in_float32():
    x = Tensor(np.array([300.0], f16), requires_grad=True)
    with np.errstate(over="ignore"):
        y = x**3
    y.backward(np.array([0.01], f16))  # 3 * 300**2 is beyond float16, its hundredth is not
    assert_close(x.grad, [2700], rtol=2e-3)
    assert x.grad.dtype == f16


FUNCTIONS = [ops.relu, ops.neg, ops.abs, ops.clone, ops.gelu, ops.exp, ops.sigmoid, ops.sin, ops.cos, ops.min, ops.std]
OTHERS = [lambda x: x**2, lambda x: x[1:], lambda x: x.clamp(0), lambda x: x.reshape(2, 2).tril()]


@pytest.mark.parametrize("fn", [*FUNCTIONS, *OTHERS, lambda x: x.masked_fill(x > 0, 2.0)])
def test_gradients_are_float16_whether_or_not_the_op_promotes(device, fn):
    x = device.leaf(normal(4), f16)
    y = fn(x)
    y.backward(device.array(np.ones(y.shape), f16))
    assert (y.dtype, x.grad.dtype) == (f16, f16)


@pytest.mark.parametrize(
    ("fn", "saved"),
    [
        (lambda x, w: x**2, ["x"]),
        (lambda x, w: ops.softmax(x), ["y"]),
        (lambda x, w: ops.gelu(x), [((4, 20), f16)]),
        (lambda x, w: ops.layer_norm(x, w, w), [((4, 20), f16), ((4, 1), f32), "w"]),  # rstd is small: float32
        (
            lambda x, w: ops.cross_entropy(x, np.zeros(4, int)),
            [((4, 20), f32), ((4,), f32), ((4,), np.int64), ((4,), f32)],
        ),
    ],
    ids=["input", "output", "slope", "statistics", "loss"],
)
def test_what_is_saved(fn, saved):
    """Inputs as they came, outputs as they go (the very arrays, no copies), statistics in float32."""
    x, w = leaf(4, 20), leaf(20, seed=1)
    y = fn(x, w)
    arrays = {"x": x.data, "w": w.data, "y": y.data}
    for a, expected in zip(y.op.saved, saved, strict=True):
        if isinstance(expected, str):
            assert a is arrays[expected]
        else:
            assert (a.shape, a.dtype) == expected


@pytest.mark.parametrize("T", [2, 8, 30])
def test_attentions_weights_are_rounded_whatever_their_size(T):
    """Fewer keys than channels make them smaller than q, but they are no statistics."""
    q = leaf(1, 1, T, 8)
    assert [a.dtype for a in ops.causal_attention(q, q, q).op.saved] == [f16] * 4


def test_a_twin_saves_lists_and_is_rounded_too():
    fused.register("blocked")
    with engines("blocked"):
        y = ops.causal_attention(*(leaf(1, 1, 70, 4, seed=i) for i in range(3)))
    *qkvy, ps = y.op.saved
    assert type(y.op).__name__ == "BlockedCausalAttention"
    assert [(type(ps), len(ps)), {p.dtype for p in [*qkvy, *ps]}] == [(list, 2), {np.dtype(f16)}]
    assert qkvy[3] is y.data


def test_the_float32_arrays_do_not_outlive_forward():
    seen = []

    class Watched(Seen):
        def forward(self, x, w):
            y = super().forward(x, w)
            seen.extend(weakref.ref(a) for a in (x, w, y))
            return y

        def backward(self, dy):
            return super().backward(dy)

    y = Watched.apply(leaf(3), leaf(3, seed=1))
    assert [ref() for ref in seen] == [None] * 3
    assert y.op is not None


def test_there_is_one_class_an_op_and_it_is_named_as_its_page():
    class Mine(Gelu):
        def forward(self, x):
            return x

        def backward(self, dy):
            return dy

    for op in (Gelu, Mul, Mine):
        half = in_half(op)
        assert half is in_half(op)
        assert (half.__name__, half.page) == (op.__name__, op)
        assert issubclass(half, op)
    assert len({in_half(op) for op in (Gelu, Mul, Mine)}) == 3


def test_a_wrong_page_is_named_with_its_own_lines():
    class Wrong(Op):
        def forward(self, x, w):
            if x.size == 1:
                raise KeyError("lost")
            return x * w

        def backward(self, dy):
            return dy

    with pytest.raises(KeyError) as error:
        Wrong.apply(leaf(1), leaf(1))
    (note,) = error.value.__notes__
    assert note.startswith("in Wrong.forward((1,) float16 cpu, (1,) float16 cpu), line ")
    assert note.endswith(f"of {__file__}")
    with pytest.raises(RuntimeError, match=r"Wrong\.backward returned 1 gradients for 2 inputs"):
        Wrong.apply(leaf(2), leaf(2)).backward(np.ones(2, f16))


def test_on_both_devices_the_numbers_are_the_same(device):
    results = []
    for where in (device.leaf, lambda x, dtype: Tensor(x, dtype, requires_grad=True)):
        x, w = where(normal(4, 6), f16), where(normal(6, seed=1), f32)
        y = ops.gelu(ops.layer_norm(x, w)) * x
        y.backward(y.data)
        results.append([host(a) for a in (y, x.grad, w.grad)])
    for a, b in zip(*results, strict=True):
        np.testing.assert_array_equal(a, b)
