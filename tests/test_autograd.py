"""The tape: sums of gradients, ownership of arrays, errors, recording, threads, and release of memory."""

import copy
import gc
import re
import subprocess
import sys
import threading
import tracemalloc
import weakref

import numpy as np
import pytest
import torch
from helpers import assert_close

import tinylm
from tinylm import GPT, GPTConfig, Op, detect_anomaly, enable_grad, is_grad_enabled, no_grad, ops, tensor
from tinylm.autograd import backward
from tinylm.optim import AdamW


def leaf(*shape, seed=0, dtype=np.float64):
    """A leaf of random numbers that requires a gradient; a scalar without `shape`."""
    return tensor(np.asarray(np.random.default_rng(seed).standard_normal(shape), dtype), requires_grad=True)


def noise(*shape, seed=1):
    return np.asarray(np.random.default_rng(seed).standard_normal(shape))


class Twice(Op):
    """2x, whose backward may be replaced by a wrong one: `Twice.apply(x, wrong=lambda dy: ...)`."""

    wrong = None

    def forward(self, *xs):
        return 2 * xs[0]

    def backward(self, dy):
        return self.wrong(dy) if self.wrong else 2 * dy


class Pass(Op):
    """The identity, whose output and gradient are the same array objects as its input and dy."""

    def forward(self, x):
        return x

    def backward(self, dy):
        return dy


# --- sums over the graph ----------------------------------------------------------------------------------------

# Each runs in both libraries: only operators and methods that they share.
GRAPHS = {
    "a + a": lambda a, b: a + a,
    "a * a": lambda a, b: a * a,
    "a - a": lambda a, b: a - a * b,
    "a / a": lambda a, b: a / (a * a + 1),
    "one leaf in many ops": lambda a, b: a.exp() * a + a.tanh() - a * (a + b) + (a @ b) * a,
    "diamond": lambda a, b: (lambda h: h.exp() * h.tanh())(a * b),
    "diamond of diamonds": lambda a, b: (lambda h: (lambda g: g * g + g)(h + h * b))(a + a * b),
    "one gradient for two parents, then more for one": lambda a, b: (lambda z: (lambda w: w * 3 + z)(z + a))(a + b),
    "a view and its owner": lambda a, b: (lambda h: h + h.reshape(-1).reshape(h.shape) * 2 + h.T.T)(a * b),
    "views of the gradient first": lambda a, b: (lambda h: h.T + h.reshape(h.shape) + h * h)(a * b),
    "both sides twice": lambda a, b: (lambda s, t: (s + t) + (s + t) * (t + s))(a * 2, b * 3),
    "a sum's broadcast gradient": lambda a, b: (lambda h: h.sum() + (h * h).sum() + h.mean() * a.sum())(a + b),
    "a leaf is the result of nothing else": lambda a, b: a + b,
}


@pytest.mark.parametrize("graph", GRAPHS.values(), ids=GRAPHS)
def test_gradients_add_up_as_in_pytorch(graph):
    a, b = leaf(3, 3, seed=1), leaf(3, 3, seed=2)
    a_, b_ = (torch.tensor(x.numpy().copy(), requires_grad=True) for x in (a, b))
    y, y_ = graph(a, b), graph(a_, b_)
    dy = noise(*y.shape)
    y.backward(dy)
    y_.backward(torch.tensor(dy))
    np.testing.assert_allclose(y.numpy(), y_.detach(), rtol=1e-12)
    np.testing.assert_allclose(a.grad, a_.grad, rtol=1e-12, atol=1e-12)
    if b_.grad is not None:
        np.testing.assert_allclose(b.grad, b_.grad, rtol=1e-12, atol=1e-12)


def test_random_graphs_agree_with_pytorch():
    """Thirty graphs of forty ops each, with operands drawn from all earlier results: many patterns of sharing."""
    binary = [lambda a, b: a + b, lambda a, b: a * b, lambda a, b: a - b]
    unary = [lambda a, b: a.tanh(), lambda a, b: a.reshape(-1).reshape(2, 3), lambda a, b: a * 0.5, lambda a, b: -a]
    for seed in range(30):
        draw = np.random.default_rng(seed)
        mine = [leaf(2, 3, seed=seed), leaf(2, 3, seed=seed + 99)]
        theirs = [torch.tensor(x.numpy().copy(), requires_grad=True) for x in mine]
        for _ in range(40):
            f = draw.choice([*binary, *unary])
            i, j = draw.integers(max(0, len(mine) - 8), len(mine), 2)
            mine.append(f(mine[i], mine[j]).tanh())
            theirs.append(f(theirs[i], theirs[j]).tanh())
        dy = draw.standard_normal((2, 3))
        backward(mine[-3:], [dy, dy, 2 * dy])
        torch.autograd.backward(theirs[-3:], [torch.tensor(g) for g in (dy, dy, 2 * dy)])
        for x, x_ in zip(mine[:2], theirs[:2], strict=True):
            assert (x.grad is None) == (x_.grad is None)
            if x.grad is not None:
                np.testing.assert_allclose(x.grad, x_.grad, rtol=1e-9, atol=1e-12)


