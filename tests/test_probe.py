"""Probes: they find the silent bugs and name them, find nothing in what is sound, and change nothing."""

import copy
import math
import time

import numpy as np
import pytest
from test_any_model import LSTM, MLP, Signs
from threadpoolctl import threadpool_limits

from tinylm import GPT, GPTConfig, data, nn, ops, override, probe, random
from tinylm.data import get_batch
from tinylm.gpt import Attention
from tinylm.ops.attention import CausalAttention, causal_mask
from tinylm.ops.embedding import Embedding
from tinylm.ops.layer_norm import LayerNorm
from tinylm.optim import SGD, AdamW, clip_grad_norm_, decay_groups
from tinylm.training import TrainConfig, TrainState, evaluate, train

TEXT = data.language_reference()[:60_000]
TOKENIZER = data.CharTokenizer.of(TEXT)
TRAIN, VAL = data.split(TOKENIZER.encode(TEXT))
V = TOKENIZER.vocab_size


def make(model=None, optimizer=None, **config):
    """The state of a run that begins: by default of a small GPT with dropout."""
    random.seed(3)
    model = gpt() if model is None else model() if callable(model) and not isinstance(model, nn.Module) else model
    config = {"steps": 300, "warmup": 20, "block_size": 32, **config}
    return TrainState(model, TrainConfig(**config), None if optimizer is None else optimizer(model))


def gpt(attention=None, **config):
    random.seed(3)
    model = GPT(GPTConfig(V, 32, **{"n_layer": 2, "n_head": 4, "n_embd": 32, "dropout": 0.1, **config}))
    for block in model.transformer.h if attention else ():
        block.attn.__class__ = attention
    return model


# --- a loop of a student's own, and what may be wrong in it ---------------------------------------------------------


def loop(bug=""):
    """A `step` with accumulation, loss scaling and clipping, and one bug."""

    def step(state, tokens):
        model, optimizer, scaler, config = state.model, state.optimizer, state.scaler, state.config
        if bug != "no train()":
            model.train()
        if bug != "unseeded":
            random.seed(config.seed, (state.step + 1) << 32)
        batch = 0 if bug == "same batch" else state.step
        x, y = get_batch(tokens, config.batch_size, state.block_size, config.seed, batch)
        if bug == "targets not shifted":
            y = x
        size = math.ceil(len(x) / config.accumulate)
        if bug != "not zeroed":
            optimizer.zero_grad()
        for first in range(0, len(x), size):
            part = slice(first, first + size)
            if bug == "zeroed in between":
                optimizer.zero_grad()
            weight = len(x[part]) / len(x)
            weight = {"undivided": 1, "ragged": 1 / config.accumulate}.get(bug, weight)
            scaler.scale(model.loss(x[part], y[part]) * weight).backward()
            if bug == "schedule per micro-batch":
                state.ticks = getattr(state, "ticks", state.step) + 1
            if bug == "step per micro-batch":
                state.step += 1
        parameters = optimizer.parameters()
        if bug == "clipped before":
            clip_grad_norm_(parameters, config.clip)
        if bug == "never unscaled":
            scaler._found_inf = False
        else:
            scaler.unscale_(optimizer)
        if bug == "per tensor":
            for p in parameters:
                clip_grad_norm_([p], config.clip)
        elif bug == "rescaled":
            norm = math.sqrt(sum(float((p.grad**2).sum()) for p in parameters))
            for p in parameters:
                p.grad *= np.float32(config.clip / norm)
        elif bug not in ("clipped before", "unclipped"):
            clip_grad_norm_(parameters, config.clip)
        at = {"schedule per micro-batch": getattr(state, "ticks", 0), "off by one": state.step + 1}.get(bug, state.step)
        optimizer.set_lr(state.schedule(at))
        scaler.step(optimizer)
        scaler.update()
        if bug == "decays itself":
            for p in parameters:
                p.data *= 0.999
        state.step += bug != "step per micro-batch"

    return step


def evaluate_in_training_mode(state, tokens):
    x, y = tokens[None, :-1].astype(int)[:, : state.block_size], tokens[None, 1:].astype(int)[:, : state.block_size]
    return state.model.loss(x, y).item()


def mean_of_means(state, tokens):
    state.model.eval()
    T, losses = state.block_size, []
    for start in range(0, len(tokens) - 1, T):
        window = tokens[None, start : start + T + 1].astype(int)
        losses.append(state.model.loss(window[:, :-1], window[:, 1:]).item())
    state.model.train()
    return sum(losses) / len(losses)


