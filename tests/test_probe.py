"""Probes: they find the silent bugs and name them, find nothing in what is sound, and change nothing."""

import contextlib
import copy
import json
import math
import shutil
import subprocess
import sys
import time

import numpy as np
import pytest
from test_any_model import LSTM, MLP, Signs
from threadpoolctl import threadpool_limits

from tinylm import GPT, GPTConfig, Op, data, nn, ops, optim, override, precision, probe, random, reference_only
from tinylm.data import get_batch
from tinylm.gpt import Attention
from tinylm.ops.attention import CausalAttention
from tinylm.ops.embedding import Embedding
from tinylm.ops.gelu import Gelu
from tinylm.ops.layer_norm import LayerNorm
from tinylm.optim import SGD, AdamW, clip_grad_norm_, decay_groups
from tinylm.probe import command
from tinylm.runs import Run
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


def large():
    """Initial weights thirty times too large."""
    model = gpt()
    for p in model.parameters():
        p.data *= 30
    return model


def constant():
    """The state of a run whose learning rate does not change."""
    return TrainState(gpt(), TrainConfig(), schedule=lambda step: 1e-3)


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
        y = {"targets not shifted": x, "targets shifted twice": np.roll(y, -1, 1), "other targets": y[:, ::-1]}.get(
            bug, y
        )
        size = math.ceil(len(x) / config.accumulate)
        if bug != "not zeroed":
            optimizer.zero_grad()
        for first in range(0, len(x), size):
            part = slice(first, first + size)
            if bug == "zeroed in between":
                optimizer.zero_grad()
            weight = len(x[part]) / len(x)
            weight = {"undivided": 1, "ragged": 1 / config.accumulate, "reversed": 1 - weight or 1}.get(bug, weight)
            loss = model.loss(x[part], y[part]) * weight
            (loss if bug == "never scaled" else scaler.scale(loss)).backward()
            if bug == "update per micro-batch":
                optimizer.step()
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
        elif bug == "by value":
            for p in parameters:
                np.clip(p.grad, -config.clip / 100, config.clip / 100, out=p.grad)
        elif bug == "rescaled":
            norm = math.sqrt(sum(float((p.grad**2).sum()) for p in parameters))
            for p in parameters:
                p.grad *= np.float32(config.clip / norm)
        elif bug == "normalised tensors":
            for p in parameters:
                p.grad /= np.linalg.norm(p.grad)
        elif bug not in ("clipped before", "unclipped"):
            clip_grad_norm_(parameters, 1.0 if bug == "clipped at 1" else config.clip)
        at = {
            "schedule per micro-batch": state.ticks,
            "lr per micro-batch": (state.step + 1) * config.accumulate - 1,
            "off by one": state.step + 1,
        }
        optimizer.set_lr(1e-3 if bug == "constant lr" else state.schedule(at.get(bug, state.step)))
        scaler.step(optimizer)
        scaler.update()
        if bug == "decays itself":
            for p in parameters:
                p.data *= 0.999
        state.step += {"step per micro-batch": 0, "step not counted": 0}.get(bug, 1)

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


def still_training(state, tokens):
    state.optimizer.zero_grad()
    state.model.loss(*get_batch(tokens, 2, state.block_size, 0, 0)).backward()
    state.optimizer.step()
    return 1.0


def without(name):
    """`save` and `load` that leave out a part."""

    def save(state):
        return {key: x for key, x in state.state_dict().items() if key != name}

    def load(state, saved):
        state.load_state_dict({name: state.state_dict()[name], **saved})

    return {"save": save, "load": load}


# --- ops, models and optimizers with a bug --------------------------------------------------------------------------


def attention(scale=-0.5, diagonal=0, whole=False, after=False):
    """A version of the op with a consistent forward and backward: scores times D ** scale, a mask moved or late."""

    class Mine(CausalAttention):
        def forward(self, q, k, v):
            self.factor = np.asarray((q.shape[3] * (q.shape[1] if whole else 1)) ** scale, q.dtype)
            s = q @ k.swapaxes(-1, -2) * self.factor
            mask = np.tri(*s.shape[2:], diagonal, dtype=bool)
            s = s if after else np.where(mask, s, -np.inf)
            p = np.exp(s - s.max(-1, keepdims=True))
            p /= p.sum(-1, keepdims=True)
            p = np.where(mask, p, 0) if after else p
            self.save(q, k, v, p)
            return self.dropped(p) @ v

        def backward(self, dy):
            q, k, v, p = self.saved
            dp = self.dropped(dy @ v.swapaxes(-1, -2))
            ds = p * (dp - (dp * p).sum(-1, keepdims=True)) * self.factor
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


