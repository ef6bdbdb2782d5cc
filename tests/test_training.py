"""The loop: what a step does, accumulation, evaluation, and that it learns."""

import math
import re
from dataclasses import fields
from itertools import pairwise

import numpy as np
import pytest
import torch
from helpers import assert_close
from torch_gpt import from_tinylm

from tinylm import GPT, GPTConfig, Op, override, random
from tinylm.data import CharTokenizer, get_batch
from tinylm.optim import adamw, clip_grad_norm_, warmup_cosine
from tinylm.training import TrainConfig, TrainState, evaluate, train

TEXT = "the quick brown fox jumps over the lazy dog; pack my box with five dozen liquor jugs. " * 12
VOCABULARY = CharTokenizer.of(TEXT)
TOKENS = VOCABULARY.encode(TEXT)
SMALL = {"block_size": 8, "n_layer": 1, "n_head": 2, "n_embd": 8}

# Of `test_golden_run`. They were checked against the same run in PyTorch.
GOLDEN_LOSSES = [
    3.379737, 3.299386, 3.214396, 3.158600, 3.132461, 3.093162, 2.852814, 2.769620, 2.671150, 2.574908,
    2.378687, 2.290380, 2.189960, 2.112153, 2.230253, 2.169194, 2.052282, 2.094268, 2.009686, 2.047672,
]  # fmt: skip
GOLDEN_VAL_LOSS = 2.054275


def make(dtype=np.float32, seed=0, **sizes):
    random.seed(seed)
    model = GPT(GPTConfig(VOCABULARY.vocab_size, **{**SMALL, **sizes}))
    for p in model.parameters():
        p.data = p.data.astype(dtype)
    return model


def run(model, tokens=TOKENS, val=TOKENS[:50], **config):
    """All steps of a training run."""
    settings = {"steps": 5, "batch_size": 8, "warmup": 2, "eval_every": 0, "seed": 1, **config}
    return list(train(TrainState(model, TrainConfig(**settings)), tokens, val))


def weights(model):
    return {name: p.numpy().copy() for name, p in model.named_parameters()}


def same(a, b):
    return all((a[name] == b[name]).all() for name in a)


# --- one step after another ---------------------------------------------------------------------------------------