def never_back_to_training(state, tokens):
    loss = evaluate(state.model, tokens, 2, state.block_size)
    state.model.eval()
    return loss


def without(name):
    """`save` and `load` that leave out a part."""

    def save(state):
        return {key: x for key, x in state.state_dict().items() if key != name}

    def load(state, saved):
        state.load_state_dict({name: state.state_dict()[name], **saved})

    return {"save": save, "load": load}


# --- ops, models and optimizers with a bug --------------------------------------------------------------------------


def attention(scale=-0.5, masked=True):
    """A version of the op with a consistent forward and backward: scores times D ** scale, a mask or none."""

    class Mine(CausalAttention):
        def forward(self, q, k, v):
            self.factor = q.shape[3] ** scale
            s = q @ k.swapaxes(-1, -2) * np.asarray(self.factor, q.dtype)
            s = np.where(causal_mask(np, *s.shape[2:]), s, -np.inf) if masked else s
            p = np.exp(s - s.max(-1, keepdims=True))
            p /= p.sum(-1, keepdims=True)
            self.save(q, k, v, p)
            return self.dropped(p) @ v

        def backward(self, dy):
            q, k, v, p = self.saved
            dp = self.dropped(dy @ v.swapaxes(-1, -2))
            ds = p * (dp - (dp * p).sum(-1, keepdims=True)) * np.asarray(self.factor, q.dtype)
            return ds @ k, ds.swapaxes(-1, -2) @ q, self.dropped(p).swapaxes(-1, -2) @ dy

    return override(CausalAttention, Mine)


class LosesRepeats(Embedding):
    def forward(self, weight, ids):
        self.shape = weight.shape
        self.save(ids)
        return weight[ids]

    def backward(self, dy):
        dweight = np.zeros(self.shape, dy.dtype)
        dweight[self.saved[0]] = dy
        return dweight, None


class NoVarianceTerm(LayerNorm):
    def forward(self, x, weight, bias):
        return LayerNorm.forward(self, x, weight, bias)

    def backward(self, dy):
        xhat, rstd, weight = self.saved
        g = dy * weight
        axes = tuple(range(dy.ndim - 1))
        return rstd * (g - g.mean(-1, keepdims=True)), (dy * xhat).sum(axes), dy.sum(axes) if self.needs[2] else None


class Composed(Attention):
    """Attention as it is written in a first lesson: product, mask, softmax, product."""

    power, masked, batch_first = -0.5, True, True

    def forward(self, x, cache=None):
        B, T, C = x.shape
        q, k, v = (self.heads(part, B, T) for part in self.c_attn(x).chunk(3, axis=-1))
        s = q @ k.swapaxes(-1, -2) * q.shape[-1] ** self.power
        if self.masked:
            s = ops.where(np.tri(T, dtype=bool), s, -math.inf)
        return self.drop(self.c_proj(self.joined(s.softmax() @ v, B, T, C)))

    def heads(self, x, B, T):
        return x.reshape(B, T, self.n_head, -1).swapaxes(1, 2)

    def joined(self, y, B, T, C):
        return y.swapaxes(1, 2).reshape(B, T, C)


class Unmasked(Composed):
    masked = False


class Unscaled(Composed):
    power = 0


class PreScaled(Composed):
    """Healthy: the queries are divided before the product."""

    power = 0

    def heads(self, x, B, T):
        self.turn = (getattr(self, "turn", 2) + 1) % 3
        x = super().heads(x, B, T)
        return x / math.sqrt(x.shape[-1]) if self.turn == 0 else x


class HeadsIn(Composed):
    """No transpose on the way in."""

    def heads(self, x, B, T):
        return x.reshape(B, self.n_head, T, -1)


class HeadsInAndOut(HeadsIn):
    """And none on the way out: causal again, but cut into pieces."""

    def joined(self, y, B, T, C):
        return y.reshape(B, T, C)


class HeadsOut(Composed):
    def joined(self, y, B, T, C):
        return y.reshape(B, T, C)


class HeadsInOp(Attention):
    """The same with the op."""

    def forward(self, x, cache=None):
        B, T, C = x.shape
        q, k, v = self.c_attn(x).reshape(B, 3 * self.n_head, T, -1).chunk(3, axis=1)
        y = ops.causal_attention(q, k, v, self.dropout, self.training)
        return self.drop(self.c_proj(y.swapaxes(1, 2).reshape(B, T, C)))