class MyEmbedding(Op):
    """An op of a student's own, with the same bug."""

    forward, backward = LosesRepeats.forward, LosesRepeats.backward


def layer_norm(mean, variance):
    """Layer norm with a backward that lacks a term."""

    class Mine(LayerNorm):
        def forward(self, x, weight, bias):
            return LayerNorm.forward(self, x, weight, bias)

        def backward(self, dy):
            xhat, rstd, weight = self.saved
            g, axes = dy * weight, tuple(range(dy.ndim - 1))
            dx = rstd * (g - mean * g.mean(-1, keepdims=True) - variance * xhat * (g * xhat).mean(-1, keepdims=True))
            return dx, (dy * xhat).sum(axes), dy.sum(axes) if self.needs[2] else None

    return override(LayerNorm, Mine)


def gelu(forward=1.0, backward=1.0):
    class Mine(Gelu):
        def forward(self, x):
            return Gelu.forward(self, x) * x.dtype.type(forward)

        def backward(self, dy):
            return Gelu.backward(self, dy) * dy.dtype.type(backward)

    return override(Gelu, Mine)


class Float32Gelu(Gelu):
    """Like a compiled twin it takes float32 alone, so finite differences cannot check it; and it is wrong."""

    def forward(self, x):
        if x.dtype != np.float32:
            raise TypeError("float32 alone")
        return Gelu.forward(self, x)

    def backward(self, dy):
        return 1.01 * Gelu.backward(self, dy)


def adamw_uncorrected(params, grads, ms, vs, steps, lrs, decays, betas, eps, coefficient=1.0):
    for p, g, m, v, lr, wd in zip(params, grads, ms, vs, lrs, decays, strict=True):
        g = g * coefficient
        p *= 1 - lr * wd
        m += (1 - betas[0]) * (g - m)
        v += (1 - betas[1]) * (g * g - v)
        p -= lr * m / (np.sqrt(v) + eps)


def clip_each(parameters, max_norm):
    return max(clip_grad_norm_([p], max_norm) for p in list(parameters))


def unscale_nothing(grads, factor):
    return True


class Composed(Attention):
    """Attention as it is written in a first lesson: product, mask, softmax, product."""

    power, masked, diagonal, whole = -0.5, True, 0, False

    def forward(self, x, cache=None):
        B, T, C = x.shape
        q, k, v = (self.heads(part, B, T) for part in self.c_attn(x).chunk(3, axis=-1))
        s = q @ k.swapaxes(-1, -2) * (C if self.whole else q.shape[-1]) ** self.power
        if self.masked:
            s = ops.where(np.tri(T, k=self.diagonal, dtype=bool), s, -math.inf)
        return self.drop(self.c_proj(self.joined(s.softmax() @ v, B, T, C)))

    def heads(self, x, B, T):
        return x.reshape(B, T, self.n_head, -1).swapaxes(1, 2)

    def joined(self, y, B, T, C):
        return y.swapaxes(1, 2).reshape(B, T, C)


class Unmasked(Composed):
    masked = False


class SeesTheNext(Composed):
    diagonal = 1


class WholeWidth(Composed):
    whole = True


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


class TwoSoftmaxes(GPT):
    def loss(self, ids, targets):
        return ops.cross_entropy(self(ids).softmax(), targets)


class OwnInput(GPT):
    def loss(self, ids, targets):
        return ops.cross_entropy(self(ids), ids)


class TwiceTheLoss(GPT):
    def loss(self, ids, targets):
        return super().loss(ids, targets) * 2


class FixedPositions(GPT):
    """The position embedding is cut off from the graph."""

    def hidden(self, ids, cache=None):
        t = self.transformer
        x = t.wte(ids) + t.wpe.weight.detach()[: ids.shape[1]]
        for block in t.h:
            x = block(x)
        return t.ln_f(x)


