"""The GPT against the same model in PyTorch, and what must hold of any causal language model."""

import copy
import math

import numpy as np
import pytest
import torch
from helpers import assert_close, host
from torch_gpt import from_tinylm

from tinylm import GPT, GPTConfig, no_grad, ops, random
from tinylm.optim import AdamW, clip_grad_norm_, decay_groups, warmup_cosine


def make(dtype=np.float64, seed=0, lively=True, **sizes):
    """A small GPT. `lively`: weights far from their small initial values (biases not 0), so that every term matters."""
    config = GPTConfig(**{"vocab_size": 13, "block_size": 10, "n_layer": 2, "n_head": 3, "n_embd": 12, **sizes})
    random.seed(seed)
    model = GPT(config)
    draw = np.random.default_rng(seed)
    for p in model.parameters():
        noise = draw.normal(0, 0.2, p.shape) if lively else 0
        p.data = (p.data + noise).astype(dtype)
    return model


def batch(model, B=3, T=None, seed=0):
    """Ids and targets (B, T); with 13 tokens in the vocabulary many repeat."""
    T = model.config.block_size if T is None else T
    ids = np.random.default_rng(seed).integers(0, model.config.vocab_size, (B, T + 1))
    return ids[:, :-1], ids[:, 1:]


def norm(grads):
    return math.sqrt(sum(float((g**2).sum()) for g in grads))


# --- against PyTorch ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "tolerance"), [(np.float64, 1e-10), (np.float32, 2e-4)])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("T", [10, 7, 1])
def test_logits_loss_and_every_gradient_are_pytorchs(dtype, tolerance, bias, T):
    model = make(dtype, bias=bias)
    twin = from_tinylm(model)
    ids, targets = batch(model, T=T)
    x, y = torch.tensor(ids), torch.tensor(targets)

    logits, loss = model(ids), model.loss(ids, targets)
    assert logits.shape == (3, T, 13)
    assert logits.dtype == loss.dtype == dtype
    np.testing.assert_allclose(logits.numpy(), twin(x).detach(), rtol=tolerance, atol=tolerance)
    np.testing.assert_allclose(loss.item(), twin.loss(x, y).item(), rtol=tolerance)

    loss.backward()
    twin.loss(x, y).backward()
    theirs = dict(twin.named_parameters())
    assert list(theirs) == list(model.state_dict())
    for name, p in model.named_parameters():
        g = theirs[name].grad.numpy()
        assert abs(g).max() > 1e-4, name  # each of them matters, or the comparison says nothing
        np.testing.assert_allclose(p.grad, g, rtol=tolerance, atol=tolerance * abs(g).max(), err_msg=name)


def test_across_several_blocks_of_queries():
    """A sequence longer than two blocks of 64 queries, in which engine "blocked" computes attention."""
    model = make(block_size=150, n_layer=1)
    twin = from_tinylm(model)
    ids, targets = batch(model, B=2)
    model.loss(ids, targets).backward()
    twin.loss(torch.tensor(ids), torch.tensor(targets)).backward()
    theirs = dict(twin.named_parameters())
    for name, p in model.named_parameters():
        g = theirs[name].grad.numpy()
        np.testing.assert_allclose(p.grad, g, rtol=1e-9, atol=1e-9 * abs(g).max(), err_msg=name)


def torch_optimizer(twin, lr, betas, weight_decay):
    matrices = [p for p in twin.parameters() if p.ndim >= 2]
    vectors = [p for p in twin.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=lr, betas=betas)