class NoPositions(GPT):
    def hidden(self, ids, cache=None):
        x = self.transformer.wte(ids)
        for block in self.transformer.h:
            x = block(x)
        return self.transformer.ln_f(x)


class OneGradient(GPT):
    """The output layer takes the tied weight as a constant."""

    def loss(self, ids, targets):
        return ops.linear_cross_entropy(self.hidden(ids), self.transformer.wte.weight.detach(), targets)


class AlwaysDrops(GPT):
    def hidden(self, ids, cache=None):
        return ops.dropout(super().hidden(ids, cache), 0.1)


class SumsLoss(GPT):
    def loss(self, ids, targets):
        return ops.cross_entropy(self(ids), targets, reduction="sum")


class ShiftsTwice(GPT):
    def loss(self, ids, targets):
        return ops.cross_entropy(self(ids)[:, :-1], targets[:, 1:])


class MixesSamples(GPT):
    def hidden(self, ids, cache=None):
        x = super().hidden(ids, cache)
        return x - x.mean(axis=0, keepdims=True)


def of(cls, **config):
    """A GPT of a class of its own."""
    model = gpt(**config)
    model.__class__ = cls
    return model


class Adam(AdamW):
    """AdamW with one mistake."""

    bug = ""

    def update(self, lists, options, coefficient):
        (beta1, beta2), eps = options["betas"], options["eps"]
        self.latest = max(getattr(self, "latest", 0) + 1, *lists[4]) if self.bug == "shared" else 0
        for p, g, m, v, t, lr, wd in zip(*lists, strict=True):
            g = g * coefficient
            if self.bug == "coupled":
                g = g + wd * p
            else:
                p *= 1 - (wd if self.bug == "decay not times lr" else lr * wd)
            m += (1 - beta1) * (g - m)
            v += (1 - beta2) * (g * g - v)
            t = {"shared": self.latest, "offset": t + 1}.get(self.bug, t)
            a, b = (1, 1) if self.bug == "uncorrected" else (1 - beta1**t, 1 - beta2**t)
            root = np.sqrt(v / b + eps) if self.bug == "eps inside" else np.sqrt(v / b) + eps
            p -= lr * (m / a) / root


def adam(bug):
    cls = type("Adam", (Adam,), {"bug": bug})
    return lambda model: cls(decay_groups(model, 0.3), 1e-3, (0.9, 0.99))


def incomplete(model):
    return AdamW(decay_groups(model, 0.3)[:1])