class HalfGradient(GPT):
    """The last layer norm gets half of its gradient: the other half flows through a constant."""

    def hidden(self, ids, cache=None):
        x = super().hidden(ids, cache)
        return x * 0.5 + x.detach() * 0.5


class MyLookup(GPT):
    def hidden(self, ids, cache=None):
        t = self.transformer
        x = MyEmbedding.apply(t.wte.weight, ids) + t.wpe(np.arange(ids.shape[1]))
        for block in t.h:
            x = block(x)
        return t.ln_f(x)


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
        if self.bug == "shared":
            self.latest = max(getattr(self, "latest", 0) + 1, *lists[4])
        for p, g, m, v, t, lr, wd in zip(*lists, strict=True):
            g = g * coefficient
            if self.bug == "coupled":
                g = g + wd * p
            else:
                p *= 1 - {"decay not times lr": wd, "half decay": lr * wd / 2, "decays all": lr * 0.3}.get(
                    self.bug, lr * wd
                )
            m += (1 - beta1) * (g - m)
            v += (1 - beta2) * (g * g - v)
            t = {"shared": getattr(self, "latest", 0), "offset": t + 1}.get(self.bug, t)
            a = 1 if self.bug in ("uncorrected", "m uncorrected") else 1 - beta1**t
            b = 1 if self.bug in ("uncorrected", "v uncorrected") else 1 - beta2**t
            root = np.sqrt(v / b + eps) if self.bug == "eps inside" else np.sqrt(v / b) + eps
            p -= lr * (m / a) / root * (0.5 if self.bug == "half" else 1)


def adam(bug):
    cls = type("Adam", (Adam,), {"bug": bug})
    return lambda model: cls(decay_groups(model, 0.3), 1e-3, (0.9, 0.99))


def incomplete(model):
    return AdamW(decay_groups(model, 0.3)[:1])