def test_the_loop_is_the_one_you_would_write_in_pytorch():
    """Batches, loss, clipping, schedule, decay and betas, all at once: parameters after eight steps in float64."""
    config = TrainConfig(
        steps=8, batch_size=4, accumulate=3, lr=0.03, min_lr=0.005, warmup=3, beta1=0.8, beta2=0.95, weight_decay=0.3,
        clip=0.8, eval_every=0, seed=5,
    )  # fmt: skip
    model = make(np.float64)
    twin = from_tinylm(model)
    groups = [
        {"params": [p for p in twin.parameters() if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in twin.parameters() if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, betas=(config.beta1, config.beta2))
    steps = list(train(TrainState(model, config), TOKENS, TOKENS[:20]))
    for i, step in enumerate(steps):
        x, y = (torch.tensor(a) for a in get_batch(TOKENS, 4, 8, config.seed, i))
        optimizer.zero_grad()
        loss = twin.loss(x, y)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(twin.parameters(), config.clip).item()
        for group in optimizer.param_groups:
            group["lr"] = warmup_cosine(i, 8, 0.03, 3, 0.005)
        optimizer.step()
        assert math.isclose(step.loss, loss.item(), rel_tol=1e-9)
        assert math.isclose(step.grad_norm, norm, rel_tol=1e-9)
    assert min(s.grad_norm for s in steps) < config.clip < max(s.grad_norm for s in steps)
    theirs = dict(twin.named_parameters())
    for name, p in model.named_parameters():
        np.testing.assert_allclose(p.numpy(), theirs[name].detach(), rtol=1e-8, atol=1e-9, err_msg=name)


def test_what_a_step_reports():
    model = make()
    first_loss = model.loss(*get_batch(TOKENS, 8, 8, 1, 0)).item()
    steps = run(model, steps=7, lr=0.01, min_lr=0.001, eval_every=3)
    assert [s.step for s in steps] == [1, 2, 3, 4, 5, 6, 7]
    assert [s.lr for s in steps] == [warmup_cosine(i, 7, 0.01, 2, 0.001) for i in range(7)]
    assert math.isclose(steps[0].loss, first_loss, rel_tol=1e-6)  # before the update
    assert {s.tokens for s in steps} == {64}
    assert all(s.seconds > 0 and s.grad_norm > 0 for s in steps)
    assert [s.step for s in steps if s.val_loss is not None] == [3, 6, 7]
    assert steps[-1].val_loss == evaluate(model, TOKENS[:50], 8, model.config.block_size)  # after the update


def test_without_eval_every_it_evaluates_at_the_end_alone():
    assert [s.step for s in run(make(), steps=4, eval_every=0) if s.val_loss is not None] == [4]
    assert [s.step for s in run(make(), steps=4, eval_every=2) if s.val_loss is not None] == [2, 4]


def test_the_gradient_norm_is_that_before_clipping():
    found = []
    for clip in (0, 0.1):
        norms = []

        def update(params, grads, *rest, norms=norms):
            norms.append(rest[-1] * math.sqrt(sum(float((g**2).sum()) for g in grads)))  # of what the update is given

        with override(adamw, update):
            (step,) = run(make(), steps=1, clip=clip)
        found.append((step.grad_norm, *norms))
    (norm, free), (same, clipped) = found
    assert norm == same > 0.1
    assert math.isclose(clipped, 0.1, rel_tol=1e-4)
    assert math.isclose(free, norm, rel_tol=1e-5)  # clip=0 does not clip


def test_a_clip_of_ones_own_is_called_and_left_alone():
    """An override of clip_grad_norm_ works in place, and nothing is clipped a second time."""
    given = []

    def halve(parameters, max_norm):
        for p in parameters:
            p.grad *= 0.5
        return 7.0

    def update(params, grads, *rest):
        given.append((rest[-1], [g.copy() for g in grads]))

    with override(adamw, update):
        run(make(), steps=1, clip=1e9)
        with override(clip_grad_norm_, halve) as mine:
            (step,) = run(make(), steps=1, clip=0.1)
    assert (mine.forward_calls, step.grad_norm) == (1, 7.0)
    (_, whole), (coefficient, halved) = given
    assert coefficient == 1.0
    for a, b in zip(whole, halved, strict=True):
        np.testing.assert_array_equal(a * 0.5, b)


def test_a_clip_that_wraps_the_original_runs_once_a_step():
    calls = []

    def logged(parameters, max_norm):
        calls.append(clip_grad_norm_(parameters, max_norm))
        return calls[-1]

    with override(clip_grad_norm_, logged) as mine:
        steps = run(make(), steps=3, clip=0.1)
    assert [s.grad_norm for s in steps] == calls
    assert mine.forward_calls == 3


def test_training_is_in_place_and_in_training_mode():
    model = make(dropout=0.5).eval()
    before = {name: p.data for name, p in model.named_parameters()}
    modes = []
    loss = model.loss
    model.loss = lambda x, y: (modes.append(model.training), loss(x, y))[1]
    run(model, steps=3, eval_every=1, val=TOKENS[:9])
    assert modes == [True, False] * 3  # each step's batch, then its evaluation of one block
    assert all(p.data is before[name] for name, p in model.named_parameters())


# --- accumulation -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "rtol"), [(np.float64, 1e-12), (np.float32, 1e-6)])
@pytest.mark.parametrize("accumulate", [2, 3, 8])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_accumulated_gradients_are_those_of_the_full_batch(dtype, rtol, accumulate, dropout):
    """8 sequences in 3 micro-batches of 2, 3 and 3: a mean of their means would be wrong."""
    full, parts = make(dtype, dropout=dropout), make(dtype, dropout=dropout)
    (a,) = run(full, steps=1, lr=0.0, clip=0)
    (b,) = run(parts, steps=1, lr=0.0, clip=0, accumulate=accumulate)
    assert math.isclose(a.loss, b.loss, rel_tol=rtol)
    assert math.isclose(a.grad_norm, b.grad_norm, rel_tol=rtol)
    for p, q in zip(full.parameters(), parts.parameters(), strict=True):
        np.testing.assert_allclose(q.grad, p.grad, rtol=rtol, atol=rtol * abs(p.grad).max())


def test_an_accumulated_run_is_the_run_with_full_batches():
    full, parts = make(np.float64), make(np.float64)
    a, b = run(full, steps=10, lr=0.02), run(parts, steps=10, lr=0.02, accumulate=3)
    np.testing.assert_allclose([s.loss for s in b], [s.loss for s in a], rtol=1e-11)
    assert {s.tokens for s in b} == {64}
    for p, q in zip(full.parameters(), parts.parameters(), strict=True):
        np.testing.assert_allclose(q.numpy(), p.numpy(), rtol=1e-7, atol=1e-9)


# --- the same again -----------------------------------------------------------------------------------------------


def test_a_run_is_a_function_of_its_seed_bit_for_bit():
    models = [make(dropout=0.2) for _ in range(3)]
    runs = []
    for model, seed in zip(models, (1, 1, 2), strict=True):
        random.seed(len(runs), 17)  # what was drawn before must not matter
        runs.append([(s.loss, s.grad_norm, s.val_loss) for s in run(model, seed=seed)])
    assert runs[0] == runs[1]
    assert same(weights(models[0]), weights(models[1]))
    assert runs[0][0] != runs[2][0]
    assert not same(weights(models[0]), weights(models[2]))


def test_evaluating_more_often_changes_nothing():
    often, seldom = make(dropout=0.2), make(dropout=0.2)
    a, b = run(often, eval_every=1), run(seldom, eval_every=0)
    assert [s.loss for s in a] == [s.loss for s in b]
    assert same(weights(often), weights(seldom))


def test_every_device_trains_alike(device):
    here, there = make(), make().to(device.name)
    a, b = run(here, eval_every=1, accumulate=3), run(there, eval_every=1, accumulate=3)
    np.testing.assert_allclose([s.loss for s in b], [s.loss for s in a], rtol=1e-5)
    np.testing.assert_allclose([s.val_loss for s in b], [s.val_loss for s in a], rtol=1e-5)
    for p, q in zip(here.parameters(), there.parameters(), strict=True):
        assert q.device == device.name
        assert_close(q, p.numpy(), rtol=1e-3, atol=2e-3 * abs(p.numpy()).max())


# --- it learns ----------------------------------------------------------------------------------------------------


def test_it_learns_to_say_abc():
    vocabulary = CharTokenizer("abc")
    tokens = vocabulary.encode("abc" * 40)
    random.seed(0)
    model = GPT(GPTConfig(3, **SMALL))
    steps = run(model, tokens, tokens[:30], steps=80, lr=0.02, warmup=5)
    assert abs(steps[0].loss - math.log(3)) < 0.1
    assert steps[-1].loss < 0.1
    assert steps[-1].val_loss < 0.1
    start = vocabulary.encode("ab")[None]
    assert vocabulary.decode(model.generate(start, 12, temperature=0)[0]) == "abcabcabcabcab"


def test_golden_run():
    """The losses of twenty steps, checked once against PyTorch (as the tests above are), must not change."""
    model = make(block_size=16, n_layer=2, n_embd=32)
    steps = run(model, steps=20, lr=0.01, warmup=4, batch_size=6, accumulate=2, weight_decay=0.1, clip=1.0, seed=1337)
    np.testing.assert_allclose([s.loss for s in steps], GOLDEN_LOSSES, rtol=1e-4)
    np.testing.assert_allclose(steps[-1].val_loss, GOLDEN_VAL_LOSS, rtol=1e-4)


# --- what is not finite -------------------------------------------------------------------------------------------


def spoiled_at(model, step, spoil):
    """Let `spoil` change the loss of one step, counted from 1."""
    loss, calls = model.loss, []

    def spoiling(x, y):
        calls.append(1)
        return spoil(loss(x, y)) if len(calls) == step else loss(x, y)

    model.loss = spoiling


class InfiniteGradient(Op):
    """The identity, with a gradient of infinity."""

    def forward(self, x):
        return x + 0

    def backward(self, dy):
        return dy * math.inf


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda loss: loss * math.nan, "step 3: the loss is nan and the gradient norm nan"),
        (lambda loss: loss * math.inf, "step 3: the loss is inf and"),
        (InfiniteGradient.apply, r"step 3: the loss is \d.* and the gradient norm (nan|inf)"),
        (lambda loss: loss + math.nan, "step 3: the loss is nan and the gradient norm [0-9]"),
    ],
)
def test_what_is_not_finite_stops_before_it_reaches_the_parameters(spoil, message):
    model = make()
    spoiled_at(model, 3, spoil)
    steps = train(TrainState(model, TrainConfig(steps=5, batch_size=8, eval_every=0)), TOKENS, TOKENS[:50])
    next(steps), next(steps)
    before = weights(model)
    with pytest.raises(FloatingPointError, match=message):
        next(steps)
    assert same(before, weights(model))


