"""Which implementation runs: an override, a twin of the engines in force, or the reference."""

import inspect
import sys
import threading
from functools import partial

import numpy as np
import pytest
from helpers import normal

from tinylm import (
    GPT,
    GPTConfig,
    Op,
    engines,
    no_grad,
    ops,
    optim,
    override,
    precision,
    random,
    recompute,
    reference_only,
    registry,
    tensor,
)
from tinylm.ops.arith import Mul
from tinylm.ops.attention import CausalAttention
from tinylm.ops.cross_entropy import CrossEntropy
from tinylm.ops.gelu import Gelu
from tinylm.ops.layer_norm import LayerNorm
from tinylm.ops.linear_cross_entropy import LinearCrossEntropy
from tinylm.ops.matmul import Linear, MatMul, product
from tinylm.ops.softmax import LogSoftmax, Softmax
from tinylm.parallel import Workers
from tinylm.registry import engines_in_force, fused, set_default_engines
from tinylm.training import TrainConfig, TrainState, train


class Triple(Op):
    """3x. The tests replace it by classes that answer something else, so that one sees which ran."""

    def forward(self, x):
        return x * 3

    def backward(self, dy):
        return dy * 3


def times(factor, of=Triple, **attributes):
    """A class that multiplies by `factor`, forward and backward."""
    halves = {"forward": lambda self, x: x * factor, "backward": lambda self, dy: dy * factor}
    return type(f"Times{factor}", (of,), {**halves, **attributes})


def copy_of(op):
    """A class that stands in for `op` and computes the same."""
    return type("Copy", (op,), {"forward": op.forward, "backward": op.backward})


def factor(x=2.0):
    """The factor of the class that is in force for `x`."""
    return Triple.apply(tensor(np.array(x))).item() / x


def in_a_thread(function):
    found = []
    thread = threading.Thread(target=lambda: found.append(function()))
    thread.start()
    thread.join(20)
    return found[0]


@pytest.fixture(autouse=True)
def _restored(monkeypatch):
    """What a test registers or makes the default is gone after it."""
    twins = {op: {name: list(each) for name, each in by.items()} for op, by in registry._twins.items()}
    monkeypatch.setattr(registry, "_twins", twins)
    monkeypatch.setattr(registry, "_default", ())


# --- engines --------------------------------------------------------------------------------------------------------


def test_a_twin_runs_where_its_engine_is_in_force():
    assert fused(Triple, engine="a")(twin := times(10)) is twin
    assert factor() == 3
    with engines("a"):
        x = tensor([2.0], requires_grad=True)
        y = Triple.apply(x)
        with no_grad():
            assert factor() == 10
    assert factor() == 3
    y.backward()
    assert type(y.op) is twin  # a graph keeps the class that it was recorded with
    assert (y.item(), x.grad.item()) == (20, 10)


@pytest.mark.parametrize(
    ("names", "expected"),
    [((), 3), (("a",), 10), (("b",), 20), (("a", "b"), 10), (("b", "a"), 20), (("c", "b"), 20), (("empty", "a"), 10)],
)
def test_the_first_engine_in_force_whose_twin_supports_the_inputs_runs(names, expected):
    fused(Triple, engine="a")(times(10))
    fused(Triple, engine="b")(times(20))
    fused(Triple, engine="c")(times(30, supports=classmethod(lambda cls, x: x.dtype == np.float32)))
    fused(Softmax, engine="empty")(times(40, of=Softmax))
    with engines(*names):
        assert engines_in_force() == names
        assert factor() == expected
        assert factor(np.float32([2])).item() == (30 if "c" in names else expected)


def test_the_newest_twin_of_an_engine_that_supports_the_inputs_runs():
    for each in (times(10), times(20), times(30, supports=classmethod(lambda cls, x: False))):
        fused(Triple, engine="a")(each)
    with engines("a"):
        assert factor() == 20


def test_supports_sees_raw_arrays_and_the_parameters():
    seen = []
    declines = classmethod(lambda cls, *arrays, **params: seen.append((arrays, params)))
    fused(Softmax, engine="a")(times(1, of=Softmax, supports=declines))
    x = tensor([[1.0, 2.0]])
    with engines("a"):
        ops.softmax(x, axis=0)
    (((array,), params),) = seen
    assert array is x.data
    assert params == {"axis": 0}


def test_float16_reaches_the_twins_that_support_it():
    fused(Triple, engine="a")(times(10, supports=classmethod(lambda cls, x: x.dtype != np.float16)))
    fused(Triple, engine="b")(times(20))
    x = tensor([2.0], dtype=np.float16, requires_grad=True)
    with engines("a", "b"):
        y = Triple.apply(x)
    y.backward()
    assert (y.item(), y.dtype, type(y.op).__name__, x.grad.item()) == (40, np.float16, "Times20", 20)