def test_gradients_accumulate_on_leaves_over_backward_calls():
    a = leaf(3)
    (a * 2).sum().backward()
    first = a.grad.copy()
    (a * 5).sum().backward()
    np.testing.assert_array_equal(first, [2, 2, 2])
    np.testing.assert_array_equal(a.grad, [7, 7, 7])
    a.zero_grad()
    assert a.grad is None


def test_only_leaves_that_require_a_gradient_get_one():
    a, constant = leaf(3), tensor(noise(3))
    h = a * constant
    h.sum().backward()
    assert constant.grad is None
    assert h.grad is None
    assert not constant.requires_grad
    assert h.requires_grad
    assert not h.is_leaf


def test_several_roots_in_one_backward():
    a = leaf(3)
    h = a * a
    backward([(h * 2).sum(), h, a], [None, np.array([1.0, 0, 0]), np.ones(3)])
    np.testing.assert_allclose(a.grad, 2 * a.numpy() * (2 + np.array([1, 0, 0])) + 1)


def test_the_same_root_twice_counts_twice():
    a = leaf()
    y = a * 3
    backward([y, y])
    assert a.grad == 6


def test_a_root_below_another_root_gets_both_gradients():
    a = leaf()
    h = a * 3
    backward([h, h * 2])
    assert a.grad == 9


def test_a_scalar_leaf_may_be_its_own_loss():
    a = leaf()
    a.backward()
    assert a.grad == 1
    assert a.grad.shape == ()


def test_unused_outputs_of_a_split_get_zeros():
    a = leaf(6)
    _, middle, _ = a.chunk(3)
    (middle * tensor(np.array([2.0, 3.0]))).sum().backward()
    np.testing.assert_array_equal(a.grad, [0, 0, 2, 3, 0, 0])


def test_every_output_of_a_split_goes_to_its_own_place():
    a = leaf(6)
    parts = a.chunk(3)
    (parts[2] * 5 + parts[0] * 2 + parts[0]).sum().backward()  # another order, one of them twice
    np.testing.assert_array_equal(a.grad, [3, 3, 0, 0, 5, 5])


def test_the_outputs_of_a_split_may_differ_in_shape():
    a = leaf(6)
    first, second, third = a.split([1, 2, 3])
    ((first * 2).sum() + (second * 3).sum() + (third * 5).sum()).backward()
    np.testing.assert_array_equal(a.grad, [2, 3, 3, 5, 5, 5])


# --- deep graphs --------------------------------------------------------------------------------------------------


def test_graphs_100_000_ops_deep():
    a = leaf()
    y = a
    for _ in range(100_000):
        y = y + 1.0
    y.backward()
    assert a.grad == 1


@pytest.mark.parametrize("walked", [True, False])
def test_deep_graphs_are_deleted_at_once_without_recursion(walked):
    a = leaf()
    y = a * 1.0
    oldest = weakref.ref(y.op)
    for _ in range(100_000):
        y = y * 1.0
    if walked:
        y.backward()
    del y
    assert oldest() is None


def test_a_deep_ladder_is_walked_once_a_node():
    """2^200 paths lead from the loss to the leaf: backward must sum the gradients and visit each node once."""
    a = leaf()
    y = a
    for _ in range(200):
        y = (y + y) * 0.5
    y.backward()
    assert a.grad == 1


# --- whose array it is --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "graph",
    [
        lambda a, b: a + b,
        lambda a, b: Pass.apply(a) + Pass.apply(b),
        lambda a, b: (a + b) + a,
        lambda a, b: a + (a + b),
        lambda a, b: a.reshape(4).reshape(2, 2) + b.T.T,
        lambda a, b: (a + b) * 1.0 + (a + b),
        lambda a, b: ops.cat([a, b])[:2] + ops.cat([b, a])[:2],
    ],
)
def test_the_users_gradient_is_not_touched_and_leaves_share_no_memory(graph):
    a, b = leaf(2, 2), leaf(2, 2, seed=3)
    seed = noise(2, 2)
    before = seed.copy()
    for _ in range(2):  # the second time adds to what the first left on the leaves
        graph(a, b).backward(seed)
        np.testing.assert_array_equal(seed, before)
        assert not np.shares_memory(a.grad, seed)
        assert not np.shares_memory(b.grad, seed)
        assert not np.shares_memory(a.grad, b.grad)
    a.grad *= 0  # clipping does this
    np.testing.assert_array_equal(seed, before)
    assert b.grad.all()