# --- evaluate -----------------------------------------------------------------------------------------------------


def naive_loss(model, tokens):
    """Mean of -log p(token) over all tokens but the first, one forward for each, given its block's earlier tokens."""
    T, losses = model.config.block_size, []
    for i in range(1, len(tokens)):
        start = (i - 1) // T * T
        logits = model(tokens[None, start:i].astype(np.int64)).numpy()[0, -1]
        losses.append(math.log(np.exp(logits).sum()) - logits[tokens[i]])
    return sum(losses) / len(losses)


@pytest.mark.parametrize("length", [2, 5, 8, 9, 10, 17, 25, 49, 50, 67])
def test_evaluate_is_the_mean_over_every_token(length):
    model = make(np.float64, seed=3)
    for p in model.parameters():
        p.data += np.random.default_rng(p.size).normal(0, 0.3, p.shape)
    tokens = TOKENS[7 : 7 + length]
    expected = naive_loss(model, tokens)
    for batch_size in (1, 3, 100):
        assert math.isclose(evaluate(model, tokens, batch_size, model.config.block_size), expected, rel_tol=1e-10)


@pytest.mark.parametrize("training", [True, False])
def test_evaluate_runs_in_evaluation_mode_records_nothing_and_puts_the_mode_back(training):
    model, plain = make(dropout=0.5), make(dropout=0.0)
    model.train(training)
    losses, loss = [], model.loss
    model.loss = lambda x, y: losses.append(loss(x, y)) or losses[-1]
    assert evaluate(model, TOKENS[:50], 2, 8) == evaluate(plain, TOKENS[:50], 2, 8)
    assert {m.training for m in model.modules()} == {training}
    assert len(losses) == 4  # three batches of two blocks, and the ragged rest
    assert not any(x.requires_grad for x in losses)
    assert all(p.grad is None for p in model.parameters())
    with pytest.raises(IndexError):
        evaluate(model, np.full(20, 999), 2, 8)
    assert {m.training for m in model.modules()} == {training}  # also after an error