def test_the_default_engines_are_in_force_in_every_thread_where_no_block_says_otherwise():
    fused(Triple, engine="a")(times(10))
    fused(Triple, engine="b")(times(20))
    set_default_engines("a")
    assert (factor(), in_a_thread(factor), in_a_thread(engines_in_force)) == (10, 10, ("a",))
    with engines("b"):
        assert (factor(), in_a_thread(factor)) == (20, 10)
        set_default_engines()  # a block goes before it
        assert (factor(), in_a_thread(factor)) == (20, 3)
    assert factor() == 3


def test_an_engine_of_which_nothing_is_registered_is_refused():
    fused(Triple, engine="a")(times(10))
    set_default_engines("a")
    for refused in (engines, set_default_engines):
        with pytest.raises(ValueError, match=r"engine 'c' is not loaded \(loaded are a, .*composed.*fused.load\(\)"):
            refused("a", "c")
    assert (engines_in_force(), factor()) == (("a",), 10)


def test_reference_only_switches_twins_off_and_nests():
    fused(Triple, engine="a")(times(10))
    set_default_engines("a")
    with reference_only():
        assert (factor(), engines_in_force()) == (3, ())
        with engines("a"):
            assert factor() == 10
        with reference_only():
            assert factor() == 3
        assert factor() == 3
    with pytest.raises(KeyError), reference_only():
        raise KeyError
    assert factor() == 10


# --- override: an op ------------------------------------------------------------------------------------------------


def test_an_override_goes_before_every_engine_and_is_not_asked_what_it_supports():
    fused(Triple, engine="a")(times(10))
    with override(Triple, times(7, supports=classmethod(lambda cls, x: False))), engines("a"):
        assert factor() == 7
        with reference_only(), no_grad():
            assert factor() == 7
        assert in_a_thread(factor) == 3  # a thread of one's own has the defaults; workers have their caller's
    assert factor() == 3


def test_overrides_nest_and_end_with_an_error():
    with override(Triple, times(7)):
        with override(Triple, times(8)):
            assert factor() == 8
        assert factor() == 7
        with pytest.raises(KeyError), override(Triple, times(9)):
            raise KeyError
        assert factor() == 7
    assert factor() == 3


def test_a_replacement_of_a_helper_alone_runs_with_the_references_halves():
    class Doubled(LinearCrossEntropy):
        def loss_and_slope(self, z, t, share, counted):
            return 2 * super().loss_and_slope(z, t, share, counted)

    inputs = tensor(normal(4, 3), requires_grad=True), tensor(normal(5, 3)), np.arange(4)
    plain = ops.linear_cross_entropy(*inputs).item()
    with override(LinearCrossEntropy, Doubled) as doubled:
        loss = ops.linear_cross_entropy(*inputs)
        loss.backward()
    assert loss.item() == 2 * plain
    assert (doubled.forward_calls, doubled.backward_calls) == (1, 1)
    fused(LinearCrossEntropy, engine="a")(Doubled)
    with engines("a"):
        assert ops.linear_cross_entropy(*inputs).item() == 2 * plain


@pytest.mark.parametrize(
    "wrong",
    [
        type("NoSubclass", (Op,), {"forward": lambda self, x: x, "backward": lambda self, dy: dy}),
        type("ForwardAlone", (Triple,), {"forward": lambda self, x: x}),
        type("BackwardAlone", (Triple,), {"backward": lambda self, dy: dy}),
        type("ForwardAndHelper", (Triple,), {"forward": lambda self, x: x, "save": lambda self, x: None}),
        type("Nothing", (Triple,), {}),
        type("SomethingElse", (Triple,), {"new": 1, "__doc__": "nothing that Triple has"}),
        type("InheritsBoth", (times(7),), {}),
    ],
)
def test_a_class_that_is_no_replacement_is_refused(wrong):
    message = rf"{wrong.__name__} must subclass Triple and define both forward and backward, or only a helper"
    with pytest.raises(TypeError, match=message):
        fused(Triple, engine="a")(wrong)
    with pytest.raises(TypeError, match=message):
        override(Triple, wrong)
    assert Triple not in registry._twins