def test_a_gradient_that_is_a_view_of_another_is_not_added_to():
    """An op may give one parent an array and the other a view of it."""

    class Both(Op):
        def forward(self, a, b):
            return a + b.T

        def backward(self, dy):
            dx = dy * 1.0
            return dx, dx.T

    a, b = leaf(2, 2), leaf(2, 2, seed=3)
    h, g = a * 1.0, b * 1.0
    extra = h * 5.0  # older than Both, so its gradient is added to what Both gave h before g is walked
    y = Both.apply(h, g) + extra
    y.sum().backward()
    np.testing.assert_array_equal(a.grad, np.full((2, 2), 6.0))
    np.testing.assert_array_equal(b.grad, np.ones((2, 2)))
    assert not np.shares_memory(a.grad, b.grad)


def test_a_leaf_keeps_a_fresh_gradient_without_a_copy():
    returned = []

    class Watched(Op):
        def forward(self, x):
            return x + 0.0

        def backward(self, dy):
            returned.append(dy * 2.0)
            return returned[-1]

    a = leaf(3)
    (Watched.apply(a) + Watched.apply(a)).sum().backward()
    assert a.grad is returned[0]  # the second one was added to it
    np.testing.assert_array_equal(a.grad, [4, 4, 4])


class Kept(Op):
    """x * c, whose backward returns an array that it keeps: the typical mistake of a first op."""

    where = "saved"

    def forward(self, x, c):
        y = x * c
        if self.where == "saved":
            self.save(c)
        elif self.where == "list":
            self.save([c])
        else:
            self.c = c
        return y

    def backward(self, dy):
        c = getattr(self, "c", None) if self.where == "attribute" else self.saved[0]
        return (c[0] if isinstance(c, list) else c), dy * 1.0


@pytest.mark.parametrize("where", ["saved", "list", "attribute"])
def test_a_leaf_never_gets_an_array_that_the_op_keeps(where):
    w, c = leaf(3), leaf(3, seed=1)
    Kept.apply(w, c, where=where).sum().backward()
    assert not np.shares_memory(w.grad, c.data)
    w.grad *= 0  # as clipping does
    assert c.data.all()


def test_a_leaf_never_gets_its_own_data_or_one_array_twice():
    class Own(Op):
        def forward(self, x, y):
            return x + y

        def backward(self, dy):
            return held[0], held[0]

    a, b = leaf(3), leaf(3, seed=1)
    held = [a.data]
    Own.apply(a, b).sum().backward()
    assert not np.shares_memory(a.grad, a.data)
    assert not np.shares_memory(b.grad, a.data)
    assert not np.shares_memory(a.grad, b.grad)


def test_inputs_and_saved_arrays_are_not_changed_by_backward():
    a, b = leaf(3, 3), leaf(3, 3, seed=5)
    before = a.numpy().copy(), b.numpy().copy()
    h = (a * b).tanh()
    value = h.numpy().copy()
    (h @ a + h * h).softmax().sum().backward()
    for now, then in zip((a.numpy(), b.numpy(), h.numpy()), (*before, value), strict=True):
        np.testing.assert_array_equal(now, then)


def test_leaf_gradients_have_the_dtype_and_shape_of_the_leaf():
    a, b = leaf(3, dtype=np.float32), leaf(2, 3, dtype=np.float64)
    (a * b).sum().backward()
    assert (a.grad.dtype, a.grad.shape) == (np.float32, (3,))
    assert (b.grad.dtype, b.grad.shape) == (np.float64, (2, 3))
    np.testing.assert_allclose(a.grad, b.numpy().sum(0), rtol=1e-6)


# --- what is refused ----------------------------------------------------------------------------------------------


def test_a_second_backward_raises_and_names_the_op():
    a = leaf(3)
    loss = a.tanh().sum()
    loss.backward()
    grad = a.grad.copy()
    with pytest.raises(RuntimeError, match=r"already walked Sum.*run the forward again"):
        loss.backward()
    np.testing.assert_array_equal(a.grad, grad)


def test_a_backward_into_a_spent_part_of_the_graph_raises_and_changes_nothing():
    a, b = leaf(3), leaf(3)
    h = a.tanh()
    h.sum().backward()
    grad = a.grad.copy()
    with pytest.raises(RuntimeError, match="already walked Tanh"):
        (h * b).sum().backward()
    np.testing.assert_array_equal(a.grad, grad)
    assert b.grad is None


def test_backward_of_more_than_one_element_needs_a_gradient():
    with pytest.raises(RuntimeError, match=r"shape \(3,\) needs a gradient of that shape; or sum\(\) it"):
        (leaf(3) * 2).backward()


