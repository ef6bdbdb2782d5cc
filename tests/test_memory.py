"""Counting what the tape holds: exact on graphs that can be counted by hand; memory savings that follow from it."""

import os
import subprocess
import sys
import threading

import numpy as np
import pytest
from helpers import normal

from tinylm import GPT, GPTConfig, Op, Tensor, nn, no_grad, ops, random, reference_only
from tinylm.memory import Snapshot, peak_rss, track_memory
from tinylm.optim import AdamW
from tinylm.precision import autocast
from tinylm.recompute import checkpoint
from tinylm.training import TrainConfig, TrainState, train


@pytest.fixture(autouse=True)
def _reference():
    """A fused twin may save something else."""
    with reference_only():
        yield


def leaf(*shape, dtype=np.float32):
    return Tensor(normal(*shape), dtype, requires_grad=True)


# --- by hand ------------------------------------------------------------------------------------------------------


def test_a_step_by_hand():
    """x (10, 4) is an input, w (6, 4) a parameter: y = exp(x w^T), loss = sum(y * y)."""
    x, w = Tensor(normal(10, 4), np.float32), nn.Parameter(normal(6, 4), np.float32)
    model = nn.Linear(4, 6, bias=False)
    model.weight = w
    X, Y, W, ONE = 10 * 4 * 4, 10 * 6 * 4, 6 * 4 * 4, 4
    with track_memory(model) as m:
        h = ops.linear(x, w)  # saves x alone: x needs no gradient, so w is not needed; and w is a parameter anyhow
        assert m.now == Snapshot({"Linear": X})
        y = h.exp()  # saves y
        assert m.now.saved == {"Linear": X, "Exp": Y}
        loss = (y * y).sum()  # Mul saves y twice, which Exp has saved already
        assert m.now.saved == {"Linear": X, "Exp": Y}
        assert m.now.total == X + Y
        loss.backward()
        assert m.now == Snapshot(gradients=W)
    seen = [(dict(s.saved), s.flowing, s.gradients) for s in m.timeline]
    assert seen == [
        ({"Linear": X}, 0, 0),
        ({"Linear": X, "Exp": Y}, 0, 0),
        ({"Linear": X, "Exp": Y}, 0, 0),  # Mul
        ({"Linear": X, "Exp": Y}, 0, 0),  # Sum
        ({"Linear": X, "Exp": Y}, ONE, 0),  # Sum's backward: its gradient is one number, stretched as a view
        ({"Linear": X, "Exp": Y}, Y, 0),  # Mul's
        ({"Linear": X}, Y, 0),  # Exp's
        ({}, 0, W),  # Linear's
    ]
    assert m.peak == m.timeline[5]
    assert m.peak.total == X + Y + Y
    assert m.peak_activations == X + Y


def test_a_parameter_is_no_activation_though_nobody_names_its_model():
    x, w = leaf(10, 4), nn.Parameter(normal(6, 4), np.float32)
    with track_memory() as m:
        y = ops.linear(x, w), x @ w.T  # both save both; MatMul saves a view of w
    assert m.now.saved == {"Linear": 10 * 4 * 4}
    del y


def test_views_count_once_and_whole():
    """Three views of one buffer, saved by three ops: its bytes, once, under the first of them."""
    x = Tensor(abs(normal(6, 4)), np.float32, requires_grad=True)
    with track_memory() as m:
        h = x * 3.0
        a, b, c = h.chunk(3, axis=0)
        kept = [a.pow(4.0), b.reshape(8).log(), c.T.log()]
        assert m.now.saved == {"Pow": 6 * 4 * 4}
        del kept[:2], h, a, b, c
        m.look()
        assert m.now.saved == {"Log": 6 * 4 * 4}  # one view keeps the whole
        del kept
        m.look()
        assert m.now.total == 0