# The twenty bugs: (number in the list, expected name, state, loop, override).
BUGS = [
    (1, "no causal mask", lambda: make(gpt(Unmasked)), {}, None),
    (1, "no causal mask", make, {}, lambda: attention(masked=False)),
    (2, "embedding backward loses repeats", make, {}, lambda: override(Embedding, LosesRepeats)),
    (3, "heads mixed", lambda: make(gpt(HeadsIn)), {}, None),
    (3, "heads mixed", lambda: make(gpt(HeadsIn, n_layer=4)), {}, None),
    (3, "heads mixed", lambda: make(gpt(HeadsInAndOut)), {}, None),
    (3, "heads mixed", lambda: make(gpt(HeadsOut)), {}, None),
    (3, "heads mixed", lambda: make(gpt(HeadsInOp)), {}, None),
    (4, "no 1/sqrt(d)", make, {}, lambda: attention(scale=0)),
    (4, "no 1/sqrt(d)", lambda: make(gpt(Unscaled)), {}, None),
    (5, "no positions", lambda: make(of(NoPositions)), {}, None),
    (6, "no bias correction", lambda: make(optimizer=adam("uncorrected")), {}, None),
    (7, "one bias-correction step", lambda: make(optimizer=adam("shared")), {}, None),
    (8, "coupled decay", lambda: make(optimizer=adam("coupled")), {}, None),
    (9, "decay on layer norms and biases", lambda: make(optimizer=lambda m: AdamW(m.parameters())), {}, None),
    (10, "accumulation undivided", make, {"step": loop("undivided")}, None),
    (11, "ragged last micro-batch", make, {"step": loop("ragged")}, None),
    (12, "gradients never unscaled", make, {"step": loop("never unscaled")}, None),
    (12, "gradients never unscaled", lambda: make(dtype="float16"), {"step": loop("never unscaled")}, None),
    (13, "clipping before unscaling", make, {"step": loop("clipped before")}, None),
    (14, "clipping per tensor", make, {"step": loop("per tensor")}, None),
    (15, "a parameter that the optimizer does not hold", lambda: make(optimizer=incomplete), {}, None),
    (16, "tied weight gets one of its two gradients", lambda: make(of(OneGradient)), {}, None),
    (17, "schedule stepped per micro-batch", make, {"step": loop("schedule per micro-batch")}, None),
    (17, "schedule stepped per micro-batch", make, {"step": loop("step per micro-batch")}, None),
    (18, "dropout left on in evaluation", lambda: make(of(AlwaysDrops)), {}, None),
    (18, "dropout left on in evaluation", make, {"evaluate": evaluate_in_training_mode}, None),
    (19, "optimizer state lost at resume", make, without("optimizer"), None),
    (19, "random state lost at resume", make, {"step": loop("unseeded"), **without("random")}, None),
    (20, "validation text inside the training text", make, {"val_tokens": TRAIN[1000:3000]}, None),
]
# Others that the probes know.
MORE = [
    ("layer norm's backward without the variance's term", make, {}, lambda: override(LayerNorm, NoVarianceTerm)),
    ("sum for mean", lambda: make(of(SumsLoss)), {}, None),
    ("targets shifted twice", lambda: make(of(ShiftsTwice)), {}, None),
    ("targets not shifted", make, {"step": loop("targets not shifted")}, None),
    ("samples mixed", lambda: make(of(MixesSamples)), {}, None),
    ("the same batch at each step", make, {"step": loop("same batch")}, None),
    ("gradients not zeroed", make, {"step": loop("not zeroed")}, None),
    ("gradients zeroed in each micro-batch", make, {"step": loop("zeroed in between")}, None),
    ("small gradients rescaled", make, {"step": loop("rescaled")}, None),
    ("no clipping", make, {"step": loop("unclipped")}, None),
    ("schedule off by one", make, {"step": loop("off by one")}, None),
    ("parameters changed outside optimizer.step", make, {"step": loop("decays itself")}, None),
    ("bias correction counts wrong", lambda: make(optimizer=adam("offset")), {}, None),
    ("eps inside the root", lambda: make(optimizer=adam("eps inside")), {}, None),
    ("decay not times lr", lambda: make(optimizer=adam("decay not times lr")), {}, None),
    ("batches averaged wrongly", make, {"evaluate": mean_of_means}, None),
    ("training in evaluation mode", make, {"step": loop("no train()"), "evaluate": never_back_to_training}, None),
    ("step lost at resume", make, without("step"), None),
    ("scaler lost at resume", lambda: make(dtype="float16"), without("scaler"), None),
]


def findings(state, options, overridden):
    options = {"val_tokens": VAL, **options}
    if overridden is None:
        return probe.run(state(), TRAIN, **options).findings
    with overridden():
        return probe.run(state(), TRAIN, **options).findings


@pytest.mark.parametrize(
    ("number", "name", "state", "options", "overridden"), BUGS, ids=[f"{b[0]} {b[1]}" for b in BUGS]
)
def test_the_twenty_bugs_are_found_and_named(number, name, state, options, overridden):
    found = findings(state, options, overridden)
    assert found
    assert found[0].bug.startswith(name), "\n".join(map(str, found))


def test_the_table_holds_all_twenty():
    assert {case[0] for case in BUGS} == set(range(1, 21))


@pytest.mark.parametrize(("name", "state", "options", "overridden"), MORE, ids=[case[0] for case in MORE])
def test_other_bugs_are_found_and_named(name, state, options, overridden):
    found = findings(state, options, overridden)
    assert found
    assert found[0].bug.startswith(name), "\n".join(map(str, found))


# --- what is sound --------------------------------------------------------------------------------------------------


class Untied(GPT):
    """An output layer of its own."""

    def forward(self, ids):
        return self.head(self.hidden(ids))

    def loss(self, ids, targets):
        return ops.cross_entropy(self(ids), targets)