@pytest.mark.parametrize(("dtype", "tolerance"), [(np.float64, 1e-9), (np.float32, 2e-3)])
@pytest.mark.parametrize("bias", [True, False])
def test_20_steps_with_clipping_and_schedule_are_pytorchs(dtype, tolerance, bias):
    model = make(dtype, bias=bias)
    twin = from_tinylm(model)
    steps, warmup, lr, betas, clip = 20, 5, 1e-2, (0.9, 0.99), 1.1
    ours = AdamW(decay_groups(model, 0.1), lr, betas)
    theirs = torch_optimizer(twin, lr, betas, 0.1)
    schedule = torch.optim.lr_scheduler.SequentialLR(
        theirs,
        [
            torch.optim.lr_scheduler.LinearLR(theirs, 1 / (warmup + 1), total_iters=warmup),
            torch.optim.lr_scheduler.CosineAnnealingLR(theirs, steps - warmup, eta_min=1e-3),
        ],
        [warmup],
    )
    norms, losses, their_losses = [], [], []
    for step in range(steps):
        ids, targets = batch(model, seed=step)
        ours.zero_grad()
        loss = model.loss(ids, targets)
        loss.backward()
        norms.append(clip_grad_norm_(ours.parameters(), clip))
        ours.set_lr(warmup_cosine(step, steps, lr, warmup, 1e-3))
        ours.step()
        losses.append(loss.item())

        theirs.zero_grad()
        loss = twin.loss(torch.tensor(ids), torch.tensor(targets))
        loss.backward()
        their_norm = torch.nn.utils.clip_grad_norm_(twin.parameters(), clip).item()
        theirs.step()
        schedule.step()
        their_losses.append(loss.item())
        assert math.isclose(norms[-1], their_norm, rel_tol=tolerance)

    assert min(norms) < clip < max(norms)  # some steps are clipped, others are not
    np.testing.assert_allclose(losses, their_losses, rtol=tolerance)
    their_parameters = dict(twin.named_parameters())
    for name, p in model.named_parameters():
        p, t = p.numpy(), their_parameters[name].detach().numpy()
        if name.endswith("c_attn.bias") and dtype == np.float32:
            # The keys' bias shifts all scores of a query equally: its gradient is 0, and Adam magnifies rounding.
            p, t = (np.delete(x, slice(12, 24)) for x in (p, t))
        np.testing.assert_allclose(p, t, rtol=tolerance, atol=tolerance * abs(t).max(), err_msg=name)


def test_every_device_gives_the_same_loss_gradients_and_text(device):
    here, there = make(np.float32, dropout=0.1), make(np.float32, dropout=0.1).to(device.name)
    ids, targets = batch(here)
    losses = []
    for model, to in ((here, np.asarray), (there, device.array)):
        random.seed(0)
        loss = model.loss(to(ids), to(targets))
        loss.backward()
        losses.append(loss.item())
    assert math.isclose(*losses, rel_tol=1e-6)
    for ours, theirs in zip(here.parameters(), there.parameters(), strict=True):
        assert theirs.device == device.name
        assert_close(theirs.grad, ours.grad, rtol=1e-4, atol=1e-6)
    np.testing.assert_array_equal(host(there.generate(device.array(ids), 5, top_k=4)), here.generate(ids, 5, top_k=4))


# --- initialisation -----------------------------------------------------------------------------------------------


def test_initial_weights_are_gpt2s():
    random.seed(3)
    n_layer = 3
    model = GPT(GPTConfig(vocab_size=200, block_size=100, n_layer=n_layer, n_head=2, n_embd=64))
    seen = set()
    for name, p in model.named_parameters():
        assert p.dtype == np.float32
        layer_norm = ".ln_" in name
        if name.endswith("bias"):
            np.testing.assert_array_equal(p.numpy(), 0, err_msg=name)
        elif layer_norm:
            np.testing.assert_array_equal(p.numpy(), 1, err_msg=name)
        else:
            std = 0.02 / math.sqrt(2 * n_layer) if "c_proj" in name else 0.02
            error = 4 * std / math.sqrt(2 * p.size)  # four standard errors of a standard deviation
            assert abs(p.numpy().std() - std) < error, name
            assert abs(p.numpy().mean()) < 4 * std / math.sqrt(p.size), name
            seen.add(p.numpy().tobytes())
    assert len(seen) == 2 + 4 * n_layer  # no two matrices are the same numbers


def test_the_first_loss_is_that_of_a_uniform_guess():
    model = make(np.float32, lively=False, vocab_size=50, n_embd=48)
    assert abs(model.loss(*batch(model)).item() - math.log(50)) < 0.1