def test_what_an_op_saves_in_lists_is_counted_and_what_is_no_array_is_not():
    class Several(Op):
        def forward(self, x):
            self.save([x + 1, (x + 2, None, "text")], 3.0, x[:1].copy())
            return x + 0

        def backward(self, dy):
            return dy

    with track_memory() as m:
        y = Several.apply(leaf(5))
        assert m.now.saved == {"Several": (5 + 5 + 1) * 4}
    del y


def test_bytes_follow_the_dtype():
    counts = {}
    for dtype in (np.float16, np.float32, np.float64):
        with track_memory() as m:
            y = leaf(10, dtype=dtype).exp()
        counts[np.dtype(dtype).itemsize] = m.now.activations
        del y
    assert counts == {2: 20, 4: 40, 8: 80}


def test_integers_that_are_saved_count():
    with track_memory() as m:
        y = ops.embedding(leaf(5, 3), np.array([[0, 1, 2, 2]]))
    assert m.now.saved == {"Embedding": 4 * 8}
    del y


def test_autocasts_copies_of_parameters_stand_apart():
    x, w, v = Tensor(normal(10, 4), np.float32), *(nn.Parameter(normal(*s), np.float32) for s in ((6, 4), (3, 6)))
    with track_memory() as m, autocast("float16"):
        y = ops.linear(ops.linear(x, w), v)
        assert m.now.copies == 3 * 6 * 2  # of v; of w's copy nobody is in need, because x has no gradient
        assert m.now.saved == {"Linear": (10 * 4 + 10 * 6) * 2}
        y.sum().backward()
        assert m.now.total == 0


def test_checkpoints_hold_their_input_and_backward_holds_the_rest():
    x = leaf(10)
    with track_memory() as m:
        y = checkpoint(lambda x: x.exp().exp(), x * 2)
        assert m.now.saved == {"Recompute": 40}
        y.sum().backward()
        assert m.now.total == 0
    assert m.peak_activations == 40 + 80


def test_memory_falls_as_backward_walks():
    x = leaf(100)
    with track_memory() as m:
        y = x * 1.0
        for _ in range(10):
            y = y.exp() * 0.1
        loss = y.sum()
        forward = len(m.timeline)
        assert m.now.activations == 10 * 400
        loss.backward()
    held = [s.activations for s in m.timeline]
    assert held[:forward] == sorted(held[:forward])
    assert held[forward:] == sorted(held[forward:], reverse=True)
    assert held[-1] == m.now.total == 0
    assert {s.flowing for s in m.timeline[forward:-1]} == {4, 400}
    assert m.peak.total == 4400 - 0
    assert m.peak_activations == 4000


def test_nothing_is_recorded_and_nothing_counted_without_gradients():
    with track_memory() as m:
        with no_grad():
            leaf(10).exp()
        Tensor(normal(3)).exp()
    assert m.timeline == []
    assert m.now == m.peak == Snapshot()
    assert m.peak_activations == 0


def test_it_counts_this_threads_tape_between_enter_and_exit():
    before = leaf(10).exp()
    with track_memory() as m:
        thread = threading.Thread(target=lambda: leaf(1000).exp())
        thread.start()
        thread.join()
        inside = leaf(5).exp()
        with track_memory() as inner:
            also = leaf(7).exp()
        assert inner.now.saved == {"Exp": 28}
        with pytest.raises(KeyError), track_memory():
            raise KeyError
        inside_too = leaf(3).exp()
    after = leaf(20).exp()
    assert m.now.saved == {"Exp": 20 + 12}
    assert len(m.timeline) == 2
    del before, inside, also, inside_too, after


def test_counting_changes_nothing_and_keeps_nothing_alive():
    def step(track):
        random.seed(0)
        model = GPT(GPTConfig(11, 8, 2, 2, 8, dropout=0.1))
        x = np.arange(16).reshape(2, 8) % 11
        if track:
            with track_memory(model):
                model.loss(x, x).backward()
        else:
            model.loss(x, x).backward()
        return [p.grad for p in model.parameters()]

    for a, b in zip(step(False), step(True), strict=True):
        np.testing.assert_array_equal(a, b)