# The twenty bugs: (number in the list, expected name, state, loop, override).
BUGS = [
    (1, "no causal mask", lambda: make(gpt(Unmasked)), {}, None),
    (1, "no causal mask", make, {}, lambda: attention(diagonal=99)),
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
# Others that the probes know: (probe, expected name, state, loop, override).
MORE = [
    ("batches", "targets not shifted", make, {"step": loop("targets not shifted")}, None),
    ("batches", "targets shifted twice", make, {"step": loop("targets shifted twice")}, None),
    ("batches", "targets are not the next tokens", make, {"step": loop("other targets")}, None),
    ("batches", "the same batch at each step", make, {"step": loop("same batch")}, None),
    ("samples", "samples mixed", lambda: make(of(MixesSamples)), {}, None),
    ("causality", "no causal mask", lambda: make(zeroed(Unmasked)), {}, None),
    ("causality", "mask off by one", lambda: make(gpt(SeesTheNext)), {}, None),
    ("ops", "mask off by one", make, {}, lambda: attention(diagonal=1)),
    ("ops", "mask after the softmax", make, {}, lambda: attention(after=True)),
    ("scale", "1/sqrt(d) of the wrong d", lambda: make(gpt(WholeWidth)), {}, None),
    ("ops", "1/sqrt(d) of the wrong d", make, {}, lambda: attention(whole=True)),
    ("loss", "sum for mean", lambda: make(of(SumsLoss)), {}, None),
    ("loss", "targets not shifted", lambda: make(of(OwnInput)), {}, None),
    ("loss", "targets shifted twice", lambda: make(of(ShiftsTwice)), {}, None),
    ("loss", "softmax applied twice", lambda: make(of(TwoSoftmaxes)), {}, None),
    ("loss", "another loss", lambda: make(of(TwiceTheLoss)), {}, None),
    ("first_loss", "initial weights too large", lambda: make(large()), {}, None),
    ("ops", "embedding backward loses repeats", lambda: make(of(MyLookup)), {}, None),
    ("ops", "layer norm's backward without the variance's term", make, {}, lambda: layer_norm(1, 0)),
    ("ops", "layer norm's backward without the mean's term", make, {}, lambda: layer_norm(0, 1)),
    ("ops", "layer norm's backward without both terms", make, {}, lambda: layer_norm(0, 0)),
    ("ops", "wrong forward of Gelu", make, {}, lambda: gelu(1.001)),
    ("ops", "wrong backward of Gelu", make, {}, lambda: gelu(1, 1.001)),
    ("ops", "wrong backward of Gelu", make, {}, lambda: override(Gelu, Float32Gelu)),
    ("ops", "wrong backward of Gelu", lambda: make(dtype="float16"), {}, lambda: gelu(1, 1.1)),
    ("gradient", "unused parameter", lambda: make(of(NoPositions)), {}, None),
    ("gradient", "parameter without a gradient", lambda: make(of(FixedPositions)), {}, None),
    ("gradient", "wrong gradient", lambda: make(of(HalfGradient)), {}, None),
    ("update", "no bias correction", make, {}, lambda: override(optim.adamw, adamw_uncorrected)),
    ("update", "no bias correction", lambda: trained(3, optimizer=adam("uncorrected")), {}, None),
    ("update", "bias correction of the first moment missing", lambda: make(optimizer=adam("m uncorrected")), {}, None),
    ("update", "bias correction of the second moment missing", lambda: make(optimizer=adam("v uncorrected")), {}, None),
    ("update", "bias correction counts wrong", lambda: make(optimizer=adam("offset")), {}, None),
    ("update", "eps inside the root", lambda: make(optimizer=adam("eps inside")), {}, None),
    ("update", "another update", lambda: make(optimizer=adam("half")), {}, None),
    ("decay", "decay not times lr", lambda: make(optimizer=adam("decay not times lr")), {}, None),
    ("decay", "decay on layer norms and biases", lambda: make(optimizer=adam("decays all")), {}, None),
    ("decay", "wrong decay", lambda: make(optimizer=adam("half decay")), {}, None),
    ("accumulation", "gradients zeroed in each micro-batch", make, {"step": loop("zeroed in between")}, None),
    ("accumulation", "micro-batches weighted wrongly", make, {"step": loop("reversed")}, None),
    ("accumulation", "gradient scaled by", make, {"step": loop("clipped at 1")}, None),
    ("accumulation", "another gradient", make, {"step": loop("normalised tensors")}, None),
    ("accumulation", "one update for each micro-batch", make, {"step": loop("update per micro-batch")}, None),
    ("accumulation", "parameters changed outside optimizer.step", make, {"step": loop("decays itself")}, None),
    ("zeroing", "gradients not zeroed", make, {"step": loop("not zeroed")}, None),
    ("unscaling", "gradients never unscaled", make, {}, lambda: override(precision.unscale, unscale_nothing)),
    ("unscaling", "gradients unscaled, but the loss was never scaled", make, {"step": loop("never scaled")}, None),
    ("clipping", "small gradients rescaled", make, {"step": loop("rescaled")}, None),
    ("clipping", "no clipping", make, {"step": loop("unclipped")}, None),
    ("clipping", "clipping per tensor", make, {}, lambda: override(clip_grad_norm_, clip_each)),
    ("clipping", "clipping is not by the global norm", make, {"step": loop("by value")}, None),
    ("schedule", "schedule off by one", make, {"step": loop("off by one")}, None),
    ("schedule", "schedule off by one", lambda: trained(30), {"step": loop("off by one")}, None),
    ("schedule", "schedule off by one", lambda: trained(70), {"step": loop("off by one")}, None),
    ("schedule", "schedule stepped per micro-batch", make, {"step": loop("lr per micro-batch")}, None),
    (
        "schedule",
        "schedule stepped per micro-batch",
        lambda: trained(9),
        {"step": loop("lr per micro-batch")},
        None,
    ),
    ("schedule", "the schedule is not followed", make, {"step": loop("constant lr")}, None),
    ("schedule", "state.step must rise by one", constant, {"step": loop("step not counted")}, None),
    ("evaluation", "batches averaged wrongly", make, {"evaluate": mean_of_means}, None),
    ("evaluation", "evaluation changes the parameters", make, {"evaluate": still_training}, None),
    (
        "evaluation",
        "training in evaluation mode",
        make,
        {"step": loop("no train()"), "evaluate": never_back_to_training},
        None,
    ),
    ("resuming", "optimizer state lost at resume", lambda: trained(70), without("optimizer"), None),
    ("resuming", "weights lost at resume", make, without("model"), None),
    ("resuming", "step lost at resume", make, without("step"), None),
    ("resuming", "scaler lost at resume", lambda: make(dtype="float16"), without("scaler"), None),
    ("resuming", "state lost at resume", make, {"step": loop("schedule per micro-batch")}, None),
]


def first_finding(state, options, overridden):
    """What `run` would list first."""
    options = {"val_tokens": VAL, **options}
    with overridden() if overridden else contextlib.nullcontext():
        results = (each(state, TRAIN, **options) for each in probe.PROBES.values())
        return next((result for result in results if result.bug), None)


@pytest.mark.parametrize(
    ("number", "name", "state", "options", "overridden"), BUGS, ids=[f"{b[0]} {b[1]}" for b in BUGS]
)
def test_the_twenty_bugs_are_found_and_named(number, name, state, options, overridden):
    found = first_finding(state(), options, overridden)
    assert found is not None
    assert found.bug.startswith(name), found


def test_the_table_holds_all_twenty():
    assert {case[0] for case in BUGS} == set(range(1, 21))


@pytest.mark.parametrize(
    ("name", "bug", "state", "options", "overridden"), MORE, ids=[f"{case[0]}: {case[1]}" for case in MORE]
)
def test_other_bugs_are_found_and_named(name, bug, state, options, overridden):
    with overridden() if overridden else contextlib.nullcontext():
        result = probe.PROBES[name](state(), TRAIN, **options)
    assert result.bug.startswith(bug), result


@pytest.mark.parametrize(
    ("name", "bug", "diagonal", "scale"), [("causality", "no causal mask", 99, -0.5), ("ops", "no 1/sqrt(d)", 0, 0)]
)
def test_a_reference_that_was_changed_is_found_too(name, bug, diagonal, scale, monkeypatch):
    mine = attention(scale, diagonal).replacement
    monkeypatch.setattr(CausalAttention, "forward", mine.forward)
    monkeypatch.setattr(CausalAttention, "backward", mine.backward)
    with reference_only():
        assert probe.PROBES[name](make(), TRAIN).bug.startswith(bug)


def test_repeats_are_lost_in_a_text_without_repeats():
    with override(Embedding, LosesRepeats):
        result = probe.ops(make(block_size=3), np.arange(V))
    assert result.bug.startswith("embedding backward loses repeats")


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


def zeroed(attention=None):
    """Residual projections and positions that begin at zero: at first, no prediction depends on an earlier token."""
    model = gpt(attention)
    for name, p in model.named_parameters():
        if "c_proj" in name or "wpe" in name:
            p.data[...] = 0
    return model


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
    "weights of zero": lambda: make(zeroed()),
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
    "constant lr": constant,
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


def test_nothing_is_found_in_a_plain_loop():
    """Without loss scaling, micro-batches of a whole batch each, and a model with NumPy's own random numbers."""

    class Noisy(GPT):
        def hidden(self, ids, cache=None):
            x = super().hidden(ids, cache)
            return x * (1 + 0.1 * np.random.randn(*x.shape).astype(x.dtype)) if self.training else x  # noqa: NPY002

    def step(state, tokens):
        model, optimizer, K = state.model.train(), state.optimizer, state.config.accumulate
        for p in model.parameters():
            p.grad = None
        np.random.seed(state.step)  # noqa: NPY002
        for i in range(K):
            x, y = get_batch(tokens, state.config.batch_size, state.block_size, i, state.step)
            (model.loss(x, y) / K).backward()
        clip_grad_norm_(model.parameters(), state.config.clip)
        optimizer.set_lr(state.schedule(state.step))
        optimizer.step()
        state.step += 1

    assert probe.run(make(of(Noisy)), TRAIN, VAL, step=step).findings == []


def test_a_few_validation_tokens_say_nothing():
    assert probe.leakage(make(), TRAIN, TRAIN[:20]).skipped


def test_a_state_on_a_gpu_is_probed_on_the_cpu(strict_cupy_module):
    state = trained(2)
    state.model.to("cuda")
    state.optimizer.load_state_dict(state.optimizer.state_dict())
    assert probe.run(state, TRAIN, VAL).findings == []
    assert next(state.model.parameters()).device == "cuda"


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
    assert "-     leakage       no val_tokens given, or fewer than 64" in lines


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


# --- the command ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    """A run of two steps on a text beside it."""
    folder = tmp_path_factory.mktemp("probed")
    (folder / "text.txt").write_text(TEXT, encoding="utf-8")
    state = make(batch_size=2, steps=4)
    run = Run(folder / "run")
    run.start({"data": str(folder / "text.txt")})
    for step in train(state, TRAIN, VAL[:100]):
        if step.step in (1, 2):
            run.save(state, TOKENIZER, data.fingerprint(TOKENIZER.encode(TEXT)))
        if step.step == 2:
            return folder


def tell(monkeypatch, capsys, *arguments):
    """(exit status, what it prints) of `tinylm probe`."""
    monkeypatch.setattr("sys.argv", ["tinylm probe", *map(str, arguments)])
    monkeypatch.setattr(command.fused, "load", lambda tell: ())  # the engines would stay in force for other tests
    try:
        command.main()
        status = 0
    except SystemExit as end:
        status = end.code
    printed = capsys.readouterr()
    return status, printed.out + printed.err


def test_the_command_prints_the_table_of_the_newest_checkpoint(run_folder, monkeypatch, capsys):
    status, printed = tell(monkeypatch, capsys, run_folder / "run")
    lines = printed.splitlines()
    assert status == 0, printed
    assert lines[0].endswith("parameters after 2 steps")
    assert len(lines) == len(probe.PROBES) + 2
    assert lines[-1] == "nothing found"
    assert "0 of 32 pieces of 64 validation tokens" in printed


def test_the_command_exits_with_1_if_something_is_found(run_folder, monkeypatch, capsys):
    with override(Embedding, LosesRepeats):
        status, printed = tell(monkeypatch, capsys, run_folder / "run")
    assert status == 1
    assert "FOUND ops" in printed
    assert printed.endswith("found: 2\n")


def test_the_command_without_the_data_or_with_a_damaged_checkpoint(run_folder, tmp_path, monkeypatch, capsys):
    shutil.copytree(run_folder / "run", tmp_path / "run")
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    (tmp_path / "run" / "config.json").write_text(json.dumps({**config, "data": str(tmp_path / "lost.txt")}))
    newest = tmp_path / "run" / "checkpoints" / "step-00000002"
    (newest / "model.safetensors").write_bytes(b"broken")
    status, printed = tell(monkeypatch, capsys, tmp_path / "run")
    assert status == 0, printed
    assert "going back to an older checkpoint" in printed
    assert "parameters after 1 steps" in printed
    assert "the tokens are random (cannot read" in printed
    assert "no val_tokens given" in printed
    shutil.rmtree(newest.with_name("step-00000001"))
    status, printed = tell(monkeypatch, capsys, tmp_path / "run")
    assert (status, printed.splitlines()[-1]) == (
        2,
        f"tinylm probe: error: no checkpoint in {tmp_path / 'run'} is sound",
    )


def test_the_command_says_when_the_data_have_changed(run_folder, tmp_path, monkeypatch, capsys):
    shutil.copytree(run_folder / "run", tmp_path / "run")
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    (tmp_path / "other.txt").write_text(TEXT[:30_000], encoding="utf-8")
    (tmp_path / "run" / "config.json").write_text(json.dumps({**config, "data": str(tmp_path / "other.txt")}))
    status, printed = tell(monkeypatch, capsys, tmp_path / "run")
    assert status == 0
    assert "note: the data have changed since the run was started" in printed


@pytest.mark.parametrize(
    ("model", "optimizer", "message"),
    [
        (lambda: LSTM(V), None, "holds a model of class LSTM: probe it in Python, by tinylm.probe.run"),
        (gpt, lambda model: SGD(model.parameters(), momentum=0.9), "was not trained by AdamW"),
    ],
)
def test_a_run_that_the_command_cannot_make_again(model, optimizer, message, tmp_path, monkeypatch, capsys):
    state = make(model(), optimizer, steps=1)
    next(train(state, TRAIN, VAL[:100]))
    run = Run(tmp_path)
    run.start()
    run.save(state, TOKENIZER, "")
    status, printed = tell(monkeypatch, capsys, tmp_path)
    assert status == 2
    assert message in printed
    assert printed.count("\n") == 1


def test_importing_tinylm_does_not_import_the_probes():
    code = "import sys, tinylm; print([name for name in sys.modules if name.startswith('tinylm.probe')])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