@pytest.mark.parametrize(
    ("target", "replacement", "message"),
    [
        (Triple, lambda x: x, "<lambda> must subclass Triple"),
        (Triple, 3, "3 must subclass Triple"),
        (len, max, "override takes an op or one of tinylm's replaceable functions, not <built-in function len>"),
        ("Triple", times(7), "override takes an op .* not 'Triple'"),
        (ops.gelu, lambda x: x, "override takes an op .* not <function gelu"),
        (optim.adamw, 3, "adamw must be replaced by a function, not 3"),
    ],
)
def test_what_cannot_be_replaced_or_replace_is_refused(target, replacement, message):
    with pytest.raises(TypeError, match=message):
        override(target, replacement)


# --- the handle: exact counts ---------------------------------------------------------------------------------------


def test_a_handle_counts_calls_forward_and_backward():
    with override(Triple, times(7)) as handle:
        x = tensor([1.0], requires_grad=True)
        a, b, _ = (Triple.apply(x) for _ in range(3))
        with no_grad():
            Triple.apply(x)
        (a + b).sum().backward()
        assert (handle.forward_calls, handle.backward_calls) == (4, 2)
        later = Triple.apply(x)
    Triple.apply(x).backward()  # outside: neither is counted
    assert (handle.forward_calls, handle.backward_calls) == (5, 2)
    later.backward()  # recorded inside
    assert (handle.forward_calls, handle.backward_calls) == (5, 3)
    with handle:
        factor()
    assert handle.forward_calls == 6


def test_of_two_overrides_of_one_op_each_counts_its_own_calls():
    with override(Triple, times(7)) as outer:
        factor()
        with override(Triple, times(8)) as inner:
            factor()
            factor()
    assert (outer.forward_calls, inner.forward_calls) == (1, 2)


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("recomputed", [0, 1])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_counts_are_exact_over_workers_and_recomputation(threads, recomputed, dtype):
    model = GPT(GPTConfig(11, 8, n_layer=3, n_head=2, n_embd=8, recompute=recomputed))
    ids = np.arange(6 * 8).reshape(6, 8) % 11

    def work(rank, each):
        for i in range(*workers.share(6, rank).indices(6)):
            with precision.autocast(dtype):
                loss = each.loss(ids[i : i + 1], ids[i : i + 1])
            loss.backward()

    handles = override(Gelu, copy_of(Gelu)), override(Softmax, copy_of(Softmax))
    with handles[0], handles[1], engines("composed"), Workers(model, threads) as workers:
        workers.gradient(work)
    again = 2 if recomputed else 0  # the last block is not
    for handle in handles:
        assert (handle.forward_calls, handle.backward_calls) == (6 * (3 + again), 6 * 3)


# --- functions ------------------------------------------------------------------------------------------------------

FUNCTIONS = [
    product,
    optim.adamw,
    optim.clip_grad_norm_,
    optim.warmup_cosine,
    precision.unscale,
    recompute.checkpoint,
]


def test_these_functions_are_replaceable():
    found = set()
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] == "tinylm":
            found |= {f for f in vars(module).values() if inspect.isfunction(f) and hasattr(f, "supports")}
    twins = {twin for by in registry._twins.values() for each in by.values() for twin in each}
    functions = {*FUNCTIONS, optim.sgd}
    assert found - twins == functions
    for function in functions:
        assert function.__doc__ == function.__wrapped__.__doc__
        assert inspect.signature(function) == inspect.signature(function.__wrapped__)


def trained():
    """What five steps that use all of them do."""
    tokens = np.arange(100) % 7
    random.seed(0)
    model = GPT(GPTConfig(7, 8, n_layer=2, n_head=2, n_embd=8, recompute=1))
    config = TrainConfig(steps=5, batch_size=2, lr=0.01, warmup=2, clip=0.1, dtype="float16")
    steps = [(s.loss, s.lr, s.grad_norm) for s in train(TrainState(model, config), tokens, tokens[:20])]
    return steps, [p.data.copy() for p in model.parameters()]


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda f: f.__name__)
def test_a_function_is_replaced_by_an_override_or_a_twin_and_training_calls_it(function):
    calls = []

    def mine(*args, **kwargs):
        calls.append(args)
        return function.__wrapped__(*args, **kwargs)

    with engines(), override(function, mine) as handle:
        overridden = trained()
    assert (handle.forward_calls, handle.backward_calls) == (len(calls), 0)
    assert calls
    overridden_calls, calls[:] = len(calls), []

    fused(function, engine="a")(mine)
    fused(function, engine="b", supports=lambda *args, **kwargs: False)(partial(pytest.fail, "it declined"))
    with engines("b", "a"):
        assert trained()[0] == overridden[0]
    # A twin that calls the original for the parts of a stack is asked again for each; an override is not.
    twins_calls = len(calls)
    assert twins_calls == overridden_calls if function is not product else twins_calls > overridden_calls
    (steps, weights), (steps_, weights_) = trained(), overridden
    np.testing.assert_allclose(steps_, steps, rtol=1e-6)
    for a, b in zip(weights, weights_, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)
    assert len(calls) == twins_calls