# --- the table and the picture ------------------------------------------------------------------------------------


def tracked(dtype="float32", recompute=0, vocab_size=65, batch_size=12, **sizes):
    """A step of a GPT, the default one unless told otherwise."""
    random.seed(0)
    model = GPT(GPTConfig(vocab_size, recompute=recompute, **sizes))
    optimizer = AdamW(model.parameters())
    ids = np.arange(batch_size * model.config.block_size).reshape(batch_size, -1) % vocab_size
    with track_memory(model, optimizer) as m:
        with autocast(dtype):
            loss = model.loss(ids, ids)
        loss.backward()
        optimizer.step()
        m.look()
    return m, model


def test_two_runs_count_the_same():
    small = {"n_layer": 2, "n_embd": 16, "n_head": 2, "block_size": 16, "batch_size": 3}
    first, second = (tracked("float16", 1, **small)[0] for _ in range(2))
    assert first.timeline == second.timeline
    assert len(first.timeline) > 50


def test_the_table():
    m, model = tracked("float16", n_layer=2, batch_size=4)
    lines = [line.rsplit(maxsplit=1) for line in str(m).splitlines()]
    assert lines[0] == ["held at the peak", "MB"]
    table = {name.strip(): float(number) for name, number in lines[1:]}
    assert len(table) == len(lines) - 1
    mb = model.num_parameters() * 4 / 1e6
    assert table["parameters"] == pytest.approx(mb, abs=0.006)
    assert table["optimizer state"] == pytest.approx(2 * mb, abs=0.006)
    assert table["gradients"] == pytest.approx(m.peak.gradients / 1e6, abs=0.006)
    assert table["activations"] == pytest.approx(m.peak.activations / 1e6, abs=0.006)
    assert table["parameters, cast"] == pytest.approx(m.peak.copies / 1e6, abs=0.006)
    assert table["their gradients"] == pytest.approx(m.peak.flowing / 1e6, abs=0.006)
    assert table["the process's peak"] > table["activations"]
    ops_ = {name: size for name, size in table.items() if name in m.peak.saved}
    assert set(ops_) == set(m.peak.saved) >= {"Linear", "CausalAttention", "Gelu", "LayerNorm"}
    assert sum(ops_.values()) == pytest.approx(table["activations"], abs=0.06)
    assert list(ops_.values()) == sorted(ops_.values(), reverse=True)
    assert m.now.gradients == model.num_parameters() * 4  # all of them, at the end


def test_the_table_without_a_model_and_of_nothing():
    with track_memory() as m:
        pass
    assert "activations" in str(m)
    assert "optimizer" not in str(m)


def test_the_picture_rises_and_falls(tmp_path):
    m, _ = tracked("float16", n_layer=2, batch_size=2)
    figure = m.plot()
    (axes,) = figure.axes
    bands = {band.get_label(): band for band in axes.collections}
    assert list(bands) == [
        "activations saved for backward",
        "parameters, cast",
        "gradients of activations",
        "gradients of parameters",
    ]
    top = bands["activations saved for backward"].get_paths()[0].vertices[:, 1].max()
    assert top == pytest.approx(m.peak_activations / 1e6)
    whole = [s.activations for s in m.timeline]
    peak = whole.index(max(whole))
    assert whole[: peak + 1] == sorted(whole[: peak + 1])
    assert whole[peak:] == sorted(whole[peak:], reverse=True)
    assert 0.2 < peak / len(whole) < 0.8
    assert "forward" in axes.get_xlabel()
    assert "MB" in axes.get_ylabel()
    figure.savefig(tmp_path / "memory.png")
    assert (tmp_path / "memory.png").read_bytes().startswith(b"\x89PNG")
    with track_memory() as nothing:
        pass
    nothing.plot().savefig(tmp_path / "nothing.png")