def test_the_same_seed_gives_the_same_weights():
    a, b, c = (make(seed=s, lively=False).state_dict() for s in (1, 1, 2))
    assert all((a[name] == b[name]).all() for name in a)
    assert (a["transformer.wte.weight"] != c["transformer.wte.weight"]).all()


@pytest.mark.parametrize("bias", [True, False])
def test_number_of_parameters(bias):
    V, T, L, C = 13, 10, 2, 12
    model = make(bias=bias)
    vectors = (3 * C + C + 4 * C + C) + 2 * C if bias else 0  # biases of a block's Linears and LayerNorms
    assert model.num_parameters() == (V + T) * C + L * (12 * C * C + 2 * C + vectors) + C + (C if bias else 0)
    assert any(name.endswith("bias") for name in model.state_dict()) == bias


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"n_embd": 10, "n_head": 3}, r"n_embd \(10\) must be divisible by n_head \(3\)"),
        ({"vocab_size": 0}, "vocab_size must be at least 1, not 0"),
        ({"block_size": 0}, "block_size must be at least 1"),
        ({"n_layer": -1}, "n_layer must be at least 1, not -1"),
        ({"n_head": 0}, "n_head must be at least 1"),
        ({"dropout": 1.0}, "dropout must be at least 0 and below 1, not 1.0"),
        ({"dropout": -0.1}, "dropout must be at least 0"),
    ],
)
def test_a_config_that_makes_no_sense_is_refused(sizes, message):
    with pytest.raises(ValueError, match=message):
        GPTConfig(**{"vocab_size": 5, **sizes})


