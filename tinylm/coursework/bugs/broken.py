"""The silent bugs: runs that train on with a plausible curve, each with one part replaced by a wrong one.

`probe` names the probe that finds it, and `name` is what the probes call it. What stands in a class is all of the bug.
"""

import math
from typing import ClassVar

import numpy as np

from ... import ops, optim, random
from ...data import get_batch
from ...ops.embedding import Embedding
from ...ops.layer_norm import LayerNorm
from .run import GPT, LANGUAGE, AdamW, Attention, Run

# --- attention and the model ------------------------------------------------------------------------------------------


class NoMask(Run):
    name, probe = "no causal mask", "causality"
    tells = (
        "The model reads the answer from its input. Evaluation has the same hole, so both losses are far too good; "
        "on a text whose entropy is not known, this looks like success. Generation, which has no future to read, is "
        "poor."
    )

    class attention(Attention):
        def masked(self, scores):
            return scores


class MaskOffByOne(Run):
    name, probe = "mask off by one", "causality"
    tells = "A position sees one token too many, the very one that it is to predict. Both losses fall towards 0."

    class attention(Attention):
        def masked(self, scores):
            past = np.tri(scores.shape[-1], k=1, dtype=bool)
            return ops.where(past, scores, -math.inf)


class HeadsMixed(Run):
    name, probe = "heads mixed", "causality"
    tells = (
        "Without the transpose, a head is a piece of the sequence instead of a piece of the channels. The shapes are "
        "right, so nothing complains. Most of the past is out of reach, and some of the future is in it: here the "
        "loss ends below the entropy."
    )

    class attention(Attention):
        def heads(self, x):
            B, T, _ = x.shape
            return x.reshape(B, self.n_head, T, -1)


class NoScale(Run):
    name, probe = "no 1/sqrt(d)", "scale"
    tells = (
        "Scores grow with the size of a head, and the softmax comes near a hard choice, whose gradient vanishes. In "
        "a small model, here with heads of size 8, this costs nothing that a curve shows."
    )

    class attention(Attention):
        def scale(self, D):
            return 1.0


class NoPositions(Run):
    name, probe = "no positions", "positions"
    tells = (
        "Attention takes the past as a set. The model still learns which tokens are frequent, and what the causal mask "
        "tells of the order, so the loss falls, but less far."
    )

    class model(GPT):
        def embedded(self, ids):
            return self.transformer.wte(ids)


class TiedOnce(Run):
    name, probe = "tied weight gets one of its two gradients", "gradient"
    tells = (
        "The token embedding is also the output layer, and needs the gradients of both uses. With one of them the "
        "model still learns: the other parameters move to meet it."
    )

    class model(GPT):
        def forward(self, ids):
            return ops.linear(self.hidden(ids), self.transformer.wte.weight.detach())


class TwoSoftmaxes(Run):
    name, probe = "softmax applied twice", "loss"
    tells = (
        "The loss takes logits, and applies softmax itself. Probabilities lie between 0 and 1, so as logits they can "
        "express no certainty: the loss comes to rest far above what is possible."
    )

    class model(GPT):
        def loss(self, ids, targets):
            return ops.cross_entropy(self(ids).softmax(), targets)


class LargeWeights(Run):
    name, probe = "initial weights too large", "first_loss"
    tells = (
        "The untrained model is sure, and wrong: the first loss is far above ln V. The run spends all its steps on "
        "coming back, and ends near guessing."
    )

    def initial(self, weights):
        return 30 * weights


# --- backward ---------------------------------------------------------------------------------------------------------


class LosesRepeats(Run):
    name, probe = "embedding backward loses repeats", "ops"
    tells = (
        "With d[ids] += g NumPy adds only one of the gradients of a token that occurs twice. The other gradients still "
        "point downhill, and the frequent tokens, which lose most, are learned anyway."
    )

    class embedding(Embedding):
        def forward(self, weight, ids):
            return Embedding.forward(self, weight, ids)

        def backward(self, dy):
            (ids,) = self.saved
            dweight = np.zeros(self.shape, dy.dtype)
            dweight[ids] += dy
            return dweight, None

    replaced: ClassVar = {Embedding: embedding}


