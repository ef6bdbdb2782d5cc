"""Blocks and the record that they make: a block restores its own field, in its own context, and nothing else."""

import contextvars
import threading

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tinylm import (
    GPT,
    GPTConfig,
    detect_anomaly,
    enable_grad,
    engines,
    is_grad_enabled,
    no_grad,
    ops,
    override,
    random,
    reference_only,
    registry,
    tensor,
)
from tinylm.memory import track_memory
from tinylm.ops.gelu import Gelu
from tinylm.ops.softmax import Softmax
from tinylm.parallel import Workers
from tinylm.precision import autocast
from tinylm.recompute import checkpoint
from tinylm.registry import engines_in_force
from tinylm.settings import Settings, current
from tinylm.training import TrainConfig, TrainState, train


def in_a_thread(function, *args):
    """What `function` returns in a thread of its own, where it began with the defaults."""
    found = []
    thread = threading.Thread(target=lambda: found.append(function(*args)))
    thread.start()
    thread.join(20)
    return found[0]


def mine(op):
    """A class that stands in for `op` and computes the same."""
    return type("Mine", (op,), {"forward": op.forward, "backward": op.backward})


def leave(block):
    block.__exit__(None, None, None)


@pytest.fixture(autouse=True)
def _plain():
    """A test that leaves a block in force fails itself, and does not affect the next test."""
    before = current()
    yield
    assert current() == before


# --- what a block changes, and what leaving it restores -------------------------------------------------------------

BLOCKS = {
    "no_grad": (no_grad, {"recording": False}),
    "enable_grad": (enable_grad, {"recording": True}),
    "anomaly": (detect_anomaly, {"anomaly": True}),
    "float16": (lambda: autocast("float16"), {"autocast": True}),
    "no float16": (lambda: autocast("float16", enabled=False), {"autocast": False}),
    "composed": (lambda: engines("composed"), {"engines": ("composed",)}),
    "reference": (reference_only, {"engines": ()}),
    "gelu": (lambda: override(Gelu, mine(Gelu)), {Gelu: "its own"}),
    "gelu again": (lambda: override(Gelu, mine(Gelu)), {Gelu: "its own"}),
    "softmax": (lambda: override(Softmax, mine(Softmax)), {Softmax: "its own"}),
    "tracker": (track_memory, {"tracker": "its own"}),
}
DEFAULTS = {"recording": True, "anomaly": False, "autocast": False, "engines": None, "tracker": None}


def seen():
    """This context's settings, under the names of the table above."""
    record = current()
    assert is_grad_enabled() is record.recording
    fields = {name: getattr(record, name) for name in DEFAULTS} | dict(record.overrides)
    return fields | {"autocast": fields["autocast"] is not None}


@pytest.mark.filterwarnings("ignore:Mine replaced")
@given(moves=st.lists(st.tuples(st.booleans(), st.sampled_from(sorted(BLOCKS))), max_size=25))
@example(moves=[(True, "no_grad"), (True, "enable_grad"), (True, "no_grad"), (False, "no_grad")])
def test_blocks_begin_and_end_in_any_order_and_of_two_the_later_one_holds(moves):
    """Each move begins or ends a block; ending one that is not in force changes nothing."""
    blocks = {name: make() for name, (make, _) in BLOCKS.items()}
    begun = []
    for begin, name in moves:
        if begin:
            assert blocks[name].__enter__() is blocks[name]
            begun.append(name)
        else:
            leave(blocks[name])
            if name in begun:
                del begun[len(begun) - 1 - begun[::-1].index(name)]  # the one that began last
        expected = dict(DEFAULTS)
        for each in begun:
            expected |= {key: blocks[each] if v == "its own" else v for key, v in BLOCKS[each][1].items()}
        assert seen() == expected
    for name in begun:  # the oldest first
        leave(blocks[name])
    assert current() == Settings()


@pytest.mark.parametrize("name", BLOCKS)
def test_an_error_ends_a_block_as_well(name):
    with pytest.raises(KeyError), BLOCKS[name][0]():
        raise KeyError
    assert current() == Settings()


def test_what_was_in_force_between_two_that_overlap():
    first, second = no_grad(), engines("composed")
    with first:
        second.__enter__()
    assert (is_grad_enabled(), engines_in_force()) == (True, ("composed",))  # the first took itself out alone
    leave(second)
    assert (is_grad_enabled(), engines_in_force()) == (True, registry._default)


def test_one_object_is_used_twice_within_itself_and_in_several_threads():
    block = no_grad()
    for _ in range(2):
        with block, block:
            with block:
                assert not is_grad_enabled()
            assert not is_grad_enabled()
        assert is_grad_enabled()

    meet, found = threading.Barrier(3), []

    def work():
        found.append(is_grad_enabled())
        with block:
            meet.wait(20)  # all three are inside
            found.append(is_grad_enabled())
            meet.wait(20)
        found.append(is_grad_enabled())
        meet.wait(20)

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    with block:
        meet.wait(20)
        meet.wait(20)
        meet.wait(20)  # both have left
        assert not is_grad_enabled()
    for thread in threads:
        thread.join(20)
    assert sorted(found) == [False] * 2 + [True] * 4