@pytest.mark.parametrize(
    ("grad", "message"),
    [
        (np.ones(2), r"the given gradient is \(2,\) float64, but must be \(3,\) float64"),
        (np.ones(3, np.float32), r"the given gradient is \(3,\) float32, but must be \(3,\) float64"),
        (2.0, "the given gradient is a float, not an array"),
    ],
)
def test_a_given_gradient_of_the_wrong_kind_is_refused(grad, message):
    with pytest.raises(RuntimeError, match=message):
        (leaf(3) * 2).backward(grad)


def test_backward_without_a_graph_raises():
    with pytest.raises(RuntimeError, match="requires a gradient"):
        tensor([1.0]).backward()
    with no_grad():
        y = leaf() * 2
    with pytest.raises(RuntimeError, match="no_grad"):
        y.backward()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda dy: dy[:1], r"Twice.backward: the gradient of input 0 is \(1,\) float64, but must be \(3,\) float64"),
        (lambda dy: dy.astype(np.float32), r"Twice.backward: the gradient of input 0 is \(3,\) float32, but must be"),
        (lambda dy: None, "Twice.backward: the gradient of input 0 is None, not an array"),
        (lambda dy: 2.0, "Twice.backward: the gradient of input 0 is a float, not an array"),
        (lambda dy: (dy, dy), "Twice.backward returned 2 gradients for 1 inputs"),
        (lambda dy: (), "Twice.backward returned 0 gradients for 1 inputs"),
        (lambda dy: [2 * dy], "Twice.backward returned a list; expected the array of its one input"),
    ],
)
def test_a_wrong_gradient_of_an_op_is_named(wrong, message):
    y = Twice.apply(leaf(3) * 1.0, wrong=wrong)
    with pytest.raises(RuntimeError, match=message):
        y.sum().backward()


def test_the_wrong_gradients_input_is_numbered():
    y = Twice.apply(leaf(3), leaf(2), wrong=lambda dy: (2 * dy, dy))
    with pytest.raises(RuntimeError, match=r"input 1 is \(3,\) float64, but must be \(2,\)"):
        y.sum().backward()


def test_none_is_a_gradient_for_an_input_that_wants_none():
    a, constant = leaf(3), tensor(noise(3))
    Twice.apply(a, constant, wrong=lambda dy: (2 * dy, None)).sum().backward()
    np.testing.assert_array_equal(a.grad, [2, 2, 2])


@pytest.mark.parametrize("data", [[1, 2], np.array([True]), np.arange(3, dtype=np.uint8)])
def test_integers_and_booleans_have_no_gradient(data):
    with pytest.raises(TypeError, match="only a floating tensor can require a gradient"):
        tensor(data, requires_grad=True)
    with pytest.raises(TypeError, match="only a floating tensor can require a gradient"):
        tensor(data).requires_grad_()


def test_a_failed_backward_leaves_no_sums_behind():
    x = tensor([0.0, 0.0], requires_grad=True)
    h = x + 1
    a = h * 2
    z = a + (h - 1).sqrt()
    with pytest.raises(FloatingPointError), detect_anomaly():
        z.backward(np.ones(2, np.float32))
    assert x.grad is None
    a.backward(np.ones(2, np.float32))
    np.testing.assert_array_equal(x.grad, [2, 2])


def test_an_interrupted_backward_leaves_every_gradient_as_it_was():
    def interrupted(dy):
        raise KeyboardInterrupt

    a, b = leaf(3), leaf(3, seed=1)
    a.grad = np.ones(3)
    h = Twice.apply(b, wrong=interrupted)
    with pytest.raises(KeyboardInterrupt):
        (a * h).sum().backward()  # a has had its gradient by then
    np.testing.assert_array_equal(a.grad, [1, 1, 1])
    assert b.grad is None


def test_threads_that_share_a_leaf_lose_no_update():
    a = leaf(1000)
    in_threads(*[lambda: [(a * 1.0).sum().backward() for _ in range(100)]] * 4)
    np.testing.assert_array_equal(a.grad, np.full(1000, 400.0))


def test_only_leaves_can_be_deep_copied():
    a = leaf(3)
    a.grad = np.ones(3)
    b = copy.deepcopy(a)
    assert b.requires_grad
    assert not np.shares_memory(a.data, b.data)
    assert not np.shares_memory(a.grad, b.grad)
    y = a
    for _ in range(2000):
        y = y * 1.0
    with pytest.raises(RuntimeError, match=r"only leaves can be deep-copied; .* made by Mul"):
        copy.deepcopy(y)