def test_the_process_has_a_peak_of_its_own():
    """In a small process, whatever process started it: 100 MB more are visible."""
    code = "import numpy as np; from tinylm.memory import peak_rss; a = peak_rss(); np.ones(25_000_000, np.float32); "
    code += "print(a, peak_rss())"
    ballast = np.ones(80_000_000, np.float32)  # what this process holds must not count for the other
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    before, after = map(int, done.stdout.split())
    assert 10e6 < before < 150e6
    assert 90e6 < after - before < 120e6
    assert peak_rss() > ballast.nbytes


# --- the figures --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("vocab_size", [65, 103])
def test_float16_activations_are_1_9_times_smaller(vocab_size):
    single, half = (tracked(dtype, vocab_size=vocab_size)[0].peak_activations for dtype in ("float32", "float16"))
    assert single >= 1.9 * half
    assert single == {65: 29_165_568, 103: 29_185_024}[vocab_size]  # the same on every machine


def test_the_count_of_a_gpt_by_hand():
    """All that a block saves, per token and channel; B T = 24 tokens of C = 16 channels, H = 2 heads, V = 11."""
    m, _ = tracked(n_layer=1, n_embd=16, n_head=2, block_size=8, batch_size=3, vocab_size=11)
    N, C, V = 24, 16, 11
    float32 = {
        "Linear": 2 * C + C + 4 * C,  # the inputs of c_attn, attn.c_proj, c_fc and mlp.c_proj
        "CausalAttention": 3 * C + 2 * 8,  # q, k, v, and the weights of 2 heads over 8 keys
        "LayerNorm": 3 * (C + 1),  # xhat and rstd
        "Gelu": 4 * C,
    }
    expected = {name: 4 * N * size for name, size in float32.items()}
    expected["Embedding"] = 8 * (N + 8)  # the ids, and the positions 0..7
    expected["LinearCrossEntropy"] = 4 * (N * C + V * C)
    assert max(m.timeline, key=lambda s: s.activations).saved == expected


M = {"n_layer": 6, "n_head": 6, "n_embd": 384, "block_size": 256, "batch_size": 8}


def test_recomputing_needs_at_least_60_percent_less():
    """On six layers of width 384. The ratio does not depend on the batch: one sequence is enough."""
    stored, recomputed = (tracked(recompute=k, **{**M, "batch_size": 1})[0].peak_activations for k in (0, 1))
    assert recomputed <= 0.4 * stored
    assert 40e6 < stored < 50e6


def test_accumulation_has_the_memory_of_one_micro_batch():
    tokens = np.arange(400) % 11

    def peak(batch_size, accumulate):
        random.seed(0)
        model = GPT(GPTConfig(11, 16, 2, 2, 32))
        config = TrainConfig(steps=1, batch_size=batch_size, accumulate=accumulate, eval_every=0)
        with track_memory(model) as m:
            list(train(TrainState(model, config), tokens, tokens[:18]))
        return m.peak_activations, max(s.activations + s.flowing for s in m.timeline)

    assert peak(8, 4) == peak(2, 1)
    assert peak(8, 3) == peak(3, 1)  # ragged: 2, 3 and 3
    assert peak(8, 1)[0] > 3.5 * peak(8, 4)[0]


@pytest.mark.parametrize(("recompute", "part"), [(0, 1.0), (1, 0.95), (3, 0.95)])
def test_counting_seldom_finds_nearly_the_same_peak(recompute, part):
    peaks, counts = [], []
    for seldom in (False, True):
        random.seed(0)
        model = GPT(GPTConfig(20, 16, n_layer=9, n_head=2, n_embd=16, recompute=recompute))
        x, y = np.random.default_rng(1).integers(20, size=(2, 4, 16))
        with track_memory(model, seldom=seldom) as memory:
            model.loss(x, y).backward()
        peaks.append(memory.peak.total)
        counts.append(len(memory.timeline))
    assert part * peaks[0] <= peaks[1] <= peaks[0]
    assert counts[1] < counts[0] / 2
