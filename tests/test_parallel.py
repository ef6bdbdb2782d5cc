"""One batch over several threads: the same gradient, bit for bit equal on every run, and settings restored."""

import math
import threading
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import reduce
from itertools import chain, pairwise

import numpy as np
import pytest
from helpers import assert_close, normal
from hypothesis import given
from hypothesis import strategies as st
from threadpoolctl import threadpool_info, threadpool_limits

from tinylm import GPT, GPTConfig, Op, detect_anomaly, no_grad, ops, parallel, random, reference_only, tensor
from tinylm.data import CharTokenizer, fingerprint, get_batch
from tinylm.nn import Linear, Module
from tinylm.optim import AdamW, clip_grad_norm_, decay_groups, warmup_cosine
from tinylm.parallel import Workers, available_cores, replica, tree_sum
from tinylm.precision import GradScaler, autocast
from tinylm.runs import Run
from tinylm.settings import current
from tinylm.training import TrainConfig, TrainState, batch_gradient, evaluate, train

TEXT = "the quick brown fox jumps over the lazy dog; pack my box with five dozen liquor jugs. " * 12
VOCABULARY = CharTokenizer.of(TEXT)
TOKENS = VOCABULARY.encode(TEXT)
SMALL = {"block_size": 8, "n_layer": 2, "n_head": 2, "n_embd": 8}


def make(dtype=np.float32, kind=GPT, **sizes):
    random.seed(0)
    model = kind(GPTConfig(VOCABULARY.vocab_size, **{**SMALL, **sizes}))
    for p in model.parameters():
        p.data = (p.data + 0.05 * normal(*p.shape)).astype(dtype)
    return model


def state_of(model, **config):
    return TrainState(model, TrainConfig(**{"steps": 4, "batch_size": 6, "warmup": 2, "eval_every": 0, **config}))


def gradient(model, **config):
    """(loss, gradient as one vector) of a step as train() computes it."""
    state = state_of(model, **config)
    model.train()
    model.zero_grad()
    with Workers(model, state.config.threads) as workers:
        loss = batch_gradient(state, TOKENS, workers)
    return loss, np.concatenate([p.grad.reshape(-1) for p in model.parameters()])


def distance(a, b):
    """The distance of two vectors, relative to their length."""
    return np.linalg.norm(a - b) / np.linalg.norm(b)


# --- the gradient ---------------------------------------------------------------------------------------------------

CASES = {
    "even": {"batch_size": 6},
    "ragged": {"batch_size": 7},
    "one sequence": {"batch_size": 1},
    "fewer sequences than threads": {"batch_size": 2},
    "accumulated": {"batch_size": 8, "accumulate": 2},
    "accumulated, ragged": {"batch_size": 7, "accumulate": 3},
    "accumulated one by one": {"batch_size": 4, "accumulate": 4},
    "dropout": {"batch_size": 5, "dropout": 0.4},
    "dropout, accumulated": {"batch_size": 7, "accumulate": 2, "dropout": 0.4},
    "recomputed": {"batch_size": 5, "recompute": 1},
    "recomputed, dropout": {"batch_size": 5, "recompute": 1, "dropout": 0.4, "accumulate": 2},
    "no bias": {"batch_size": 5, "bias": False},
}


def split_case(case):
    """(model's settings, training's settings) of one of CASES."""
    sizes = {name: value for name, value in CASES[case].items() if name in ("dropout", "recompute", "bias")}
    return sizes, {name: value for name, value in CASES[case].items() if name not in sizes}


@pytest.mark.parametrize("threads", [2, 3])
@pytest.mark.parametrize("case", CASES)
def test_the_gradient_is_that_of_one_thread(case, threads):
    sizes, config = split_case(case)
    for dtype, tolerance in ((np.float64, 1e-13), (np.float32, 1e-5)):
        model = make(dtype, **sizes)
        loss, expected = gradient(model, batch_size=config["batch_size"])  # at once
        several_loss, got = gradient(model, threads=threads, **config)
        assert math.isclose(loss, several_loss, rel_tol=tolerance)  # with dropout: the masks are the same
        assert got.dtype == dtype
        assert distance(got, expected) < tolerance