@pytest.mark.parametrize("change", ["input 0", "input 1", "output"])
def test_detect_anomaly_names_the_op_whose_saved_array_was_changed(change):
    a, b = leaf(3), leaf(3, seed=1)
    with detect_anomaly():
        y = a * b
        z = y.exp()
        {"input 0": a, "input 1": b, "output": z}[change].data *= 2
        expected = rf"Exp: its {change}" if change == "output" else rf"Mul: its {change}"
        with pytest.raises(RuntimeError, match=expected + r" \(3,\) float64 cpu, saved for backward, was changed"):
            z.sum().backward()


def test_detect_anomaly_finds_a_changed_index():
    a, ids = leaf(3), np.array([0, 1])
    with detect_anomaly():
        y = a[ids].sum()
        ids[:] = 2
        with pytest.raises(RuntimeError, match=r"Index: .* saved for backward, was changed in place"):
            y.backward()


def test_requires_grad_is_for_leaves():
    with pytest.raises(RuntimeError, match=r"made by Tanh \(detach\(\) it first\)"):
        leaf(3).tanh().requires_grad_()


# --- recording ----------------------------------------------------------------------------------------------------


def test_no_grad_records_nothing_and_saves_nothing():
    a = leaf(3)
    ops_made = []

    class Watched(Op):
        def forward(self, x):
            self.save(x)
            ops_made.append(self)
            return x + 1

        def backward(self, dy):
            return dy

    with no_grad():
        assert not is_grad_enabled()
        y = Watched.apply(a)
    assert is_grad_enabled()
    assert y.op is None
    assert not y.requires_grad
    assert ops_made[0].saved == ()
    assert Watched.apply(a).op.saved == (a.data,)


def test_nothing_is_saved_for_inputs_that_need_no_gradient():
    x, w = tensor(noise(4, 3)), leaf(2, 3)
    assert (x * x).op is None
    saved = ops.linear(x, w).op.saved  # only the weight wants one, so only x is kept
    assert [s is not None for s in saved] == [True, False]
    saved = ops.mul(leaf(3), tensor(noise(3))).op.saved
    assert [s is not None for s in saved] == [False, True]
    saved = ops.matmul(tensor(noise(2, 4)), x := leaf(4, 3)).op.saved
    assert [s is not None for s in saved] == [True, False]
    assert ops.add(x, 1.0).op.saved == ()


def test_no_grad_and_enable_grad_nest_and_end_with_an_exception():
    with no_grad():
        with enable_grad():
            assert is_grad_enabled()
            with no_grad():
                assert not is_grad_enabled()
            assert is_grad_enabled()
        assert not is_grad_enabled()
    with pytest.raises(KeyError), no_grad():
        raise KeyError
    assert is_grad_enabled()


def test_no_grad_as_a_decorator():
    @no_grad()
    def countdown(n):
        assert not is_grad_enabled()
        return n if n == 0 else countdown(n - 1)

    assert countdown(3) == 0
    assert is_grad_enabled()

    @no_grad()
    def fails():
        raise KeyError

    with pytest.raises(KeyError):
        fails()
    assert is_grad_enabled()


def test_detach_cuts_the_graph_and_shares_the_memory():
    a = leaf(3)
    h = a * 2
    d = h.detach()
    assert d.data is h.data
    assert d.is_leaf
    assert not d.requires_grad
    (h * d).sum().backward()
    np.testing.assert_allclose(a.grad, 2 * h.numpy())


# --- threads ------------------------------------------------------------------------------------------------------


def in_threads(*functions):
    """Run the functions at once, each in a thread of its own; raises what they raised."""
    errors = []

    def run(f):
        try:
            f()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(f,)) for f in functions]
    for t in threads:
        t.start()
    for t in threads:
        t.join(20)
    assert not any(t.is_alive() for t in threads)
    if errors:
        raise errors[0]


def test_recording_is_per_thread():
    meet = threading.Barrier(2, timeout=10)

    def off():
        with no_grad():
            meet.wait()
            assert (leaf() * 2).op is None
            meet.wait()

    def on():
        meet.wait()
        assert is_grad_enabled()
        assert (leaf() * 2).op is not None
        meet.wait()

    in_threads(off, on)
    with no_grad():
        in_threads(lambda: leaf().backward())  # a new thread records, whatever its parent does


def test_one_decorated_function_in_two_threads_restores_each_threads_own_state():
    """The decorator must not restore one thread's state in another thread."""
    meet = threading.Barrier(2, timeout=10)

    @no_grad()
    def work(first):
        if first:
            meet.wait()  # inside before the other enters ...
        meet.wait()
        if not first:
            meet.wait()  # ... and outside before the other leaves

    def recording():
        work(True)
        assert is_grad_enabled()
        meet.wait()

    def not_recording():
        with no_grad():
            meet.wait()
            work(False)
            assert not is_grad_enabled()

    in_threads(recording, not_recording)