class Rotary(Attention):
    """Positions by rotated queries and keys alone (RoPE)."""

    def forward(self, x, cache=None):
        B, T, C = x.shape
        q, k, v = (a.reshape(B, T, self.n_head, -1).swapaxes(1, 2) for a in self.c_attn(x).chunk(3, axis=-1))
        y = ops.causal_attention(self.rotated(q), self.rotated(k), v)
        return self.c_proj(y.swapaxes(1, 2).reshape(B, T, C))

    def rotated(self, x):
        T, D = x.shape[-2:]
        angle = np.arange(T)[:, None] / 10_000 ** (2 * np.arange(D // 2) / D)
        cos, sin = np.cos(angle).astype(x.dtype), np.sin(angle).astype(x.dtype)
        a, b = x.chunk(2, axis=-1)
        return ops.cat([a * cos - b * sin, a * sin + b * cos], axis=-1)


class Relu(GPT):
    """Has kinks, which disturb finite differences."""

    def hidden(self, ids, cache=None):
        return ops.relu(super().hidden(ids, cache))


class Bigram(nn.Module):
    def __init__(self):
        self.embed = nn.Embedding(V, V)

    def loss(self, ids, targets):
        return ops.cross_entropy(self.embed(ids), targets)


def untied():
    model = of(Untied)
    model.head = nn.Linear(32, V, bias=False)
    return model


def rotary():
    model = gpt(Rotary)
    model.__class__ = NoPositions
    model.transformer.wpe.weight.requires_grad = False
    del model.transformer.wpe
    return model


def frozen():
    model = gpt()
    for p in model.transformer.h[0].parameters():
        p.requires_grad = False
    return model


def trained(steps=50, **config):
    state = make(steps=70, eval_every=0, **config)
    with threadpool_limits(1):
        for step in train(state, TRAIN, VAL[:100]):
            if step.step == steps:
                return state


HEALTHY = {
    "AdamW": make,
    "SGD": lambda: make(optimizer=lambda model: SGD(model.parameters())),
    "momentum": lambda: make(optimizer=lambda model: SGD(decay_groups(model, 0.1), momentum=0.9)),
    "Nesterov": lambda: make(optimizer=lambda model: SGD(model.parameters(), momentum=0.9, nesterov=True)),
    "an optimizer of one's own": lambda: make(optimizer=lambda model: Signs(model.parameters())),
    "AdamW rewritten": lambda: make(optimizer=adam("")),
    "groups with an lr of their own": lambda: make(
        optimizer=lambda m: AdamW(
            [{**g, "lr": lr} for g, lr in zip(decay_groups(m, 0.1), (1e-2, 1e-3), strict=True)], 1e-3
        )
    ),
    "float16": lambda: make(dtype="float16"),
    "dropout 0.5": lambda: make(gpt(dropout=0.5)),
    "no dropout": lambda: make(gpt(dropout=0.0)),
    "accumulation": lambda: make(accumulate=3),
    "ragged accumulation": lambda: make(accumulate=3, batch_size=10),
    "two threads": lambda: make(threads=2),
    "three threads, recompute": lambda: make(gpt(recompute=1, n_layer=3), threads=3),
    "recompute": lambda: make(gpt(recompute=1)),
    "no biases": lambda: make(gpt(bias=False)),
    "one layer, one head": lambda: make(gpt(n_layer=1, n_head=1)),
    "wide and flat": lambda: make(gpt(n_layer=1, n_head=8, n_embd=128)),
    "untied weights": lambda: make(untied()),
    "rotary positions": lambda: make(rotary()),
    "frozen layers": lambda: make(frozen()),
    "composed attention": lambda: make(gpt(Composed)),
    "queries divided first": lambda: make(gpt(PreScaled)),
    "LSTM": lambda: make(LSTM(V)),
    "MLP": lambda: make(MLP(V)),
    "kinks": lambda: make(of(Relu)),
    "bigrams, no forward": lambda: make(Bigram()),
    "no clipping": lambda: make(clip=0.0),
    "no warmup": lambda: make(warmup=0, min_lr=1e-4),
    "constant lr": lambda: TrainState(gpt(), TrainConfig(), schedule=lambda step: 1e-3),
    "short blocks": lambda: make(block_size=5),
    "after 50 steps": trained,
    "after 50 steps, SGD": lambda: trained(optimizer=lambda model: SGD(model.parameters(), momentum=0.9)),
    "after 50 steps, float16": lambda: trained(dtype="float16"),
    "finished": lambda: trained(70),
}


@pytest.mark.parametrize("name", HEALTHY)
def test_nothing_is_found_in_what_is_sound(name):
    report = probe.run(HEALTHY[name](), TRAIN, VAL)
    assert report.findings == [], report
    assert len(report.results) == len(probe.PROBES)


@pytest.mark.parametrize("state", [make, lambda: trained(30, dtype="float16")], ids=["new", "trained"])
def test_nothing_is_found_in_a_sound_loop_of_ones_own(state):
    assert probe.run(state(), TRAIN, VAL, step=loop()).findings == []


def test_nothing_is_found_with_the_faster_engines(twins):
    assert probe.run(make(), TRAIN, VAL).findings == []


@pytest.mark.parametrize("block_size", [1, 2, 3])
def test_the_smallest_models(block_size):
    random.seed(1)
    model = GPT(GPTConfig(V, block_size, n_layer=1, n_head=1, n_embd=4))
    assert probe.run(make(model, block_size=0), TRAIN, VAL).findings == []


# --- what a probe is ------------------------------------------------------------------------------------------------


def everything(state):
    """All that a run could change, as bytes and numbers."""
    entries = state.optimizer.state_dict()["state"]
    return copy.deepcopy(
        {
            "model": {name: a.tobytes() for name, a in state.model.state_dict().items()},
            "grads": [None if p.grad is None else p.grad.tobytes() for p in state.model.parameters()],
            "training": [m.training for m in state.model.modules()],
            "classes": [type(m) for m in state.model.modules()],
            "optimizer": {(i, k): x if k == "step" else x.tobytes() for i, e in entries.items() for k, x in e.items()},
            "groups": [{k: x for k, x in g.items() if k != "params"} for g in state.optimizer.param_groups],
            "scaler": vars(state.scaler),
            "random": random.state(),
            "numpy": np.random.get_state()[1].tolist(),  # noqa: NPY002
            "rest": {k: x for k, x in vars(state).items() if isinstance(x, int | float | None | TrainConfig)},
        }
    )


@pytest.mark.parametrize("options", [{}, {"step": loop("unseeded")}, {"evaluate": never_back_to_training}], ids=str)
def test_a_state_is_left_as_it_was(options):
    state = trained(3, dtype="float16")
    state.model.eval()
    state.model.loss(*get_batch(TRAIN, 2, 32, 0, 0)).backward()
    random.seed(5, 6)
    before = everything(state)
    probe.run(state, TRAIN, VAL, **options)
    assert everything(state) == before


def test_each_probe_runs_by_itself_and_has_a_name():
    state = make()
    for name, each in probe.PROBES.items():
        result = each(state, TRAIN, VAL)
        assert getattr(probe, name) is each
        assert result.probe == name
        assert result.measured
        assert each.__doc__
        assert not result.bug
    assert probe.positions(make(of(NoPositions)), TRAIN).bug.startswith("no positions: ")
    assert probe.clipping(state, TRAIN, step=loop("per tensor")).bug.startswith("clipping per tensor: ")


def test_the_report_is_a_table():
    report = probe.run(make(of(NoPositions)), TRAIN)
    lines = str(report).splitlines()
    assert len(lines) == len(probe.PROBES) + len(report.findings)
    assert max(map(len, lines)) <= 130
    found = next(i for i, line in enumerate(lines) if line.startswith("FOUND positions"))
    assert lines[found + 1].strip() == report.findings[0].bug
    assert "-     leakage       no val_tokens given" in lines


def test_a_loop_that_forgets_its_argument_is_refused():
    other = make()

    def step(state, tokens):
        loop()(other, tokens)

    with pytest.raises(ValueError, match="changed another state than its argument"):
        probe.accumulation(other, TRAIN, step=step)


def test_a_loop_that_cannot_be_watched_is_skipped():
    def step(state, tokens):
        state.step += 1

    result = probe.accumulation(make(), TRAIN, step=step)
    assert (result.skipped, result.measured) == (True, "the step does not call state.model.loss")


def test_an_error_inside_a_probe_is_its_finding():
    def step(state, tokens):
        raise KeyError("lr")

    report = probe.run(make(), TRAIN, step=step)
    assert {found.bug for found in report.findings} == {"KeyError: 'lr'"}
    assert "causality" not in [found.probe for found in report.findings]
    with pytest.raises(ValueError, match="too few for a block of 32"):
        probe.run(make(), TRAIN[:20])


def test_they_take_seconds():
    random.seed(1)
    state = make(GPT(GPTConfig(V, 64, n_layer=2, n_head=4, n_embd=64)), block_size=64)
    started = time.perf_counter()
    probe.run(state, TRAIN, VAL)
    assert time.perf_counter() - started < 5
