"""A sound training run, small and in parts, so that a bug is one part that was replaced (see `broken`).

A GPT of 27,000 parameters learns a language of 8 symbols. Everything that tinylm does in one op or one loop is written
out in pieces: attention, the model, AdamW, a step, an evaluation. It is slower, and computes the same.
"""

import contextvars
import copy
import math
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, ClassVar

import numpy as np
from threadpoolctl import threadpool_limits

from ... import gpt, ops, optim, probe, random
from ...autograd import Op, no_grad
from ...data import Markov, get_batch
from ...precision import autocast
from ...probe.subject import Result
from ...registry import override
from ...tensor import Tensor
from ...training import TrainConfig, TrainState

LANGUAGE = Markov()


class Attention(gpt.Attention):
    """Causal attention out of smaller ops: (B, T, C) -> (B, T, C)."""

    def forward(self, x: Tensor, cache: Any = None) -> Tensor:
        q, k, v = (self.heads(part) for part in self.c_attn(x).chunk(3, axis=-1))
        p = self.masked(q @ k.swapaxes(-1, -2) * self.scale(q.shape[-1])).softmax()
        return self.drop(self.c_proj(self.joined(p @ v)))

    def heads(self, x: Tensor) -> Tensor:
        B, T, _ = x.shape
        return x.reshape(B, T, self.n_head, -1).swapaxes(1, 2)  # (B, H, T, D)

    def scale(self, D: int) -> float:
        return 1 / math.sqrt(D)

    def masked(self, scores: Tensor) -> Tensor:
        past = np.tri(scores.shape[-1], dtype=bool)
        return ops.where(past, scores, -math.inf)

    def joined(self, y: Tensor) -> Tensor:
        B, H, T, D = y.shape
        return y.swapaxes(1, 2).reshape(B, T, H * D)


class GPT(gpt.GPT):
    """The model of `tinylm.gpt`, without a cache; its loss by way of the logits."""

    def embedded(self, ids: Any) -> Tensor:
        t = self.transformer
        return t.wte(ids) + t.wpe(np.arange(ids.shape[1]))

    def hidden(self, ids: Any, cache: Any = None) -> Tensor:
        t = self.transformer
        x = t.drop(self.embedded(ids))
        for block in t.h:
            x = block(x)
        return t.ln_f(x)

    def forward(self, ids: Any) -> Tensor:
        return ops.linear(self.hidden(ids), self.transformer.wte.weight)

    def loss(self, ids: Any, targets: Any) -> Tensor:
        return ops.cross_entropy(self(ids), targets)


class AdamW(optim.AdamW):
    """AdamW as in lesson 08, one parameter after another."""

    def update(self, lists: Any, options: Any, coefficient: Any) -> None:
        (beta1, beta2), eps = options["betas"], options["eps"]
        for p, g, m, v, t, lr, decay in zip(*lists, strict=True):
            g = self.decayed(p, g * coefficient, lr, decay)
            m += (1 - beta1) * (g - m)
            v += (1 - beta2) * (g * g - v)
            c1, c2 = self.correction(beta1, beta2, t)
            p -= lr * (m / c1) / (np.sqrt(v / c2) + eps)

    def decayed(self, p: Any, g: Any, lr: float, decay: float) -> Any:
        p *= 1 - lr * decay
        return g

    def correction(self, beta1: float, beta2: float, t: int) -> tuple[float, float]:
        return 1 - beta1**t, 1 - beta2**t