class TruncatedNorm(Run):
    name, probe = "layer norm's backward without both terms", "ops"
    tells = (
        "Mean and variance are taken for constants. Everything before the norm gets a gradient with two directions too "
        "many; the curve falls, and stays higher."
    )

    class layer_norm(LayerNorm):
        def forward(self, x, weight, bias):
            return LayerNorm.forward(self, x, weight, bias)

        def backward(self, dy):
            xhat, rstd, weight = self.saved
            return rstd * dy * weight, (dy * xhat).sum(axis=(0, 1)), dy.sum(axis=(0, 1))

    replaced: ClassVar = {LayerNorm: layer_norm}


# --- the optimizer ----------------------------------------------------------------------------------------------------


class Uncorrected(Run):
    name, probe = "no bias correction", "update"
    tells = (
        "Both moments begin at 0, and the second one grows more slowly: without correction the updates of the first "
        "dozens of steps are up to twice too large, with a second beta of 0.99 as here. A warmup hides it, and later "
        "nothing is left of it."
    )

    class adamw(AdamW):
        def correction(self, beta1, beta2, t):
            return 1, 1


class SharedCount(Run):
    name, probe = "one bias-correction step for all parameters", "update"
    tells = (
        "Here all parameters begin together, so nothing happens, and the curves are those of the sound run. It acts "
        "where some join later, such as layers that were frozen at first: their first updates are too large, like "
        "those without any correction."
    )

    class adamw(AdamW):
        latest = 0

        def correction(self, beta1, beta2, t):
            self.latest = max(self.latest, t)
            return 1 - beta1**self.latest, 1 - beta2**self.latest


class CoupledDecay(Run):
    name, probe = "coupled decay", "decay"
    tells = (
        "Decay that is added to the gradient is divided by Adam's root of v like the rest of it. What has small "
        "gradients is then pulled to 0 as strongly as the learning rate allows. This run hardly learns."
    )

    class adamw(AdamW):
        def decayed(self, p, g, lr, decay):
            return g + decay * p


class DecaysAll(Run):
    name, probe = "decay on layer norms and biases", "decay"
    tells = "Gains that should stay near 1 are pulled to 0. It is slow, and the weights beside them make up for it."

    def groups(self, model):
        return [{"params": list(model.parameters()), "weight_decay": self.config.weight_decay}]


class NotHeld(Run):
    name, probe = "a parameter that the optimizer does not hold", "held"
    tells = (
        "It keeps its initial values, and the others learn around them. A list of parameters that was made by hand, or "
        "before a layer was replaced, is the usual way into this."
    )

    def groups(self, model):
        return [{"params": [p for p in model.parameters() if p.ndim == 2]}]


# --- a step -----------------------------------------------------------------------------------------------------------


class NotShifted(Run):
    name, probe = "targets not shifted", "batches"
    tells = (
        "Each token is asked to predict itself, and the training loss is soon 0. Here the evaluation cuts its own "
        "targets, and is worse than guessing. If it shares the mistake, both losses are 0."
    )

    def batch(self, state, tokens):
        x, _ = super().batch(state, tokens)
        return x, x


class SameBatch(Run):
    name, probe = "the same batch at each step", "batches"
    tells = (
        "The training loss falls to nearly 0: the model learns one batch by heart. The loss on fresh text rises above "
        "guessing."
    )

    def batch(self, state, tokens):
        return get_batch(tokens, state.config.batch_size, state.block_size, state.config.seed, step=0)


class NotZeroed(Run):
    name, probe = "gradients not zeroed", "zeroing"
    tells = (
        "Each step adds its gradient to those of all steps before. Here clipping limits the sum, so the norm in the "
        "log is nearly always a little above its threshold. Old gradients count as much as new ones, and the loss "
        "hardly falls."
    )

    def zero(self, state):
        pass


class Undivided(Run):
    name, probe = "accumulation undivided", "accumulation"
    tells = (
        "The gradients of the micro-batches are added without their weights, so the sum is too large, here three "
        "times. Adam divides by the size of the gradient, so the updates are the same. Only the norm in the log "
        "shows it, and clipping, which now acts too often."
    )

    def weight(self, part, batch, accumulate):
        return 1


