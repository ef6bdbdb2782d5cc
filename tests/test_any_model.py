"""The loop, runs and generation with models, optimizers, schedules and tokenizers of a user's own."""

import json

import numpy as np
import pytest
from helpers import assert_close

from tinylm import GPT, GPTConfig, data, nn, no_grad, ops, optim, random
from tinylm.generation import generate
from tinylm.optimizer import Optimizer
from tinylm.runs import Run, load_model, read_metrics
from tinylm.runs.report import report
from tinylm.training import TrainConfig, TrainState, train

TEXT = "the quick brown fox jumps over the lazy dog; pack my box with five dozen liquor jugs. " * 12


class LSTM(nn.Module):
    def __init__(self, vocab_size, width=8):
        self.embed = nn.Embedding(vocab_size, width)
        self.gates = nn.Linear(2 * width, 4 * width)
        self.drop = nn.Dropout(0.1)
        self.out = nn.Linear(width, vocab_size)

    def forward(self, ids):
        x = self.embed(ids)
        h = c = x[:, 0] * 0
        hs = []
        for t in range(x.shape[1]):
            i, f, o, g = self.gates(ops.cat([x[:, t], h], axis=1)).chunk(4, axis=1)
            c = f.sigmoid() * c + i.sigmoid() * g.tanh()
            h = o.sigmoid() * c.tanh()
            hs.append(h)
        return self.out(self.drop(ops.stack(hs, axis=1)))

    def loss(self, ids, targets):
        return ops.cross_entropy(self(ids), targets)


class MLP(nn.Module):
    """Two tokens predict the next one; layers in a plain list, a weight that is used twice, a buffer."""

    def __init__(self, vocab_size, width=8):
        self.embed = nn.Embedding(vocab_size, width)
        self.layers = nn.Sequential(nn.Linear(2 * width, width), nn.Tanh(), nn.Linear(width, width))
        self.register_buffer("scale", np.full(width, 2, np.float32))

    def forward(self, ids):
        x = self.embed(ids)
        before = ops.cat([x[:, :1] * 0, x[:, :-1]], axis=1)
        return ops.linear(self.layers(ops.cat([before, x], axis=-1)) * self.scale, self.embed.weight)

    def loss(self, ids, targets):
        return ops.cross_entropy(self(ids), targets)


class Signs(Optimizer):
    """p -= lr * sign(m), m a running mean of the gradient (Lion's core)."""

    moments = ("mean",)

    def __init__(self, params, lr=1e-3):
        super().__init__(params, lr, 0.0)

    def update(self, lists, options, coefficient):
        for p, g, mean, _, lr, _ in zip(*lists, strict=True):
            mean += 0.1 * (g * coefficient - mean)
            p -= lr * np.sign(mean)


class Words:
    """A tokenizer of words."""

    def __init__(self, words):
        self.words = words
        self.vocab_size = len(words)

    def encode(self, text):
        return np.array([self.words.index(word) for word in text.split()], np.uint16)

    def decode(self, ids):
        return " ".join(self.words[i] for i in ids)

    def describe(self):
        return {"kind": "words", "words": self.words}


MODELS = {"LSTM": LSTM, "MLP": MLP, "GPT": lambda n: GPT(GPTConfig(n, 8, n_layer=1, n_head=2, n_embd=8, dropout=0.1))}
OPTIMIZERS = {
    "default": lambda model: None,
    "SGD": lambda model: optim.SGD(model.parameters(), momentum=0.9),
    "AdamW": lambda model: optim.AdamW(model.parameters(), betas=(0.8, 0.9)),
    "own": lambda model: Signs(model.parameters()),
}
SETTINGS = [{}, {"threads": 2, "accumulate": 2}, {"dtype": "float16"}]


def make(model, optimizer, tokenizer, schedule=None, **config):
    random.seed(4)
    made = MODELS[model](tokenizer.vocab_size)
    config = {"steps": 12, "batch_size": 5, "block_size": 8, "lr": 0.01, "warmup": 2, "eval_every": 4, **config}
    return TrainState(made, TrainConfig(**config), OPTIMIZERS[optimizer](made), schedule)


def go_on(run, state, tokenizer, tokens, steps=None):
    for done, step in enumerate(train(state, *data.split(tokens)), 1):
        run.record(step)
        if done == steps:
            break
    run.save(state, tokenizer, data.fingerprint(tokens))


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("model", MODELS)
def test_a_model_is_trained_saved_resumed_and_writes(model, optimizer, settings, tmp_path):
    tokenizer = data.CharTokenizer.of(TEXT)
    tokens = tokenizer.encode(TEXT)
    whole, part, again = (make(model, optimizer, tokenizer, **settings) for _ in range(3))
    runs = [Run(tmp_path / "whole"), Run(tmp_path / "parts")]
    for run in runs:
        run.start()
    go_on(runs[0], whole, tokenizer, tokens)
    go_on(runs[1], part, tokenizer, tokens, steps=6)
    random.seed(99)
    resumed = Run(tmp_path / "parts")
    resumed.resume(again, tokenizer, data.fingerprint(tokens), tell=lambda line: None)
    go_on(resumed, again, tokenizer, tokens)

    for a, b in zip(whole.model.state_dict().values(), again.model.state_dict().values(), strict=True):
        np.testing.assert_array_equal(a, b)
    losses = [[line.get("loss", line.get("val_loss")) for line in read_metrics(run.folder)] for run in runs]
    assert losses[0] == losses[1]
    assert losses[0][-1] < losses[0][0]
    assert "whole" in report([tmp_path / "whole", tmp_path / "parts"])

    loaded, its_tokenizer = load_model(tmp_path / "parts", model=MODELS[model](tokenizer.vocab_size))
    assert its_tokenizer.describe() == tokenizer.describe()
    ids = tokens[None, :5].astype(int)
    with no_grad():
        assert_close(loaded(ids).numpy(), again.model.eval()(ids).numpy())
    text = generate(loaded, [tokens[:5].astype(int)], 20, seed=3)[0]
    assert tokenizer.decode(text[:5]) == TEXT[:5]
    np.testing.assert_array_equal(text, generate(again.model, [tokens[:5].astype(int)], 20, seed=3)[0])