# --- causality and position ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("block_size", [10, 130])
def test_a_changed_future_token_changes_no_earlier_logit(block_size):
    """Bit for bit: a later token does not even change the rounding."""
    model = make(np.float32, block_size=block_size)
    ids, _ = batch(model, B=1)
    logits = model(ids).numpy()
    for t in {0, 1, block_size // 2, block_size - 1}:
        changed = ids.copy()
        changed[0, t] = (changed[0, t] + 1) % 13
        now = model(changed).numpy()
        np.testing.assert_array_equal(now[0, :t], logits[0, :t])
        assert (now[0, t:] != logits[0, t:]).any(axis=1).all()  # and the present and the later ones do see it


def test_no_gradient_flows_back_to_later_positions():
    model = make()
    ids, targets = batch(model, B=1)
    targets = targets.copy()
    targets[0, 4:] = -100  # only the first four positions count
    model.loss(ids, targets).backward()
    grad = model.transformer.wpe.weight.grad
    assert (grad[4:] == 0).all()
    assert (grad[:4] != 0).any(axis=1).all()


def test_sequences_of_a_batch_do_not_see_each_other():
    model = make()
    ids, _ = batch(model)
    together = model(ids).numpy()
    for i in range(3):
        np.testing.assert_allclose(model(ids[i : i + 1]).numpy()[0], together[i], rtol=1e-12, atol=1e-12)


def test_positions_matter():
    """The same token at each position: without position embeddings all logits would be equal."""
    model = make()
    logits = model(np.full((1, 10), 5)).numpy()[0]
    assert all((logits[i] != logits[j]).all() for i in range(10) for j in range(i))
    early, late = np.array([[1, 2, 3, 4]]), np.array([[2, 1, 3, 4]])
    assert (model(early).numpy()[0, -1] != model(late).numpy()[0, -1]).any()  # the order of the past counts


@pytest.mark.parametrize(
    "ids", [np.zeros((1, 11), int), np.zeros((1, 0), int), np.zeros(5, int), np.zeros((1, 1, 5), int)]
)
def test_ids_of_the_wrong_length_or_rank_are_refused(ids):
    with pytest.raises(ValueError, match=r"\(B, T\) with 1 <= T <= block_size = 10, not \("):
        make()(ids)


def test_ids_outside_the_vocabulary_are_refused():
    with pytest.raises(IndexError, match="id 13 is outside the vocabulary of 13"):
        make()(np.array([[13]]))


# --- tied weights -------------------------------------------------------------------------------------------------


def test_the_output_layer_is_the_token_embedding():
    model = make()
    names = [name for name, _ in model.named_parameters()]
    assert names.count("transformer.wte.weight") == 1
    assert not any("head" in name for name in names)
    ids, _ = batch(model)
    expected = model.hidden(ids).numpy() @ model.transformer.wte.weight.numpy().T
    np.testing.assert_allclose(model(ids).numpy(), expected, rtol=1e-12, atol=1e-12)


def test_the_tied_gradient_is_the_sum_of_both_uses():
    model, untied = make(), make()
    ids, targets = batch(model)
    model.loss(ids, targets).backward()

    head = copy.deepcopy(untied.transformer.wte.weight.data)
    head = type(untied.transformer.wte.weight)(head, dtype=head.dtype)
    ops.cross_entropy(ops.linear(untied.hidden(ids), head), targets).backward()
    embedding = untied.transformer.wte.weight.grad
    assert abs(embedding).max() > 1e-3
    assert abs(head.grad).max() > 1e-3
    np.testing.assert_allclose(model.transformer.wte.weight.grad, embedding + head.grad, rtol=1e-12, atol=1e-14)


def test_repeated_tokens_each_add_to_the_embeddings_gradient():
    """Compared with finite differences, with one repeated token: each occurrence contributes to the gradient."""
    model = make(n_layer=1)
    ids, targets = np.full((2, 5), 7), np.full((2, 5), 3)
    model.loss(ids, targets).backward()
    weight = model.transformer.wte.weight
    for c in range(4):
        row, numeric = weight.data[7], []
        for step in (1e-5, -1e-5):
            row[c] += step
            with no_grad():
                numeric.append(model.loss(ids, targets).item())
            row[c] -= step
        assert math.isclose(weight.grad[7, c], (numeric[0] - numeric[1]) / 2e-5, rel_tol=1e-6)


# --- dropout and modes --------------------------------------------------------------------------------------------


def test_dropout_acts_in_training_alone():
    model, plain = make(dropout=0.3), make(dropout=0.0)
    ids, _ = batch(model)
    model.eval()
    np.testing.assert_array_equal(model(ids).numpy(), plain(ids).numpy())
    np.testing.assert_array_equal(model(ids).numpy(), model(ids).numpy())
    model.train()
    first, second = model(ids).numpy(), model(ids).numpy()
    assert (first != second).all()
    random.seed(0)
    a = model(ids).numpy()
    random.seed(0)
    np.testing.assert_array_equal(a, model(ids).numpy())


def test_dropout_acts_at_four_places_of_a_block_and_on_the_embeddings():
    model = make(n_layer=2, dropout=0.3)
    random.seed(0)
    model(batch(model)[0])
    assert random.state()[1] == 1 + 2 * 3  # embeddings; attention weights and both outputs of each block


# --- generate -----------------------------------------------------------------------------------------------------


def greedy(model, ids, n):
    """The expected result of generate(temperature=0), step by step; a full block of 10 loses its oldest 2 tokens."""
    start = 0
    for _ in range(n):
        while ids.shape[1] - start > 10:
            start += 2
        with no_grad():
            logits = model(ids[:, start:]).numpy()
        ids = np.concatenate([ids, logits[:, -1].argmax(axis=1)[:, None]], axis=1)
    return ids


def talkative():
    """A model that does not repeat one token: its output depends on the whole context."""
    model = make(seed=2)
    for p in model.parameters():
        p.data *= 4 if p.ndim == 2 and p is not model.transformer.wte.weight else 1
    return model


def test_greedy_generation_takes_the_likeliest_also_beyond_the_block_size():
    model = talkative()
    ids, _ = batch(model, T=4)
    expected = greedy(model, ids, 30)
    got = model.generate(ids, 30, temperature=0)
    assert got.shape == (3, 34)
    np.testing.assert_array_equal(got, expected)
    np.testing.assert_array_equal(got[:, :4], ids)
    assert min(len(np.unique(row[14:])) for row in got) > 3
    np.testing.assert_array_equal(model.generate(ids, 30, top_k=1, seed=5), expected)
    np.testing.assert_array_equal(model.generate(ids, 30, temperature=1e-8), expected)


def test_a_prompt_longer_than_the_block_is_cut_from_the_left():
    model = talkative()
    ids = np.random.default_rng(1).integers(0, 13, (2, 25))
    got = model.generate(ids, 3, temperature=0)
    np.testing.assert_array_equal(got[:, :25], ids)
    np.testing.assert_array_equal(got, greedy(model, ids, 3))


def test_generation_depends_on_the_seed_alone():
    model = make()
    ids, _ = batch(model, T=2)
    first = model.generate(ids, 20, seed=1)
    random.seed(99)
    np.testing.assert_array_equal(model.generate(ids, 20, seed=1), first)
    assert (model.generate(ids, 20, seed=2) != first).any()
    state = random.state()
    model.generate(ids, 2)
    assert random.state() == state  # training that samples in between sees the same masks


@pytest.mark.parametrize(("temperature", "top_k"), [(1.0, None), (0.5, None), (2.0, 3), (1.0, 13), (1.0, 99)])
def test_sampled_frequencies_follow_the_softmax(temperature, top_k):
    """Pearson's chi-square of 20,000 samples (rows of one batch) stays in its range."""
    model = make(vocab_size=6, seed=4)
    logits = model(np.array([[3, 1]])).numpy()[0, -1] / temperature
    p = np.exp(logits - logits.max())
    if top_k is not None and top_k < 6:
        p[np.argsort(p)[:-top_k]] = 0
    p /= p.sum()
    n = 20_000
    ids = model.generate(np.tile([3, 1], (n, 1)), 1, temperature=temperature, top_k=top_k, seed=11)
    counts = np.bincount(ids[:, -1], minlength=6)
    assert (counts[p == 0] == 0).all()
    possible = p > 0
    chi_square = ((counts - n * p)[possible] ** 2 / (n * p)[possible]).sum()
    assert chi_square < 25  # 5 degrees of freedom: exceeded once in 7,000 seeds


def test_samples_of_successive_steps_and_rows_are_independent():
    model = make(vocab_size=6, seed=4)
    got = model.generate(np.zeros((50, 1), int), 8, temperature=3.0)
    assert len({tuple(row) for row in got}) == 50
    assert len({tuple(column) for column in got.T[1:]}) == 8


@pytest.mark.parametrize("training", [True, False])
def test_generation_runs_in_evaluation_mode_and_puts_the_mode_back(training):
    model = make(dropout=0.5)
    plain = make(dropout=0.0)
    model.train(training)
    ids, _ = batch(model, T=3)
    np.testing.assert_array_equal(model.generate(ids, 6, seed=1), plain.generate(ids, 6, seed=1))
    assert {m.training for m in model.modules()} == {training}
    model.transformer.wte.weight.data[:] = np.nan
    with pytest.raises(FloatingPointError, match="logits are not finite"):
        model.generate(ids, 2)
    assert {m.training for m in model.modules()} == {training}  # also after an error


def test_generation_records_nothing():
    model = make()
    before = [p.grad for p in model.parameters()]
    got = model.generate(batch(model, T=3)[0], 2)
    assert type(got) is np.ndarray
    assert before == [None] * len(before)
    assert model.loss(*batch(model)).requires_grad  # and recording is on again


@pytest.mark.parametrize("ids", [np.array([[1, 2]], np.uint16), np.array([[1, 2]], np.int32)])
def test_generation_takes_ids_of_any_integer_type(ids):
    model = make()
    np.testing.assert_array_equal(model.generate(ids, 3, temperature=0), greedy(model, ids.astype(int), 3))


def test_generation_of_no_tokens_returns_the_prompt():
    ids = np.array([[1, 2]])
    np.testing.assert_array_equal(make().generate(ids, 0), ids)


@pytest.mark.parametrize(("option", "message"), [({"temperature": -1.0}, "temperature"), ({"top_k": 0}, "top_k")])
def test_generation_refuses_senseless_options(option, message):
    with pytest.raises(ValueError, match=message):
        make().generate(np.array([[1]]), 1, **option)