@pytest.mark.parametrize("threads", [2, 3])
@pytest.mark.parametrize("case", ["ragged", "recomputed, dropout", "fewer sequences than threads"])
def test_the_gradient_is_the_same_bits_on_every_run(case, threads):
    sizes, config = split_case(case)
    model = make(n_embd=32, **sizes)
    first = gradient(model, threads=threads, **config)
    for _ in range(8):
        again = gradient(model, threads=threads, **config)
        assert again[0] == first[0]
        np.testing.assert_array_equal(again[1], first[1])


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_a_weight_with_two_names_gets_both_gradients(threads):
    """The token embedding is also the output layer: against the sum of the gradients of two separate weights."""
    model = make(np.float64)
    table = model.transformer.wte.weight
    _, got = gradient(model, threads=threads)
    x, y = get_batch(TOKENS, 6, 8, 1337, 0)
    output = tensor(table.data.copy(), requires_grad=True)
    model.zero_grad()
    ops.linear_cross_entropy(model.hidden(x), output, y).backward()
    assert_close(got[: table.size].reshape(table.shape), table.grad + output.grad, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("threads", [2, 3])
def test_half_precision_over_several_threads(threads):
    results = []
    for n in (1, threads):
        model = make()
        state = state_of(model, batch_size=7, threads=n, dtype="float16")
        model.train()
        with Workers(model, n) as workers:
            loss = batch_gradient(state, TOKENS, workers)
        state.scaler.unscale_(state.optimizer)
        assert {p.grad.dtype for p in model.parameters()} == {np.dtype(np.float32)}
        results.append((loss, np.concatenate([p.grad.reshape(-1) for p in model.parameters()])))
    (loss, expected), (several_loss, got) = results
    assert math.isclose(loss, several_loss, rel_tol=1e-4)
    assert distance(got, expected) < 2e-3  # each weight gradient is rounded to float16 before it is summed
    _, exact = gradient(make(), batch_size=7)
    assert distance(got, exact) < 2e-2


@pytest.mark.parametrize("threads", [1, 2])
def test_an_overflow_that_the_scaler_mends_warns_nobody(threads):
    model = make()
    state = state_of(model, steps=3, threads=threads, dtype="float16")
    state.scaler = GradScaler(init_scale=2.0**100)
    before = [p.data.copy() for p in model.parameters()]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        steps = list(train(state, TOKENS, TOKENS[:20]))
    assert [s.loss_scale for s in steps] == [2.0**100, 2.0**99, 2.0**98]
    assert all(math.isfinite(s.loss) for s in steps)
    assert all((p.data == was).all() for p, was in zip(model.parameters(), before, strict=True))


def test_opposite_infinities_are_summed_without_a_warning():
    model = make(kind=Scalar)
    with warnings.catch_warnings(), Workers(model, 2) as workers:
        warnings.simplefilter("error")
        workers.gradient(lambda rank, each: setattr(each.w, "grad", np.array([(-1) ** rank * np.inf], np.float32)))
    assert np.isnan(model.w.grad).all()


# --- the loop -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_one_thread_is_the_plain_loop_bit_for_bit(dropout):
    model, plain = make(dropout=dropout), make(dropout=dropout)
    config = {"steps": 6, "batch_size": 7, "lr": 0.02, "clip": 0.5, "weight_decay": 0.1, "seed": 3}
    losses = [s.loss for s in train(state_of(model, threads=1, **config), TOKENS, TOKENS[:20])]

    optimizer = AdamW(decay_groups(plain, 0.1), 0.02, (0.9, 0.99))
    for step in range(6):
        x, y = get_batch(TOKENS, 7, 8, 3, step)
        random.seed(3, (step + 1) << 32)
        loss = plain.loss(x, y)
        optimizer.zero_grad()
        loss.backward()
        clip_grad_norm_(plain.parameters(), 0.5)
        optimizer.set_lr(warmup_cosine(step, 6, 0.02, 2))
        optimizer.step()
        assert losses[step] == loss.item()
    for a, b in zip(model.parameters(), plain.parameters(), strict=True):
        np.testing.assert_array_equal(a.data, b.data)


@pytest.mark.parametrize("config", [{}, {"accumulate": 3, "clip": 0.5}, {"dropout": 0.3, "recompute": 1}])
def test_a_run_with_several_threads_goes_as_with_one(config):
    sizes = {name: config[name] for name in ("dropout", "recompute") if name in config}
    runs = {}
    for threads in (1, 2, 3):
        model = make(np.float64, **sizes)
        settings = {"steps": 5, "batch_size": 7, "lr": 0.02, "eval_every": 2, "threads": threads}
        settings |= {name: value for name, value in config.items() if name not in sizes}
        steps = list(train(state_of(model, **settings), TOKENS, TOKENS[:60]))
        runs[threads] = [[s.loss, s.grad_norm, s.clipped, s.val_loss or 0] for s in steps], model
    for threads in (2, 3):
        np.testing.assert_allclose(runs[threads][0], runs[1][0], rtol=1e-9)
        for a, b in zip(runs[threads][1].parameters(), runs[1][1].parameters(), strict=True):
            assert_close(a, b.data, rtol=1e-6, atol=1e-8)
    if config.get("clip"):
        assert any(clipped for _, _, clipped, _ in runs[2][0])


def test_a_run_with_several_threads_is_the_same_bits_on_every_run():
    models = [make(dropout=0.2) for _ in range(3)]
    losses = [[s.loss for s in train(state_of(m, threads=3, batch_size=5), TOKENS, TOKENS[:20])] for m in models]
    assert losses[0] == losses[1] == losses[2]
    for a, b, c in zip(*(m.parameters() for m in models), strict=True):
        assert (a.data == b.data).all()
        assert (a.data == c.data).all()


@pytest.mark.parametrize(("before", "after"), [(1, 3), (3, 1), (2, 3)])
def test_a_run_is_resumed_with_another_number_of_threads(tmp_path, before, after):
    def state(threads):
        return state_of(make(np.float64, dropout=0.2), steps=6, batch_size=5, lr=0.02, threads=threads)

    unbroken = state(1)
    expected = [s.loss for s in train(unbroken, TOKENS, TOKENS[:20])]

    first, data = state(before), fingerprint(TOKENS)
    steps = train(first, TOKENS, TOKENS[:20])
    losses = [next(steps).loss for _ in range(3)]
    run = Run(tmp_path / "run")
    run.start({})
    run.save(first, VOCABULARY, data)
    steps.close()
    second = state(after)
    run.resume(second, VOCABULARY, data, lambda message: None)
    losses += [s.loss for s in train(second, TOKENS, TOKENS[:20])]

    np.testing.assert_allclose(losses, expected, rtol=1e-9)
    for a, b in zip(second.model.parameters(), unbroken.model.parameters(), strict=True):
        assert_close(a, b.data, rtol=1e-6, atol=1e-8)


class Infinite(Op):
    """The identity, with a gradient of infinity."""

    def forward(self, x):
        return x + 0

    def backward(self, dy):
        return np.full_like(dy, np.inf)


class Spoiled(GPT):
    """A GPT whose gradient is not finite."""

    def loss(self, ids, targets):
        return Infinite.apply(super().loss(ids, targets))


def test_what_is_not_finite_is_found_in_the_workers():
    model = make(kind=Spoiled)
    before = [p.data.copy() for p in model.parameters()]
    with pytest.raises(FloatingPointError, match=r"step 1: .* it began in the gradient that Infinite gives"):
        list(train(state_of(model, threads=2), TOKENS, TOKENS[:20]))
    assert all((p.data == was).all() for p, was in zip(model.parameters(), before, strict=True))


@pytest.mark.parametrize("threads", [0, -1])
def test_no_threads_are_refused(threads):
    with pytest.raises(ValueError, match=f"threads must be at least 1, not {threads}"):
        Workers(make(), threads)
    with pytest.raises(ValueError, match=f"threads must be at least 1, not {threads}"):
        TrainConfig(threads=threads)


def test_lessons_have_one_thread_by_default_and_there_are_cores():
    assert TrainConfig().threads == 1
    assert available_cores() >= 1


# --- evaluation -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [2, 9, 10, 50, 51, 67])
def test_evaluation_over_several_threads_is_that_of_one(length):
    model = make(np.float64, dropout=0.5)
    expected = evaluate(model, TOKENS[:length], 2, model.config.block_size)
    for threads in (2, 3, 5):
        with Workers(model, threads) as workers:
            assert math.isclose(
                evaluate(model, TOKENS[:length], 2, model.config.block_size, workers), expected, rel_tol=1e-12
            )


@pytest.mark.parametrize("training", [True, False])
def test_evaluation_leaves_every_model_in_its_mode_also_after_an_error(training):
    model = make().train(training)
    with Workers(model, 2) as workers:
        evaluate(model, TOKENS[:50], 2, model.config.block_size, workers)
        assert {m.training for each in workers.models for m in each.modules()} == {training}
        assert all(p.grad is None for each in workers.models for p in each.parameters())
        with pytest.raises(IndexError):
            evaluate(model, np.full(50, 999), 2, model.config.block_size, workers)
        assert {m.training for each in workers.models for m in each.modules()} == {training}


# --- replicas -------------------------------------------------------------------------------------------------------


class Scalar(Module):
    """A single weight, with gradient `rank` for the tests of reductions."""

    def __init__(self, config=None):
        self.w = tensor_parameter([1.0])


class Tied(Module):
    """Two layers with one weight, one of them twice in a list."""

    def __init__(self):
        self.a, self.b = Linear(3, 3), Linear(3, 3, bias=False)
        self.b.weight = self.a.weight
        self.layers = [self.a, self.b, self.a]


def tensor_parameter(values):
    from tinylm.nn import Parameter

    return Parameter(np.array(values, np.float32))


def test_a_replica_shares_weights_and_has_gradients_of_its_own():
    model = make()
    model.loss(*get_batch(TOKENS, 2, 8, 1, 0)).backward()
    twin = replica(model)
    assert [name for name, _ in twin.named_parameters()] == [name for name, _ in model.named_parameters()]
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert p is not q
        assert type(p) is type(q)
        assert np.shares_memory(p.data, q.data)
        assert p.grad is not None
        assert q.grad is None
    before = [p.grad.copy() for p in model.parameters()]
    twin.loss(*get_batch(TOKENS, 2, 8, 1, 1)).backward()
    for p, q, was in zip(model.parameters(), twin.parameters(), before, strict=True):
        np.testing.assert_array_equal(p.grad, was)
        assert not np.shares_memory(p.grad, q.grad)
    twin.eval()
    assert model.training


def test_a_replica_has_the_same_ties():
    twin = replica(Tied())
    assert twin.a.weight is twin.b.weight
    assert twin.layers[0] is twin.layers[2] is twin.a
    assert len(list(twin.parameters())) == 2


def test_a_frozen_parameter_stays_frozen_over_several_threads():
    model = make()
    model.transformer.wpe.weight.requires_grad = False
    state = state_of(model, threads=2)
    with Workers(model, 2) as workers:
        batch_gradient(state, TOKENS, workers)
    assert [name for name, p in model.named_parameters() if p.grad is None] == ["transformer.wpe.weight"]


@pytest.mark.parametrize("order", ["C", "F"])
def test_workers_see_what_becomes_of_the_weights(order):
    """After an optimizer's update, and after loading."""
    model = make()
    for p in model.parameters():
        p.data = np.array(p.data, order=order)
    state = state_of(model, threads=2)

    def weights(workers):
        return workers.run(lambda rank: [p.data.copy() for p in workers.models[rank].parameters()])

    with Workers(model, 2) as workers:
        (before, _) = weights(workers)
        batch_gradient(state, TOKENS, workers)
        state.optimizer.step()
        mine, others = weights(workers)
        model.load_state_dict({name: p * 0 + 7 for name, p in model.state_dict().items()})
        _, loaded = weights(workers)
    for a, b, c, d in zip(before, mine, others, loaded, strict=True):
        assert (a != b).any()
        np.testing.assert_array_equal(b, c)
        assert (d == 7).all()


# --- threads --------------------------------------------------------------------------------------------------------


def observed(rank):
    """The settings of this thread."""
    record = current()
    settings = [record.recording, record.anomaly, record.autocast is not None, record.engines != ()]
    return (*settings, random.state(), np.geterr()["over"])


def end(before):
    """Wait until only the threads in `before` are left."""
    for thread in set(threading.enumerate()) - before:
        thread.join(5)
    assert not set(threading.enumerate()) - before


@pytest.mark.parametrize("size", [1, 2, 3])
def test_settings_travel_to_the_workers(size):
    with Workers(make(), size) as workers:
        random.seed(5, 6, 7)
        plain = (True, False, False, True, (5, 6, 7), "warn")
        assert workers.run(observed) == [plain] * size
        with no_grad(), detect_anomaly(), autocast("float16"), reference_only(), np.errstate(over="ignore"):
            assert workers.run(observed) == [(False, True, True, False, (5, 6, 7), "ignore")] * size
            products = workers.run(lambda rank: ops.matmul(tensor(np.eye(2)), tensor(np.eye(2))))
            assert {(y.dtype, y.requires_grad) for y in products} == {(np.dtype(np.float16), False)}
        assert workers.run(observed) == [plain] * size  # and no longer


def test_a_worker_leaves_its_callers_settings_alone():
    with Workers(make(), 2) as workers:
        random.seed(5)
        workers.run(lambda rank: random.seed(99))
    assert random.state() == (5, 0, 0)


def test_work_runs_in_threads_at_the_same_time_and_results_come_in_order():
    meet = threading.Barrier(3)

    def work(rank):
        meet.wait(20)  # nobody gets past it alone
        time.sleep(0.02 * (3 - rank))
        return rank, threading.current_thread().name

    before = set(threading.enumerate())
    with Workers(make(), 3) as workers:
        for _ in range(3):
            results = workers.run(work)
            assert [rank for rank, _ in results] == [0, 1, 2]
            assert len({name for _, name in results}) == 3
    end(before)


def test_one_worker_is_the_calling_thread():
    model = make()
    with Workers(model, 1) as workers:
        assert workers.run(lambda rank: threading.current_thread()) == [threading.current_thread()]
    assert workers.models == [model]
    assert Workers(model, 1).run(lambda rank: rank) == [0]  # needs no `with`


def test_an_exception_in_a_worker_comes_out_as_it_is_and_leaves_the_pool_usable():
    ended = []

    def work(rank):
        if rank:
            raise KeyError(f"worker {rank} lost its key")
        time.sleep(0.05)
        ended.append(rank)

    with Workers(make(), 3) as workers:
        with pytest.raises(KeyError, match="worker 1 lost its key"):
            workers.run(work)
        assert ended == [0]  # the others have ended by then
        assert workers.run(lambda rank: rank) == [0, 1, 2]


def test_an_exception_under_other_settings_does_not_stay_in_the_threads():
    def fail(rank):
        raise KeyError

    with Workers(make(), 2) as workers:
        with no_grad(), reference_only(), pytest.raises(KeyError):
            workers.run(fail)
        assert [(o[0], o[3]) for o in workers.run(observed)] == [(True, True)] * 2


def test_an_interrupted_gradient_never_reaches_the_model_afterwards(monkeypatch):
    """Ctrl-C while the threads work: what they still compute must not appear after zero_grad()."""
    model = make()
    going_on = threading.Event()
    done = []

    def work(rank, each):
        loss = each.loss(*get_batch(TOKENS, 2, each.config.block_size, 1, 0))
        going_on.wait(10)
        loss.backward()
        done.append(rank)

    def interrupted(futures):
        raise KeyboardInterrupt

    with Workers(model, 2) as workers:
        monkeypatch.setattr(parallel, "wait", interrupted)
        with pytest.raises(KeyboardInterrupt):
            workers.gradient(work)
        monkeypatch.undo()
        model.zero_grad()
        going_on.set()
        deadline = time.monotonic() + 10
        while len(done) < 2 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert len(done) == 2
        assert all(p.grad is None for p in model.parameters())
        workers.gradient(work)  # and the workers can be used again
        assert all(p.grad is not None for p in model.parameters())


def test_a_frozen_parameter_stays_frozen_in_the_workers():
    model = make()
    with Workers(model, 2) as workers:
        frozen = next(model.parameters()).requires_grad_(False)
        workers.gradient(lambda rank, each: each.loss(*get_batch(TOKENS, 2, each.config.block_size, 1, 0)).backward())
    assert frozen.grad is None
    assert sum(p.grad is not None for p in model.parameters()) == len(list(model.parameters())) - 1


def test_a_wrong_target_is_reported_in_the_ops_words():
    tokens = TOKENS.copy()
    tokens[:] = 999
    with pytest.raises(IndexError, match="id 999 is outside"):
        list(train(state_of(make(), threads=2), tokens, TOKENS[:20]))


# --- BLAS -----------------------------------------------------------------------------------------------------------


def blas():
    """The number of threads of NumPy's BLAS."""
    return {pool["num_threads"] for pool in threadpool_info() if pool["internal_api"] == "openblas"}


@pytest.fixture
def two_blas_threads():
    """As on a machine with two cores."""
    with threadpool_limits(2, "blas"):
        if blas() != {2}:
            pytest.skip("NumPy's BLAS is not OpenBLAS with threads")
        yield


def test_blas_has_one_thread_for_each_of_several_workers_and_gets_them_back(two_blas_threads):
    with Workers(make(), 2) as workers:
        assert workers.run(lambda rank: blas()) == [{1}, {1}]
    assert blas() == {2}
    with suppress(KeyError), Workers(make(), 2):
        assert blas() == {1}
        raise KeyError
    assert blas() == {2}
    with Workers(make(), 2), Workers(make(), 3):
        assert blas() == {1}
    assert blas() == {2}


def test_one_worker_leaves_blas_as_it_is(two_blas_threads):
    with Workers(make(), 1) as workers:
        assert workers.run(lambda rank: blas()) == [{2}]
    assert blas() == {2}


def test_train_gives_blas_its_threads_back_however_it_ends(two_blas_threads):
    before = set(threading.enumerate())
    list(train(state_of(make(), threads=2), TOKENS, TOKENS[:20]))
    assert blas() == {2}

    steps = train(state_of(make(), threads=2), TOKENS, TOKENS[:20])
    next(steps)
    assert blas() == {1}
    steps.close()
    assert blas() == {2}

    with pytest.raises(FloatingPointError):
        list(train(state_of(make(kind=Spoiled), threads=2), TOKENS, TOKENS[:20]))
    assert blas() == {2}
    end(before)


# --- the reduction --------------------------------------------------------------------------------------------------


class Threads:
    """A Group whose processes are threads of this one, to try a group without MPI."""

    def __init__(self, rank, size, shared):
        self.rank, self.size, self.shared = rank, size, shared

    def sum_(self, arrays):
        barrier, parts = self.shared
        parts[self.rank] = arrays
        barrier.wait(30)
        copies = [[None if a is None else a.copy() for a in parts[rank]] for rank in range(self.size)]
        barrier.wait(30)  # nobody overwrites what others still copy
        return [tree_sum(list(same)) for same in zip(*copies, strict=True)]


def trained(processes, threads, **config):
    """The states of `processes` trainings of `threads` threads each, as one group."""
    shared = threading.Barrier(processes), {}

    def process(rank):
        random.seed(2)
        state = state_of(make(dropout=0.2), steps=6, eval_every=3, threads=threads, **config)
        list(train(state, TOKENS, TOKENS[:100], Threads(rank, processes, shared)))
        return state

    with threadpool_limits(1, "blas"), ThreadPoolExecutor(processes) as pool:
        return list(pool.map(process, range(processes)))


@pytest.mark.parametrize("config", [{}, {"accumulate": 2}, {"dtype": "float16"}], ids=str)
@pytest.mark.parametrize("batch_size", [8, 7, 3])
def test_a_group_trains_to_the_same_bits_however_its_workers_are_shared_out(batch_size, config):
    """Four workers: in one process, two or four. With three sequences, one has nothing to do."""
    runs = [trained(n, 4 // n, batch_size=batch_size, **config) for n in (1, 2, 4)]
    (first, *_), *_ = runs
    assert first.val_loss is not None
    for states in runs:
        for state in states:
            assert state.val_loss == first.val_loss
            for (name, a), b in zip(state.model.state_dict().items(), first.model.state_dict().values(), strict=True):
                np.testing.assert_array_equal(a, b, err_msg=name)


def test_what_the_group_returns_is_what_the_optimizer_gets():
    model = make()

    class Constant:
        rank, size = 0, 1

        def sum_(self, arrays):
            return [None if a is None else np.full(a.shape, 3, a.dtype) for a in arrays]

    for threads in (1, 2):
        with Workers(model, threads, Constant()) as workers:
            model.zero_grad()
            batch_gradient(state_of(model, threads=threads), TOKENS, workers)
        assert all((p.grad == 3).all() for p in model.parameters())


@given(
    size=st.integers(1, 4),
    present=st.lists(st.lists(st.booleans(), min_size=4, max_size=4), min_size=1, max_size=9),
)
def test_sums_are_formed_along_a_tree_of_the_workers_in_the_firsts_memory(size, present):
    parts = [
        [
            (10.0**rank * normal(3, seed=rank + i)).astype(np.float32) if is_[rank] else None
            for i, is_ in enumerate(present)
        ]
        for rank in range(size)
    ]
    firsts = list(parts[0])

    def plus(*arrays):
        there = [a for a in arrays if a is not None]
        return reduce(np.add, there) if there else None

    padded = [[*same, None, None, None][:4] for same in zip(*parts, strict=True)]
    expected = [plus(plus(*same[:2]), plus(*same[2:])) for same in padded]
    with Workers(make(), size) as workers:
        sums = workers._sums(parts)
    for total, want, first in zip(sums, expected, firsts, strict=True):
        if want is None:
            assert total is None
        else:
            np.testing.assert_array_equal(total, want)
        assert first is None or total is first


def test_gradients_add_to_those_that_are_there():
    model = make(np.float64)
    _, once = gradient(model, threads=2)
    state = state_of(model, threads=2)
    model.zero_grad()
    with Workers(model, 2) as workers:
        batch_gradient(state, TOKENS, workers)
        batch_gradient(state, TOKENS, workers)
    assert_close(np.concatenate([p.grad.reshape(-1) for p in model.parameters()]), 2 * once, rtol=1e-9, atol=1e-12)


@given(n=st.integers(0, 20), size=st.integers(1, 6))
def test_shares_cover_the_items_in_order_and_are_as_equal_as_can_be(n, size):
    model = Scalar()
    workers = Workers(model, size)
    shares = [list(range(n))[workers.share(n, rank)] for rank in range(size)]
    assert [*chain(*shares)] == list(range(n))
    sizes = [len(share) for share in shares]
    assert max(sizes) - min(sizes) <= 1
    assert all(a.stop == b.start for a, b in pairwise(workers.share(n, rank) for rank in range(size)))