def test_a_schedule_of_ones_own_is_followed(tmp_path):
    tokenizer = data.ByteTokenizer()
    state = make("MLP", "SGD", tokenizer, schedule=lambda step: 1 / (1 + step), steps=3)
    rates = [step.lr for step in train(state, *data.split(tokenizer.encode(TEXT)))]
    assert rates == [1, 1 / 2, 1 / 3]
    assert [group["lr"] for group in state.optimizer.param_groups] == [1 / 3]


def test_generation_without_a_block_size_sees_the_whole_text():
    random.seed(1)
    model = LSTM(5, 4).eval()
    ids = np.array([[1, 2, 3, 4, 0, 1]])
    for _ in range(12):
        with no_grad():
            ids = np.concatenate([ids, model(ids)[:, -1].numpy().argmax(axis=1)[:, None]], axis=1)
    np.testing.assert_array_equal(generate(model, ids[:, :6], 12, temperature=0), ids)
    with pytest.raises(ValueError, match="token -1, which is outside the vocabulary of the model"):
        generate(model, np.array([[-1]]), 1)


def test_a_tokenizer_of_ones_own(tmp_path, monkeypatch):
    tokenizer = Words(sorted(set(TEXT.split())))
    tokens = tokenizer.encode(TEXT)
    state = make("MLP", "default", tokenizer, steps=2)
    run = Run(tmp_path)
    run.start()
    go_on(run, state, tokenizer, tokens)
    with pytest.raises(ValueError, match=r"'words' is not among .*; add its class to tinylm\.data\.TOKENIZERS"):
        load_model(tmp_path, model=MLP(tokenizer.vocab_size))
    monkeypatch.setitem(data.TOKENIZERS, "words", Words)
    _, loaded = load_model(tmp_path, model=MLP(tokenizer.vocab_size))
    assert loaded.decode(loaded.encode("lazy dog;")) == "lazy dog;"
    tokenizer.words[0] = "other"
    with pytest.raises(ValueError, match=r"^cannot resume: the tokenizer has changed$"):
        Run(tmp_path).resume(make("MLP", "default", tokenizer), tokenizer, data.fingerprint(tokens), tell=print)


def test_what_does_not_fit_is_said_in_one_line_and_changes_nothing(tmp_path):
    tokenizer = data.CharTokenizer.of(TEXT)
    tokens = tokenizer.encode(TEXT)
    with pytest.raises(ValueError, match=r"^LSTM has no config\.block_size: give TrainConfig a block_size$"):
        TrainState(LSTM(5), TrainConfig())
    run = Run(tmp_path)
    run.start()
    go_on(run, make("LSTM", "SGD", tokenizer, steps=2), tokenizer, tokens)
    with pytest.raises(ValueError, match=r"holds a model of class LSTM: pass one, as load_model\(\.\.\., model=LSTM"):
        load_model(tmp_path)
    wide = make("LSTM", "SGD", tokenizer)
    wide.model = LSTM(tokenizer.vocab_size, 12)
    wide.optimizer = OPTIMIZERS["SGD"](wide.model)
    others = {
        "the model was a LSTM and is a MLP": make("MLP", "SGD", tokenizer),
        "AdamW.load_state_dict: ": make("LSTM", "default", tokenizer),
        "SGD.load_state_dict: parameter 0 has ": wide,
    }
    for message, state in others.items():
        before = {name: a.copy() for name, a in state.model.state_dict().items()}
        with pytest.raises(ValueError, match=message) as caught:
            Run(tmp_path).resume(state, tokenizer, data.fingerprint(tokens), tell=print)
        assert "\n" not in str(caught.value)
        assert state.step == 0
        assert state.optimizer.state_dict()["state"] == {}
        for name, a in state.model.state_dict().items():
            np.testing.assert_array_equal(a, before[name])


def test_a_model_without_a_config_is_described_by_its_name(tmp_path):
    tokenizer = data.ByteTokenizer()
    run = Run(tmp_path)
    run.start({"note": "mine"})
    go_on(run, make("LSTM", "SGD", tokenizer, steps=1), tokenizer, tokenizer.encode(TEXT))
    about = json.loads((tmp_path / "checkpoints" / "step-00000001" / "state.json").read_text())
    assert about["model"] == {"class": "LSTM", "config": None}
    assert about["tokenizer"] == {"kind": "bytes"}
    assert run.config() == {"note": "mine"}


def test_a_tokenizer_that_does_not_describe_itself_is_saved_by_its_name(tmp_path, monkeypatch):
    class Digits:
        vocab_size = 10

        def encode(self, text):
            return np.array([int(digit) for digit in text], np.uint16)

        def decode(self, ids):
            return "".join(map(str, ids))

    run = Run(tmp_path)
    run.start()
    go_on(run, make("MLP", "default", Digits(), steps=1), Digits(), Digits().encode("0123456789" * 50))
    monkeypatch.setitem(data.TOKENIZERS, "Digits", Digits)
    assert isinstance(load_model(tmp_path, model=MLP(10))[1], Digits)


def test_an_optimizer_of_another_models_parameters_is_refused():
    with pytest.raises(ValueError, match="the optimizer is for parameters that are not those of this MLP"):
        TrainState(MLP(5), TrainConfig(block_size=2), optim.SGD(MLP(5).parameters()))