@pytest.mark.parametrize("length", [0, 1])
def test_evaluate_needs_two_tokens(length):
    with pytest.raises(ValueError, match=f"{length} tokens are too few"):
        evaluate(make(), TOKENS[:length], 2, 8)


def test_evaluate_reads_tokens_from_a_file(tmp_path):
    TOKENS.tofile(tmp_path / "tokens.bin")
    tokens = np.memmap(tmp_path / "tokens.bin", TOKENS.dtype, "r")
    assert evaluate(make(), tokens[:50], 2, 8) == evaluate(make(), TOKENS[:50], 2, 8)


# --- TrainConfig --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        *(({name: 0}, f"{name} must be at least 1, not 0") for name in ("steps", "batch_size", "accumulate")),
        *(
            ({name: bad}, f"{name} must be a finite number and not negative, not {bad}")
            for name in ("lr", "min_lr", "weight_decay", "clip")
            for bad in (-1, math.nan, math.inf)
        ),
        *(
            ({name: -1}, f"{name} must be at least 0, not -1")
            for name in ("warmup", "eval_every", "seed", "block_size")
        ),
        *(
            ({name: bad}, f"{name} must be at least 0 and below 1")
            for name in ("beta1", "beta2")
            for bad in (1.0, -0.1)
        ),
        ({"beta2": math.nan}, "beta2 must be at least 0 and below 1, not nan"),
        ({"batch_size": 4, "accumulate": 5}, r"accumulate \(5\) cannot exceed batch_size \(4\)"),
    ],
)
def test_a_config_that_makes_no_sense_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        TrainConfig(**settings)


@pytest.mark.parametrize("name", [field.name for field in fields(TrainConfig)])
@pytest.mark.parametrize("bad", ["3", None, [1]], ids=str)
def test_an_option_of_a_wrong_type_is_named(name, bad):
    with pytest.raises((TypeError, ValueError), match=rf"^TrainConfig: {name} must be .*, not {re.escape(repr(bad))}$"):
        TrainConfig(**{name: bad})


@pytest.mark.parametrize("bad", [math.nan, math.inf, 2.5, True])
def test_a_number_of_steps_is_a_whole_number(bad):
    with pytest.raises(TypeError, match=rf"^TrainConfig: steps must be an integer, not {bad}$"):
        TrainConfig(steps=bad)


def test_the_default_config_is_valid_and_each_limit_is_allowed():
    config = TrainConfig()
    assert config.warmup < config.steps
    TrainConfig(steps=1, batch_size=1, lr=0, min_lr=0, warmup=0, beta1=0, beta2=0, weight_decay=0, clip=0, eval_every=0)


def test_too_short_a_text_is_refused_before_the_first_step():
    with pytest.raises(ValueError, match="8 tokens are too few for a block of 8"):
        run(make(), TOKENS[:8])


def test_losses_fall_on_real_sentences():
    losses = [s.loss for s in run(make(n_embd=32), steps=60, lr=0.01)]
    means = [np.mean(losses[i : i + 15]) for i in range(0, 60, 15)]
    assert all(late < early for early, late in pairwise(means))