def test_two_threads_each_run_a_tape_of_their_own():
    def train(seed):
        a, b = leaf(20, seed=seed), leaf(20, seed=seed + 1)
        for _ in range(200):
            ((a * b).tanh() + a).sum().backward()
        np.testing.assert_allclose(
            a.grad, 200 * (b.numpy() / np.cosh(a.numpy() * b.numpy()) ** 2 + 1), rtol=1e-9, atol=1e-9
        )

    in_threads(lambda: train(1), lambda: train(2), lambda: train(3))


# --- memory -------------------------------------------------------------------------------------------------------


@pytest.fixture
def no_collector():
    """With the garbage collector off, only objects outside reference cycles are freed."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def a_graph():
    """(leaf, loss, weak references to every node and every saved array)."""
    a = leaf(50)
    hidden = [a]
    for f in (lambda x: x * x, lambda x: x.tanh(), lambda x: x + a, lambda x: x.exp(), lambda x: x.softmax()):
        hidden.append(f(hidden[-1]))
    loss = ops.cross_entropy((hidden[-1] * hidden[-2]).reshape(5, 10), np.arange(5))
    nodes = [h.op for h in hidden[1:]] + [loss.op]
    arrays = [s for op in nodes for s in op.saved if isinstance(s, np.ndarray) and s is not a.data]
    assert len(arrays) >= 4
    return a, loss, [weakref.ref(x) for x in nodes], [weakref.ref(x) for x in arrays]


@pytest.mark.usefixtures("no_collector")
def test_backward_releases_nodes_and_saved_arrays():
    _a, loss, nodes, arrays = a_graph()
    loss.backward()
    assert [r for r in arrays if r() is not None] == []
    assert [r() for r in nodes if r() is not None] == [loss.op]  # the loss is still held, and its empty node


@pytest.mark.usefixtures("no_collector")
def test_deleting_the_loss_releases_the_graph_without_a_backward():
    _a, loss, nodes, arrays = a_graph()
    del loss
    assert [r for r in nodes + arrays if r() is not None] == []


@pytest.mark.usefixtures("no_collector")
def test_outputs_that_nobody_holds_are_not_kept_alive_by_the_graph():
    """Nodes hold what backward needs, never their outputs."""
    a = leaf(50)
    h = a + 1.0
    output = weakref.ref(h.data)
    y = (h + 2.0).sum()
    del h
    assert output() is None
    y.backward()


@pytest.mark.usefixtures("no_collector")
@pytest.mark.parametrize("outputs_held", [True, False])
def test_memory_falls_while_backward_walks(outputs_held):
    """When a node's backward runs, the saved arrays and gradients of newer nodes are already released."""
    alive = []
    saved, grads = [], []

    class Watched(Op):
        def forward(self, x):
            y = x + 0.0
            self.save(y)
            saved.append(weakref.ref(y))
            return y.copy()

        def backward(self, dy):
            alive.append((sum(r() is not None for r in saved), sum(r() is not None for r in grads)))
            dx = dy * 1.0
            grads.append(weakref.ref(dx))
            return dx

    hidden = [leaf(10)]
    for _ in range(10):
        hidden.append(Watched.apply(hidden[-1]))
    y = hidden[-1].sum()
    if not outputs_held:
        hidden.clear()
    y.backward()
    assert [n for n, _ in alive] == list(range(10, 0, -1))
    assert max(n for _, n in alive) <= 1


@pytest.mark.usefixtures("no_collector")
def test_a_gradient_that_was_added_to_another_is_gone_before_the_next_node_runs():
    grads, alive = [], []

    class Watched(Op):
        def forward(self, x):
            return x + 0.0

        def backward(self, dy):
            alive.append(sum(r() is not None for r in grads))
            dx = dy * 1.0
            grads.append(weakref.ref(dx))
            return dx

    h = Watched.apply(leaf(10) * 1.0)
    (Watched.apply(h) + Watched.apply(h) + Watched.apply(h)).sum().backward()
    assert max(alive) <= 1


@pytest.mark.usefixtures("no_collector")
def test_a_training_step_of_the_gpt_makes_no_reference_cycle():
    model = GPT(GPTConfig(vocab_size=7, block_size=8, n_layer=1, n_head=2, n_embd=8, dropout=0.1))
    ids = np.arange(8).reshape(1, 8) % 7
    for _ in range(2):  # what numba makes once, when a loop is first called
        model.loss(ids, ids).backward()
        model.generate(ids, 2)
    gc.collect()
    loss = model.loss(ids, ids)
    node = weakref.ref(loss.op)
    loss.backward()
    model.generate(ids, 2)
    del loss
    assert node() is None
    assert gc.collect() == 0