# --- generators and functions ---------------------------------------------------------------------------------------


def holds_no_grad():
    with no_grad():
        yield is_grad_enabled()


def test_a_generator_that_ends_in_another_context_changes_nothing_there():
    def begun_and_left():
        values = holds_no_grad()
        assert next(values) is False
        return values

    def close(values, block):
        with block:
            values.close()
            return is_grad_enabled(), engines_in_force(), len(current().blocks)

    block = no_grad()  # the same field, by another object
    plain, apart = (contextvars.Context().run(begun_and_left) for _ in range(2))
    assert in_a_thread(close, plain, block) == (False, registry._default, 1)
    with engines("composed"):
        assert close(apart, enable_grad()) == (True, ("composed",), 2)
    del plain, apart


def test_a_decorated_function_runs_inside_and_keeps_its_name():
    @no_grad()
    def recording(*args, **kwargs):
        """What it is for."""
        return is_grad_enabled(), args, kwargs

    @engines("composed")
    def fail():
        assert engines_in_force() == ("composed",)
        raise KeyError

    assert recording(1, a=2) == (False, (1,), {"a": 2})
    assert (recording.__name__, recording.__doc__) == ("recording", "What it is for.")
    with pytest.raises(KeyError):
        fail()
    assert in_a_thread(recording) == (False, (), {})
    assert current() == Settings()


def test_a_decorated_generator_function_runs_inside_and_its_caller_does_not():
    ended = []

    @no_grad()
    def values(n):
        try:
            for i in range(n):
                yield i, is_grad_enabled()
            return is_grad_enabled()
        finally:
            ended.append(is_grad_enabled())

    def outer():
        returned.append((yield from values(2)))

    returned = []
    assert [(*value, is_grad_enabled()) for value in outer()] == [(0, False, True), (1, False, True)]
    assert returned == [False]

    stopped = values(3)
    next(stopped)
    with enable_grad():
        stopped.close()
        assert is_grad_enabled()
    assert ended == [False, False]
    values(3).close()  # never begun
    assert in_a_thread(lambda: list(values(1))) == [(0, False)]


def test_a_decorated_generator_function_is_sent_values():
    @no_grad()
    def echo():
        sent = 0
        while True:
            sent = yield sent, is_grad_enabled()

    values = echo()
    assert [next(values), values.send(5), values.send(6)] == [(0, False), (5, False), (6, False)]


@pytest.mark.parametrize("calls", [0, 1])
def test_a_decorated_generator_function_warns_once_and_at_its_end(recwarn, calls):
    @override(Gelu, mine(Gelu))
    def values():
        yield None
        for _ in range(calls):
            yield ops.gelu(tensor([1.0], requires_grad=True))
        yield None

    names = [type(y.op).__name__ for y in values() if y is not None]
    assert names == ["Mine"] * calls
    assert len(recwarn.list) == 1 - calls


# --- threads and workers --------------------------------------------------------------------------------------------


def test_a_plain_thread_has_the_defaults_while_a_block_is_in_force_here(monkeypatch):
    monkeypatch.setattr(registry, "_default", ("composed",))
    with reference_only(), no_grad(), detect_anomaly(), override(Gelu, mine(Gelu)) as handle:
        assert in_a_thread(lambda: (current(), engines_in_force())) == (Settings(), ("composed",))
        ops.gelu(tensor([1.0]))
    assert handle.forward_calls == 1
    assert engines_in_force() == ("composed",)


@pytest.mark.parametrize("size", [1, 2])
def test_workers_run_in_copies_of_the_callers_context(size):
    mask = ops.dropout(tensor(np.ones(9)), 0.5).data

    def work(rank):
        found = current(), random.state(), np.geterr()["over"], ops.dropout(tensor(np.ones(9)), 0.5).data.tolist()
        random.seed(99)
        np.seterr(over="raise")
        enable_grad().__enter__()
        return found

    random.seed(0)
    with np.errstate(over="ignore"), no_grad(), engines("composed"), Workers(GPT(GPTConfig(5)), size) as workers:
        random.seed(0)
        here = current(), random.state(), np.geterr()
        for _ in range(2):  # the second time in the same threads
            for found in workers.run(work):
                assert found == (here[0], here[1], "ignore", mask.tolist())
            assert (current(), random.state(), np.geterr()) == here


TOKENS = np.arange(200) % 5