class Ragged(Run):
    name, probe = "ragged last micro-batch weighted as a full one", "accumulation"
    tells = (
        "16 sequences in three parts are 6, 6 and 4. With a weight of 1/3 each, the last four count half as much again "
        "as the others. The gradient is not that of the batch's mean loss, but close to it."
    )

    def weight(self, part, batch, accumulate):
        return 1 / accumulate


class NeverUnscaled(Run):
    name, probe = "gradients never unscaled", "unscaling"
    tells = (
        "The gradients keep the factor of the loss scaling. Clipping cuts all of them to length 1, and Adam divides by "
        "their size: the updates are nearly right. The norm in the log is tens of thousands of times too large."
    )
    dtype = "float16"

    def unscaled_and_clipped(self, state):
        state.scaler._found_inf = False  # what unscale_ would have found out
        return optim.clip_grad_norm_(state.optimizer.parameters(), state.config.clip)


class ClippedBefore(Run):
    name, probe = "clipping before unscaling", "clipping"
    tells = (
        "The gradients are clipped while they are still multiplied by the loss scale, so all are cut to 1, and then "
        "divided by the scale. They arrive tens of thousands of times too small. Adam hides that as well, until they "
        "come near its eps."
    )
    dtype = "float16"

    def unscaled_and_clipped(self, state):
        norm = optim.clip_grad_norm_(state.optimizer.parameters(), state.config.clip)
        state.scaler.unscale_(state.optimizer)
        return norm


class ClippedApart(Run):
    name, probe = "clipping per tensor", "clipping"
    tells = (
        "Each gradient is cut to the threshold by itself. That turns the step: large gradients are shortened against "
        "small ones. Here few gradients are large, so hardly anything changes."
    )

    def unscaled_and_clipped(self, state):
        state.scaler.unscale_(state.optimizer)
        return max(optim.clip_grad_norm_([p], state.config.clip) for p in state.optimizer.parameters())


class ScheduleTooFast(Run):
    name, probe = "schedule stepped per micro-batch", "schedule"
    tells = (
        "With three micro-batches a step, the learning rate has run down to its end after a third of the run. From "
        "there on the curve is flat, as if the model could not learn more."
    )

    def time(self, state):
        return state.step * state.config.accumulate


# --- around the steps -------------------------------------------------------------------------------------------------


class DropsAlways(Run):
    name, probe = "dropout left on in evaluation", "evaluation"
    tells = (
        "The evaluation has dropout too. So the loss on fresh text is about 0.1 too high, as high as the training "
        "loss in the log, which has dropout rightly. A second evaluation of the same model gives another number."
    )

    def evaluating(self, model):
        pass


class MomentsLost(Run):
    name, probe = "optimizer state lost at resume", "resuming"
    tells = (
        "After a resume Adam's moments are 0 and its t is 1, while the learning rate is far beyond its warmup: the "
        "first updates are too large. Here the loss is about 0.02 too high for twenty steps, less than it differs "
        "from step to step."
    )

    def load(self, state, saved):
        new = state.optimizer.state_dict()
        state.load_state_dict({**saved, "optimizer": new})


class StreamLost(Run):
    name, probe = "random state lost at resume", "resuming"
    tells = (
        "Dropout draws other numbers than it would have without the break, which no curve shows. The run is as good "
        "as before, and is not the same run any more: whoever looks for a bug by repeating it will not find it again."
    )

    def load(self, state, saved):
        state.load_state_dict({**saved, "random": random.state()})


class Leaked(Run):
    name, probe = "validation text inside the training text", "leakage"
    tells = (
        "The fresh text is not fresh. Here there are only 1,000 tokens to learn from, and fresh text is a part of "
        "them. The model learns them by heart, and the two losses fall together, as if there were no gap. Below the "
        "entropy it cannot be learning."
    )

    def texts(self):
        text = LANGUAGE.tokens(1_000, seed=1)
        return text, text[200:800]