@pytest.mark.usefixtures("no_collector")
def test_a_failed_op_leaves_nothing_behind():
    a = leaf(50) * 1.0
    node = weakref.ref(a.op)
    with pytest.raises(ValueError, match="MatMul"):
        a @ leaf(3, 3)
    gc.collect()  # the traceback itself is a cycle
    del a
    assert node() is None


def test_no_leak_over_1_000_training_steps():
    w, b = leaf(8, 8), leaf(8)
    optimizer = AdamW([tinylm.nn.Parameter(w.data), tinylm.nn.Parameter(b.data)])
    w, b = optimizer.parameters()
    x = tensor(noise(4, 8))

    def steps(n):
        for _ in range(n):
            optimizer.zero_grad()
            ops.linear(x, w, b).gelu().softmax().sum(axis=1).mean().backward()
            optimizer.step()
        gc.collect()
        return tracemalloc.get_traced_memory()[0], len(gc.get_objects())

    tracemalloc.start()
    try:
        steps(20)
        before = steps(20)
        after = steps(1000)
    finally:
        tracemalloc.stop()
    assert after[0] - before[0] < 100_000  # bytes: one forgotten node a step would be several times as much
    assert after[1] - before[1] < 100


# --- what apply takes ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("x", ["text", [1.0], {}, 1j])
def test_apply_refuses_what_is_no_tensor_array_or_number(x):
    with pytest.raises(TypeError, match=rf"Add takes Tensors, arrays and numbers, not {type(x).__name__}"):
        ops.add(leaf(1), x)


def test_arrays_that_are_mapped_files_are_arrays_like_others(tmp_path):
    mapped = np.memmap(tmp_path / "array", np.float64, "w+", shape=(3,))
    mapped[:] = [1, 2, 3]
    a = leaf(3)
    (tensor(mapped) * a + tensor(mapped)).sum().backward()
    np.testing.assert_array_equal(a.grad, [1, 2, 3])


def test_scalars_do_not_change_the_dtype():
    a = leaf(2, dtype=np.float32)
    for y in (a * 2.0, 2 * a, a + np.float64(1), np.float64(3) * a, a / 3, 1 - a, a**2):
        assert y.dtype == np.float32


def test_errors_inside_an_op_name_it_and_its_inputs():
    with pytest.raises(
        ValueError, match=r"Add.forward\(\(2,\) float64 cpu, \(3,\) float64 cpu\), line \d+ of .*arith.py"
    ):
        leaf(2) + leaf(3)


def returned(y):
    class Student(Op):
        def forward(self, x):
            return y(x)

        def backward(self, dy):
            return dy

    return Student


@pytest.mark.parametrize(
    ("y", "what"),
    [
        (lambda x: None, "None"),
        (lambda x: 1.0, "a float"),
        (lambda x: [x], "a list"),
        (lambda x: tensor(x), "a Tensor"),
        (lambda x: (x, None), "None"),
        (lambda x: (), "an empty tuple"),
        (lambda x: "text", "a str"),
    ],
)
def test_a_forward_that_returns_no_array_is_named_with_its_file_and_line(y, what):
    student = returned(y)
    line = student.forward.__code__.co_firstlineno
    expected = rf"Student.forward returned {what}; expected an array[^$]*, line {line} of .*test_autograd.py"
    for context in (no_grad(), enable_grad()):
        with context, pytest.raises(TypeError, match=expected):
            student.apply(leaf(3))


@pytest.mark.parametrize("error", [ValueError("of mine"), KeyError("k"), ZeroDivisionError("z"), AttributeError("a")])
def test_an_error_inside_either_half_keeps_its_type_and_names_the_op(error):
    class Fails(Op):
        def forward(self, x):
            if self.forwards:
                raise error
            return x * 1.0

        def backward(self, dy):
            raise error

    def notes(function):
        error.__notes__ = []
        with pytest.raises(type(error)) as caught:
            function()
        assert caught.value is error
        return error.__notes__

    (note,) = notes(lambda: Fails.apply(leaf(3), forwards=True))
    assert re.search(r"in Fails.forward\(\(3,\) float64 cpu\), line \d+ of .*test_autograd.py", note)
    y = Fails.apply(leaf(3), forwards=False).sum()
    (note,) = notes(y.backward)
    assert re.search(r"in Fails.backward\(\(3,\) float64 cpu\), line \d+ of .*test_autograd.py", note)


@pytest.mark.parametrize("x", [2.0, None, np.float64(2)])
def test_an_op_wants_one_tensor_or_array(x):
    with pytest.raises(TypeError, match=r"Exp needs a Tensor or an array among its inputs, not (2.0|None)"):
        ops.exp(x)