class Run:
    """The sound run. A subclass is a run with a bug: it replaces one part, and says what that is called.

    `step`, `evaluate`, `save` and `load` are what `probe.run` takes. Inside `in_force()`, its ops are in force.
    """

    name, probe, tells = "", "", ""

    attention, model, adamw = Attention, GPT, AdamW
    replaced: ClassVar[dict[type[Op], type[Op]]] = {}
    dtype = "float32"
    config = TrainConfig(steps=600, batch_size=16, accumulate=3, lr=2e-2, warmup=30, weight_decay=0.1, seed=1)
    resumes = 300  # the run is stopped after this step, and resumed

    @contextmanager
    def in_force(self) -> Iterator[None]:
        with ExitStack() as stack:
            stack.enter_context(threadpool_limits(1, "blas"))
            stack.enter_context(warnings.catch_warnings())
            warnings.filterwarnings("ignore", ".* never ran", RuntimeWarning)  # some probes need not run the wrong op
            for op, mine in self.replaced.items():
                stack.enter_context(override(op, mine))
            yield

    # --- what a run is made of ---

    def texts(self) -> tuple[np.ndarray, np.ndarray]:
        """(the tokens to learn from, fresh ones)."""
        return LANGUAGE.tokens(50_000, seed=1), LANGUAGE.tokens(3_000, seed=2)

    def new_model(self) -> Any:
        model = self.model(gpt.GPTConfig(LANGUAGE.V, 32, n_layer=2, n_head=4, n_embd=32, dropout=0.1))
        for block in model.transformer.h:
            block.attn.__class__ = self.attention
        for p in model.parameters():
            p.data = self.initial(p.data)
        return model

    def initial(self, weights: np.ndarray) -> np.ndarray:
        return weights

    def groups(self, model: Any) -> list[dict[str, Any]]:
        """Matrices decay; biases and layer norms do not."""
        return optim.decay_groups(model, self.config.weight_decay)

    def state(self) -> TrainState:
        """The state of a run that begins."""
        config = TrainConfig(**{**vars(self.config), "dtype": self.dtype})
        random.seed(config.seed)
        model = self.new_model()
        return TrainState(model, config, self.adamw(self.groups(model), config.lr, (config.beta1, config.beta2)))

    # --- a step ---

    def step(self, state: TrainState, tokens: np.ndarray) -> tuple[float, float]:
        """One update. Returns what a log shows: the loss, and the norm of the gradient before clipping."""
        state.model.train()
        x, y = self.batch(state, tokens)
        self.zero(state)
        loss, n = 0.0, math.ceil(len(x) / state.config.accumulate)
        for i in range(0, len(x), n):
            weight = self.weight(len(x[i : i + n]), len(x), state.config.accumulate)
            with autocast(state.config.dtype):
                part = state.model.loss(x[i : i + n], y[i : i + n])  # type: ignore[attr-defined]
            state.scaler.scale(part * weight).backward()
            loss += part.item() * len(x[i : i + n]) / len(x)
        norm = self.unscaled_and_clipped(state)
        state.optimizer.set_lr(state.schedule(self.time(state)))
        state.scaler.step(state.optimizer)
        state.scaler.update()
        state.step += 1
        return loss, norm

    def batch(self, state: TrainState, tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return get_batch(tokens, state.config.batch_size, state.block_size, state.config.seed, state.step)

    def zero(self, state: TrainState) -> None:
        state.optimizer.zero_grad()

    def weight(self, part: int, batch: int, accumulate: int) -> float:
        return part / batch  # of a micro-batch: its share of the sequences

    def unscaled_and_clipped(self, state: TrainState) -> float:
        state.scaler.unscale_(state.optimizer)
        return optim.clip_grad_norm_(state.optimizer.parameters(), state.config.clip)

    def time(self, state: TrainState) -> int:
        return state.step  # of the schedule

    # --- around the steps ---

    @no_grad()
    def evaluate(self, state: TrainState, tokens: np.ndarray) -> float:
        """The mean loss in nats a token; each token but the first is predicted once."""
        self.evaluating(state.model)
        total, T = 0.0, state.block_size
        for start in range(0, len(tokens) - 1, T):
            window = tokens[None, start : start + T + 1]
            total += state.model.loss(window[:, :-1], window[:, 1:]).item() * (window.size - 1)  # type: ignore
        state.model.train()
        return total / (len(tokens) - 1)

    def evaluating(self, model: Any) -> None:
        model.eval()  # no dropout

    def save(self, state: TrainState) -> dict[str, Any]:
        return state.state_dict()

    def load(self, state: TrainState, saved: Any) -> None:
        state.load_state_dict(saved)

    # --- the whole of it ---

    def loop(self) -> dict[str, Any]:
        """The loop, as `probe.run` takes it."""
        return {"step": self.step, "evaluate": self.evaluate, "save": self.save, "load": self.load}

    def probed(self, name: str) -> Result:
        """What a probe finds before the first step. The caller's random stream stays as it is."""

        def ask() -> Result:
            with self.in_force():
                return probe.PROBES[name](self.state(), *self.texts(), **self.loop())

        return contextvars.copy_context().run(ask)

    def train(self) -> dict[str, list[Any]]:
        """Train from the beginning to the end. Returns what a log holds, step by step.

        "loss" is of the batch, "norm" of its gradient before clipping, "fresh" the loss on fresh text after the steps
        "evaluated".
        """
        train_tokens, fresh = self.texts()
        log: dict[str, list[Any]] = {"loss": [], "norm": [], "lr": [], "evaluated": [], "fresh": []}
        with self.in_force():
            state = self.state()
            for _ in range(self.config.steps):
                loss, norm = self.step(state, train_tokens)
                log["loss"].append(loss)
                log["norm"].append(norm)
                log["lr"].append(state.optimizer.param_groups[0]["lr"])
                if len(log["loss"]) == self.resumes:
                    saved = copy.deepcopy(self.save(state))
                    state = self.state()
                    self.load(state, saved)
                if len(log["loss"]) % 30 == 0:
                    log["evaluated"].append(len(log["loss"]))
                    log["fresh"].append(self.evaluate(state, fresh))
        return log