# --- a replacement that never ran -----------------------------------------------------------------------------------


def test_a_replacement_that_ran_or_a_block_that_failed_warns_of_nothing(recwarn):
    with override(Triple, times(7)):
        factor()
    with pytest.raises(KeyError), override(Triple, times(7)):
        raise KeyError
    assert not recwarn.list


@pytest.mark.parametrize(
    ("target", "replacement", "run", "told"),
    [
        (Triple, times(7), lambda: None, "Times7 replaced Triple but never ran; what ran: nothing$"),
        (Triple, times(7), lambda: ops.gelu(tensor([1.0])) + 1, "what ran: Add, Gelu$"),
        (optim.adamw, times, lambda: ops.matmul(tensor(np.eye(2)), tensor(np.eye(2))), "ran: MatMul, product$"),
        (optim.adamw, partial(times), factor, r"^functools.partial\(.*\) replaced adamw but never ran; .* Triple$"),
        (Softmax, copy_of(Softmax), lambda: in_a_thread(lambda: ops.softmax(tensor([1.0])).item()), "ran: nothing$"),
    ],
)
def test_a_replacement_that_never_ran_warns_and_tells_what_did(target, replacement, run, told):
    with pytest.warns(RuntimeWarning, match=told) as found, override(target, replacement):
        run()
    assert found[0].filename == __file__  # where the block ends


ATTENTION = [normal(1, 2, 3, 4, seed=i) for i in range(3)]
COMPOSED = {
    Linear: lambda: ops.linear(tensor(normal(2, 3)), tensor(normal(4, 3))),
    Gelu: lambda: ops.gelu(tensor(normal(3))),
    LayerNorm: lambda: ops.layer_norm(tensor(normal(2, 3)), np.ones(3), np.zeros(3)),
    CausalAttention: lambda: ops.causal_attention(*map(tensor, ATTENTION)),
    CrossEntropy: lambda: ops.cross_entropy(tensor(normal(2, 3)), np.array([0, 1])),
    LinearCrossEntropy: lambda: ops.linear_cross_entropy(tensor(normal(2, 3)), tensor(normal(4, 3)), np.array([0, 1])),
}
PARTS = [
    *[(op, part) for op, by in registry._twins.items() for twin in by.get("composed", ()) for part in twin.parts],
    (LinearCrossEntropy, LogSoftmax),  # inside CrossEntropy
    (LinearCrossEntropy, MatMul),  # inside Linear
]


def test_every_composed_op_is_tried_here():
    assert COMPOSED.keys() == {op for op, by in registry._twins.items() if "composed" in by}


@pytest.mark.parametrize(("op", "part"), PARTS, ids=lambda op: op.__name__)
def test_a_part_runs_where_its_op_is_composed_and_is_told_where_it_is_not(op, part, recwarn):
    with engines("composed"), override(part, copy_of(part)) as handle:
        COMPOSED[op]()
    assert handle.forward_calls > 0
    assert not recwarn.list
    told = f"{part.__name__} inside {op.__name__} is a part of {op.__name__}; use engine 'composed'"
    with pytest.warns(RuntimeWarning, match=told), reference_only(), override(part, copy_of(part)):
        COMPOSED[op]()


def test_a_composed_twin_of_ones_own_that_declares_no_parts_is_no_trouble():
    fused(Triple, engine="composed")(lambda x: x + x + x)
    x = tensor([1.0], requires_grad=True)
    with engines("composed"), pytest.warns(RuntimeWarning, match="what ran: Add, Triple$"), override(Mul, copy_of(Mul)):
        y = Triple.apply(x)
    y.backward()
    assert (y.item(), x.grad.item()) == (3, 3)


def test_a_replaced_function_may_call_what_it_replaces():
    with override(optim.warmup_cosine, lambda *args: 0.5 * optim.warmup_cosine(*args)) as mine:
        halved = optim.warmup_cosine(1, 10, 1e-3, 2)
    assert mine.forward_calls == 1
    assert halved == 0.5 * optim.warmup_cosine(1, 10, 1e-3, 2)


def test_the_engine_reference_is_none_and_ends_the_list():
    with engines("reference"):
        assert registry.engines_in_force() == ()
    with engines("composed", "reference", "composed"):
        assert registry.engines_in_force() == ("composed",)