def test_an_op_without_its_halves_says_so():
    class Half(Op):
        def forward(self, x):
            return x + 1

    with pytest.raises(NotImplementedError, match="Half has no backward"):
        Half.apply(leaf()).backward()
    with pytest.raises(NotImplementedError, match="Op has no forward"):
        Op.apply(leaf())


# --- retain_grad ------------------------------------------------------------------------------------------------


def retained(make, leaf):
    """The gradients of every tensor of a small graph, retained where an op made it: a, b, the parts of b, loss."""
    x = leaf([[1.0, -2.0], [3.0, 4.0]])
    a = x * x
    b = a * 3 + a
    left, right = make(b)
    loss = (left * right * right).sum()
    for t in (x, a, a, b, left, right, loss):
        t.retain_grad()
    loss.backward()
    return [t.grad for t in (x, a, b, left, right, loss)]


def test_retain_grad_is_pytorchs(device):
    ours = retained(lambda b: b.split(1, axis=1), device.leaf)
    theirs = retained(lambda b: b.split(1, dim=1), lambda x: torch.tensor(x, requires_grad=True))
    for got, expected in zip(ours, theirs, strict=True):
        assert_close(got, expected)


def test_a_retained_gradient_is_the_tensors_own(device):
    """Add passes dy on to both inputs, as the same array: changing one gradient must not change another."""
    x, w = device.leaf([1.0, 2.0]), device.leaf([5.0, 6.0])
    y = x * 2
    z = y + w
    for t in (y, z):
        t.retain_grad()
    z.backward(device.array([1.0, 1.0], np.float32))
    y.grad *= 7
    z.grad *= 9
    assert_close(w.grad, [1.0, 1.0])
    assert_close(x.grad, [2.0, 2.0])
    assert_close(z.grad, [9.0, 9.0])


def test_an_output_that_the_loss_ignores_retains_no_gradient(device):
    """As in PyTorch: None, not zeros."""
    for x in (device.leaf([1.0, 2.0, 3.0]), torch.tensor([1.0, 2.0, 3.0], requires_grad=True)):
        left, middle, right = (x * 1).split(1)
        for t in (left, middle, right):
            t.retain_grad()
        (middle * 2).sum().backward()
        assert left.grad is right.grad is None
        assert middle.grad.tolist() == [2.0]


def test_without_retain_grad_only_leaves_have_a_gradient(device):
    x = device.leaf([1.0])
    y = x * 2
    y.sum().backward()
    assert y.grad is None
    assert x.grad is not None


def test_retain_grad_needs_a_gradient_and_keeps_nothing_alive():
    with pytest.raises(RuntimeError, match="retain_grad needs a tensor that requires a gradient"):
        tinylm.tensor([1.0]).retain_grad()
    x = tinylm.tensor([1.0], requires_grad=True)
    y = x * 2
    y.retain_grad()
    gone, z = weakref.ref(y), y * 3
    del y
    assert gone() is None
    z.backward()
    assert_close(x.grad, [6.0])


def test_a_backward_that_fails_retains_nothing(device):
    class Broken(Op):
        def forward(self, x):
            return x.copy()

        def backward(self, dy):
            raise KeyError("lost")

    x = device.leaf([1.0])
    y = Broken.apply(x) * 2
    y.retain_grad()
    with pytest.raises(KeyError):
        y.backward()
    assert y.grad is None


def test_retain_grad_outside_and_at_the_border_of_a_checkpoint(device):
    x = device.leaf([1.0, 2.0])
    before = x * 2
    after = tinylm.recompute.checkpoint(lambda x: x * x, before)
    for t in (before, after):
        t.retain_grad()
    (after * 3).sum().backward()
    assert_close(after.grad, [3.0, 3.0])
    assert_close(before.grad, [12.0, 24.0])


def test_a_gradient_of_a_wrong_kind_that_a_leaf_already_has_is_named_and_no_leaf_is_changed():
    x, y = (tensor([1.0, 2.0], requires_grad=True) for _ in range(2))
    y.grad = np.zeros(3, np.float32)
    with pytest.raises(RuntimeError, match="the gradient that a leaf already has"):
        (x * y).sum().backward()
    assert x.grad is None
    np.testing.assert_array_equal(y.grad, np.zeros(3))


def test_the_first_op_of_a_process_has_a_gradient():
    program = "from tinylm import tensor\nx = tensor([3.0], requires_grad=True)\n(x * x).backward()\nprint(x.grad)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.stderr) == ("[6.]\n", "")


def test_the_first_value_that_is_not_finite_is_named_by_its_place():
    x = tensor([[1.0, 2.0], [0.0, 0.0]], requires_grad=True)
    told = r"2 of 4 values are not finite, the first at index \(1, 0\)$"
    with np.errstate(divide="ignore"), pytest.raises(FloatingPointError, match=told), detect_anomaly():
        1 / x
