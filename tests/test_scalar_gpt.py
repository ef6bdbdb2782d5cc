"""examples/scalar_gpt.py computes what tinylm.GPT does, and runs as a program."""

import importlib.util
import math
import random
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tinylm import GPT, GPTConfig
from tinylm.optim import AdamW

PROGRAM = Path(__file__).parents[1] / "examples" / "scalar_gpt.py"
spec = importlib.util.spec_from_file_location("scalar_gpt", PROGRAM)
scalar_gpt = importlib.util.module_from_spec(spec)
spec.loader.exec_module(scalar_gpt)


def pair(T=5, H=2, L=2, C=6, V=7):
    """A GPT of tinylm in float64 and a scalar one, with the same weights, none of them 0 or 1."""
    model = GPT(GPTConfig(vocab_size=V, block_size=T, n_layer=L, n_head=H, n_embd=C))
    draw = np.random.default_rng(0)
    for p in model.parameters():
        p.data = p.data + draw.normal(0, 0.3, p.shape)
    twin = scalar_gpt.GPT(V, T, C, H, L)
    names = {name.removeprefix("transformer."): p for name, p in model.named_parameters()}
    assert names.keys() == twin.weights.keys()
    for name, weight in twin.weights.items():
        assert numbers(weight, "data").shape == names[name].shape
        for value, number in zip(flat(weight), names[name].data.ravel(), strict=True):
            value.data = float(number)
    return model, twin, {name: names[name] for name in twin.weights}


def flat(weight):
    return [v for row in weight for v in (row if isinstance(row, list) else [row])]


def numbers(weight, what):
    """The data or the grad of a matrix or a vector, as an array."""
    array = np.array([getattr(v, what) for v in flat(weight)])
    return array.reshape(len(weight), -1) if isinstance(weight[0], list) else array


@pytest.mark.parametrize("sizes", [{}, {"H": 1}, {"H": 3, "L": 1, "V": 3}, {"T": 1}])
def test_loss_and_every_gradient_are_tinylms(sizes):
    model, twin, parameters = pair(**sizes)
    ids, targets = np.random.default_rng(1).integers(3, size=(2, model.config.block_size))
    ours, theirs = model.loss(ids[None], targets[None]), twin.loss(ids.tolist(), targets.tolist())
    assert theirs.data == pytest.approx(ours.item(), rel=1e-12)
    ours.backward()
    theirs.backward()
    for name, p in parameters.items():
        np.testing.assert_allclose(numbers(twin.weights[name], "grad"), p.grad, rtol=1e-10, atol=1e-10, err_msg=name)


def test_steps_of_training_are_tinylms():
    model, twin, parameters = pair()
    ours, theirs = AdamW(model.parameters(), lr=0.02), scalar_gpt.AdamW(twin.parameters(), lr=0.02)
    draw = np.random.default_rng(1)
    for _ in range(4):
        ids, targets = draw.integers(7, size=(2, 5))
        ours.zero_grad()
        loss = model.loss(ids[None], targets[None])
        scalar = twin.loss(ids.tolist(), targets.tolist())
        assert scalar.data == pytest.approx(loss.item(), rel=1e-9)
        loss.backward()
        scalar.backward()
        ours.step()
        theirs.step()
    for name, p in parameters.items():
        np.testing.assert_allclose(numbers(twin.weights[name], "data"), p.data, rtol=1e-9, atol=1e-9, err_msg=name)


def test_a_number_that_is_used_twice_gets_both_gradients():
    x, y = scalar_gpt.Value(3.0), scalar_gpt.Value(2.0)
    z = x * y + x * x + x
    z.backward()
    assert (z.data, x.grad, y.grad) == (18.0, 2.0 + 6.0 + 1.0, 3.0)
    z = x * y  # gradients add up until the optimizer clears them
    z.backward()
    assert (x.grad, y.grad) == (11.0, 6.0)


def test_a_long_chain_needs_no_recursion():
    x = y = scalar_gpt.Value(1.0)
    for _ in range(20_000):
        y = y + 1.0
    y.backward()
    assert x.grad == 1.0


def test_the_initial_weights_are_those_of_gpt_2():
    twin = scalar_gpt.GPT(V=24, C=16, L=2)
    assert len(twin.parameters()) == GPT(GPTConfig(24, 8, 2, 4, 16)).num_parameters()
    spread = {name: numbers(weight, "data").std() for name, weight in twin.weights.items()}
    assert spread["wte.weight"] == pytest.approx(0.02, rel=0.2)
    assert spread["h.0.attn.c_attn.weight"] == pytest.approx(0.02, rel=0.2)
    assert spread["h.1.mlp.c_proj.weight"] == pytest.approx(0.01, rel=0.2)
    assert spread["h.0.ln_1.weight"] == spread["h.0.mlp.c_fc.bias"] == 0
    draw = random.Random(0)
    symbols, targets = ([draw.randrange(24) for _ in range(8)] for _ in range(2))
    assert twin.loss(symbols, targets).data == pytest.approx(math.log(24), abs=0.1)


# --- the program ------------------------------------------------------------------------------------------------------


def run(*arguments):
    return subprocess.run([sys.executable, PROGRAM, *arguments], capture_output=True, text=True, timeout=120)


def test_it_trains_and_says_how_fast():
    done = run("--steps", "51")
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert lines[0].startswith("3,824 numbers; guessing costs ln 24 = 3.18 nats a token, the frequency of each letter")
    steps = [re.fullmatch(r"step +(\d+)  mean loss (\d\.\d\d)  \d+ tokens/s", line) for line in lines[1:]]
    assert [int(step[1]) for step in steps] == [50, 51]
    assert float(steps[0][2]) < 3.1


@pytest.mark.parametrize("arguments", [["--steps", "0"], ["--steps", "many"], ["--stepz", "3"], ["text.txt"]])
def test_a_mistake_is_one_line(arguments):
    done = run(*arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("scalar_gpt.py: error: ")
    assert done.stderr.count("\n") == 1