@pytest.mark.parametrize("config", [{}, {"threads": 2}, {"dtype": "float16", "accumulate": 2}])
def test_training_leaves_its_callers_context_alone(config):
    model = GPT(GPTConfig(5, 8, 2, 2, 8, dropout=0.2, recompute=1))
    config = TrainConfig(steps=2, batch_size=4, eval_every=1, **config)
    random.seed(5, 6, 7)
    with np.errstate(divide="raise"), engines("composed"), override(Softmax, mine(Softmax)) as handle:
        before = current(), random.state(), np.geterr()
        for _ in train(TrainState(model, config), TOKENS, TOKENS[:20]):
            assert (current(), random.state(), np.geterr()) == before
        assert (current(), random.state(), np.geterr()) == before
    assert handle.backward_calls > 0


def held(threads):
    """What `track_memory` counts between forward and backward, and at the peak."""
    random.seed(0)
    model = GPT(GPTConfig(11, 32, 2, 2, 16, dropout=0.1))
    ids = np.arange(8 * 32).reshape(8, 32) % 11
    meet, found = threading.Barrier(threads), []
    with track_memory(model) as m, Workers(model, threads) as workers:

        def work(rank, each):
            loss = each.loss(*[ids[workers.share(8, rank)]] * 2)
            if meet.wait(20) == 0:
                found.append(m.now)
            meet.wait(20)
            loss.backward()

        workers.gradient(work)
    return found[0], m


def test_memory_is_counted_over_all_workers():
    (one, plain), (two, several) = held(1), held(2)
    assert two.saved.keys() == one.saved.keys()
    for op, size in one.saved.items():
        assert abs(two.saved[op] - size) <= 0.05 * size + 2 * 11 * 16 * 4, op  # each worker has a gradient of the table
    assert abs(two.activations - one.activations) <= 0.03 * one.activations
    assert several.peak_activations >= two.activations
    parameters = sum(p.data.nbytes for p in plain.parameters)
    assert (plain.now.activations, several.now.activations) == (0, 0)
    assert several.now.gradients == 2 * parameters  # every worker's own


# --- recomputation: forward's settings, but backward's anomaly, tracker and errstate -------------------------------

FORWARDS = {
    "override": lambda: override(Gelu, mine(Gelu)),
    "composed": lambda: engines("composed"),
    "reference": reference_only,
    "float16": lambda: autocast("float16"),
}


@pytest.mark.parametrize("name", FORWARDS)
@pytest.mark.parametrize("backward", FORWARDS)
@pytest.mark.filterwarnings("ignore:Mine replaced Gelu but never ran")
def test_a_second_run_has_the_engines_overrides_and_casts_of_the_first(name, backward, monkeypatch):
    runs = []

    def fn(x, w):
        y = ops.gelu(ops.dropout(x, 0.2) @ w)
        chosen = registry.implementation(Gelu, current(), [y.data], {})
        runs.append((chosen, y.dtype, y.data.tobytes(), current().recording))
        return y

    monkeypatch.setattr(registry, "_default", ("composed",))
    x, w = (tensor(np.linspace(-1, 1, 9).reshape(3, 3), dtype=np.float32, requires_grad=True) for _ in range(2))
    with FORWARDS[name]() as handle:
        y = checkpoint(fn, x, w)
    loss = y.sum()
    random.seed(5)
    monkeypatch.setattr(registry, "_default", ())
    with no_grad(), FORWARDS[backward]():
        loss.backward()
    assert random.state() == (5, 0, 0)
    (first, second) = runs
    assert first[:3] == second[:3]
    assert (first[3], second[3]) == (False, True)
    replaced = handle.replacement if name == "override" else None
    ours = {"override": replaced, "reference": Gelu}.get(name, registry._twins[Gelu]["composed"][0])
    assert first[0] is ours
    assert first[1] == (np.float16 if name == "float16" else np.float32)
    if replaced:
        assert (handle.forward_calls, handle.backward_calls) == (4, 1)  # two of the calls are this test's questions
    assert x.grad is not None


def second_run_overflows():
    """A checkpointed x * 1 whose second run overflows."""
    factors = iter([1.0, 1e300])
    return checkpoint(lambda x: x * next(factors) * 1e300, tensor(np.ones(2), requires_grad=True))


ANOMALIES = pytest.mark.parametrize(
    "watch", [detect_anomaly, lambda: np.errstate(over="raise")], ids=["anomaly", "errstate"]
)


@ANOMALIES
def test_a_second_run_is_watched_as_backward_is(watch):
    with np.errstate(over="ignore"):
        with watch():
            y = second_run_overflows()
        y.sum().backward()  # outside: not watched

        y = second_run_overflows()
        with watch(), pytest.raises(FloatingPointError):
            y.sum().backward()


def test_a_second_run_is_counted_by_backwards_tracker():
    x = tensor(np.ones(100, np.float32), requires_grad=True)
    with track_memory() as forward:
        y = checkpoint(lambda x: x.exp().tanh(), x).sum()
    assert forward.now.saved == {"Recompute": 400}
    moments = len(forward.timeline)
    with track_memory() as backward:
        y.backward()
    assert len(forward.timeline) == moments
    assert {op for snapshot in backward.timeline for op in snapshot.saved} >= {"Exp", "Tanh"}
