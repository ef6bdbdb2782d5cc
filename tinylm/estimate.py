"""What a training run will take, before it begins: parameters, FLOPs, memory and time.

    tinylm estimate --n-layer 6 --n-embd 384      # the options of `tinylm train`

Parameters, FLOPs and memory follow from the shapes of a GPT (gpt.py), under the engines in force; time is measured.
Shapes: B sequences of T tokens (N = B T), C channels, H heads of D = C / H, vocabulary V.
"""

import math
import statistics
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from itertools import accumulate
from time import perf_counter
from types import ModuleType
from typing import NamedTuple

import numpy as np

from . import cli, fused, random
from .array import keep_freed_memory, to_device
from .data import split
from .fused.blocked import QUERIES, blocks
from .generation import stream
from .gpt import GPT, GPTConfig
from .parallel import Workers
from .registry import engines_in_force
from .training import TrainConfig, TrainState, evaluate, train


class Layer(NamedTuple):
    """An op of a block: its parameters, and what each token costs on the tape."""

    part: str
    matrix: int = 0  # numbers in the weight that is multiplied
    vectors: int = 0  # numbers in its bias, or in a norm's weight and bias
    saved: float = 0  # bytes that forward saves
    flowing: float = 0  # bytes of activations' gradients after its backward, with that of the residual stream


def block(config: GPTConfig, T: int, dtype: str = "float32", twin: bool = False) -> list[Layer]:
    """The ops of one block in the order of forward; `twin`: a faster twin computes the attention."""
    C, H, b = config.n_embd, config.n_head, int(config.bias)
    size = np.dtype(dtype).itemsize
    x = size * C  # bytes of a token's activation: one row of (B, T, C)
    p = size * H * pairs(T, twin) / T  # of its row of the softmax, on average
    norm = Layer("norms", vectors=C + b * C, saved=x + 4, flowing=x)  # xhat, and rstd in float32
    # In backward the branch and the residual stream share one gradient, until dropout or rounding makes it two.
    apart = [Layer("residual", flowing=2 * x)] if config.dropout or size < 4 else []
    return [
        norm,
        Layer("attention", 3 * C * C, b * 3 * C, saved=x, flowing=2 * x),
        # q, k, v and the softmax. The merged heads y are saved by the twin here, by the reference in the next layer.
        Layer("attention", saved=3 * x + p + (x if twin else 0), flowing=4 * x),
        Layer("attention", C * C, b * C, saved=0 if twin else x, flowing=2 * x),
        *apart,
        norm,
        Layer("mlp", 4 * C * C, b * 4 * C, saved=x, flowing=2 * x),
        Layer("mlp", saved=4 * x, flowing=5 * x),  # GELU's slope
        Layer("mlp", 4 * C * C, b * C, saved=4 * x, flowing=5 * x),
        *apart,
    ]


def pairs(T: int, twin: bool) -> int:
    """The pairs of query and key that an attention head computes: all T^2, or without most of those that are masked."""
    return sum((end - start) * seen for start, end, seen in blocks(T, T)) if twin else T * T


def attention_twin(T: int, dropout: float = 0.0, dtype: str = "float32") -> bool:
    """Whether a faster twin computes the attention on a CPU. Raises ValueError for the engine "composed"."""
    engines = engines_in_force()
    if "composed" in engines:
        raise ValueError("there is no estimate for the engine 'composed', which saves what each of its small ops needs")
    compiled = "numba" in engines and dtype == "float32" and not dropout
    return compiled or ("blocked" in engines and T > QUERIES)


def groups(config: GPTConfig) -> list[int]:
    """The numbers of blocks that are recomputed together, but for the last group; without `recompute` one group."""
    n, together = config.n_layer, config.recompute or config.n_layer
    return [min(together, n - first) for first in range(0, n, together)]


def parameters(config: GPTConfig) -> dict[str, int]:
    """The number of parameters by part. The output layer has none: it is the token embedding, transposed."""
    layers = [*block(config, 1) * config.n_layer, block(config, 1)[0]]  # with the last norm
    parts = {"embedding": (config.vocab_size + config.block_size) * config.n_embd}
    for part in ("attention", "mlp", "norms"):
        parts[part] = sum(layer.matrix + layer.vectors for layer in layers if layer.part == part)
    return parts


def forward_flops(config: GPTConfig, B: int, T: int, twin: bool = False) -> dict[str, int]:
    """The FLOPs of the matrix products of a forward, by part: a multiplication and an addition are 2.

    For each token a weight takes 2 FLOPs for each of its numbers. For each pair of query and key that is computed, the
    scores and the weighted sum of the values take 2 D each a head. Work on single elements is not counted, nor are sums
    over rows.
    """
    C, n_layer = config.n_embd, config.n_layer
    return {
        "attention": 2 * B * T * n_layer * 4 * C * C,
        "attention scores": 2 * 2 * B * n_layer * C * pairs(T, twin),
        "mlp": 2 * B * T * n_layer * 8 * C * C,
        "output": 2 * B * T * C * config.vocab_size,
    }


def step_flops(config: GPTConfig, training: TrainConfig) -> dict[str, int]:
    """The FLOPs of one step, by part. For each product of forward, backward has two: for dX and for dW.

    The loss makes all three of its products in forward. Recomputing runs the forward of its blocks again; accumulation
    and threads add nothing.
    """
    T = training.block_size or config.block_size
    twin = attention_twin(T, config.dropout, training.dtype)
    forward = forward_flops(config, training.batch_size, T, twin)
    blocks = sum(forward.values()) - forward["output"]
    again = blocks // config.n_layer * sum(groups(config)[:-1])
    return {part: 3 * n for part, n in forward.items()} | ({"recomputed": again} if again else {})


def validations(training: TrainConfig) -> int:
    """The number of validations in a run that is not stopped early: every `eval_every` steps and at the end."""
    return -(-training.steps // (training.eval_every or training.steps))


def run_flops(config: GPTConfig, training: TrainConfig, val_tokens: int) -> dict[str, int]:
    """The FLOPs of all steps, and of all validations, each of `val_tokens` tokens."""
    T, n = training.block_size or config.block_size, val_tokens - 1
    batches = [(B, length) for B, length in ((n // T, T), (1, n % T)) if B * length]  # whole blocks, and the rest
    once = sum(sum(forward_flops(config, B, t, attention_twin(t)).values()) for B, t in batches)
    steps = training.steps * sum(step_flops(config, training).values())
    return {"steps": steps, "validations": validations(training) * once}


class Moment(NamedTuple):
    """Bytes that one worker's tape holds at a moment, in the order of memory.Snapshot."""

    activations: float
    copies: float
    flowing: float
    gradients: float


def timeline(
    config: GPTConfig, n: int, T: int, dtype: str = "float32", twin: bool = False, before: int = 0
) -> list[Moment]:
    """The moments of a backward over n sequences of T tokens: after forward, which only adds, and after each op.

    `before` is the bytes of gradients that are there already. A recomputed group's forward is a moment, too.
    """
    N, C, V, size = n * T, config.n_embd, config.vocab_size, np.dtype(dtype).itemsize
    layers, sizes = block(config, T, dtype, twin), groups(config)
    copy = size if size < 4 else 0  # under autocast a Linear saves a copy of its weight
    x = size * N * C  # the residual stream
    ids, positions = 8 * n * (T + 1), 8 * T  # the inputs are a view of tokens that include the last target
    loss = 4 * (N + V) * C  # its dX and dW, which it computes in forward

    # What each event adds to the activations and copies, the gradients that flow after it, the parameters' gradients.
    inputs = x * (len(sizes) - 1)  # which each recomputed group saves
    events: list[tuple[float, ...]] = [(ids + positions + inputs + loss, 0, 0, before)]
    for i, together in enumerate(reversed(sizes)):
        ops = layers * together + (layers[:1] if i == 0 else [])  # with the last norm
        events.append((N * sum(op.saved for op in ops), copy * sum(op.matrix for op in ops), 0, 0))
        # The loss's own gradient is one number. A group that has been computed again no longer needs its input.
        events += [(-x, 0, x, 0)] if i else [(0, 0, 4, 0), (-loss, 0, x, 4 * V * C)]
        for op in reversed(ops):
            events.append((-N * op.saved, -copy * op.matrix, N * op.flowing, 4 * (op.matrix + op.vectors)))
    events.append((0, 0, x + size * T * C, 0))  # the positions' gradient is summed over the sequences
    events.append((-positions, 0, 4 * N * C, 4 * config.block_size * C))  # embeddings are looked up in float32
    events.append((-ids, 0, 0, 0))
    activations, copies, flowing, gradients = zip(*events, strict=True)
    moments = map(Moment, accumulate(activations), accumulate(copies), flowing, accumulate(gradients))
    return list(moments)[1:]  # the first event is a part of forward


def memory(config: GPTConfig, training: TrainConfig) -> dict[str, int]:
    """Bytes by part at the peak of a step, in the words of `track_memory` and as it counts them.

    Temporary arrays inside an op are not counted. For threads it is the sum of their peaks, which is reached where they
    keep step.
    """
    T, threads = training.block_size or config.block_size, training.threads
    twin = attention_twin(T, config.dropout, training.dtype)
    size = 4 * sum(parameters(config).values())
    peaks = []
    for rank in range(threads):
        moments: list[Moment] = []
        for micro in range(training.accumulate):
            start, end = (training.batch_size * i // training.accumulate for i in (micro, micro + 1))
            n = (end - start) * (rank + 1) // threads - (end - start) * rank // threads
            if n:
                moments += timeline(config, n, T, training.dtype, twin, before=size if moments else 0)
        peaks += [max(moments, key=sum)] if moments else []  # a thread may have no sequence
    activations, copies, flowing, gradients = (round(sum(part)) for part in zip(*peaks, strict=True))
    return {
        "parameters": size,
        "gradients": gradients,
        "optimizer state": 2 * size,  # AdamW's two moments
        "parameters, cast": copies,
        "activations": activations,
        "their gradients": flowing,
    }


class Timing(NamedTuple):
    """Measured seconds."""

    step: float  # the median of the steps
    steps: int  # how many were timed
    validation: float  # one validation
    token: float  # one generated token


def measure(
    config: GPTConfig, training: TrainConfig, val_tokens: int, device: str = "cpu", seconds: float = 2.0
) -> Timing:
    """Train a model that is thrown away on random tokens for about `seconds`: after a first step, at least 3 more.

    Validation is timed on a batch for each worker, generation on up to 200 tokens. The loop, the threads and the
    engines are those of a run; the caller's random streams are left as they were.
    """
    before = random.state()
    model = GPT(config).to(device)
    # Without a learning rate an update takes as long, and the weights stay finite.
    state = TrainState(model, replace(training, steps=sys.maxsize, lr=0.0, min_lr=0.0, eval_every=0, early_stop=0))
    T = state.block_size
    some = min(val_tokens, training.threads * training.batch_size * T + 1)
    tokens = np.random.default_rng(0).integers(config.vocab_size, size=max(some, T + 2))

    times = first_steps((step.seconds for step in train(state, tokens, tokens)), seconds)
    with Workers(model, training.threads) as workers:  # a run generates between its steps, with its threads' BLAS
        passes = _times(lambda: evaluate(model, tokens[:some], training.batch_size, T, workers), seconds / 4)
        written = stream(model, [[0]], 200)
        generated = _times(lambda: next(written), seconds / 4, at_most=199)
    random.seed(*before)
    validation = statistics.median(passes) * (val_tokens - 1) / (some - 1)
    # The mean, because a window that slides makes few tokens dear.
    return Timing(statistics.median(times[1:]), len(times) - 1, validation, statistics.mean(generated))


def first_steps(times: Iterable[float], seconds: float = 2.0) -> list[float]:
    """The seconds of the first steps, as they come: of one, which starts things up, and of at least 3 more.

    It takes further ones until they, without the first, add up to `seconds`.
    """
    some: list[float] = []
    for each in times:
        some.append(each)
        if len(some) > 3 and sum(some[1:]) >= seconds:
            break
    return some


def _times(call: Callable[[], object], seconds: float, at_most: int = sys.maxsize) -> list[float]:
    """The seconds of each call after a first one: of at least 3, until they add up to `seconds`."""
    call()
    times: list[float] = []
    while len(times) < at_most and (len(times) < 3 or sum(times) < seconds):
        started = perf_counter()
        call()
        times.append(perf_counter() - started)
    return times


def main(program: ModuleType) -> None:
    """The command `tinylm estimate`. `program` is examples/train_char.py: its options, and how it reads its data."""
    parser = program.options()
    parser.description = "Predict what `tinylm train` will take with the same options. It writes nothing."
    with parser.mistakes():
        args = parser.parse_args()
        if args.resume:
            raise ValueError("--resume: an estimate is for a whole run; give the run's options instead")
        if args.device == "cuda":
            args.threads = 1
        text, tokenizer, _ = program.read_data(args.data, args.tokenizer)
        val_tokens = len(split(text, block_size=args.block_size)[1][: args.eval_tokens or None])
        config = cli.from_options(GPTConfig, args, vocab_size=tokenizer.vocab_size)
        training = cli.from_options(TrainConfig, args)
        to_device(np.zeros(1), args.device)  # is it there?
        notes: list[str] = []
        engine = fused.load(*args.engine or (), tell=notes.append)
        step, run = step_flops(config, training), run_flops(config, training, val_tokens)
        held = memory(config, training)
    print(f"text        {len(text):,} tokens, a vocabulary of {config.vocab_size}")
    print(f"engine      {', '.join(engine) or 'reference'}", *notes, sep="\n")
    written = validations(training) * 200 + args.sample_tokens  # `tinylm train` writes 200 tokens at each validation
    steps, validated = f"steps ({training.steps:,})", f"validations ({validations(training):,})"
    _table("parameters", parameters(config), "{:,.0f}")
    _table("GFLOP a step", step, "{:,.2f}", 1e9)
    _table("GFLOP in all", {steps: run["steps"], validated: run["validations"]}, "{:,.0f}", 1e9)
    _table("MB at the peak", {part: size for part, size in held.items() if size}, "{:,.1f}", 1e6)
    sys.stdout.flush()
    with parser.mistakes():
        keep_freed_memory()  # as a run does
        timing = measure(config, training, val_tokens, args.device)
    seconds = {
        steps: training.steps * timing.step,
        validated: validations(training) * timing.validation,
        f"tokens of samples ({written:,})": written * timing.token,
    }
    _table("seconds", seconds, "{:,.1f}")
    tokens = training.batch_size * args.block_size / timing.step
    print(f"\nmeasured over {timing.steps} steps on this machine: {timing.step * 1e3:,.1f} ms a step, ", end="")
    print(f"{tokens:,.0f} tokens/s, {sum(step.values()) / timing.step / 1e9:,.0f} GFLOP/s")
    print(f"the first loss should be near ln {config.vocab_size} = {math.log(config.vocab_size):.2f}")


def _table(title: str, parts: Mapping[str, float], form: str, unit: float = 1) -> None:
    """Print a title with the sum, and a line for each part."""
    print()
    for name, value in {title: sum(parts.values()), **{f"  {part}": n for part, n in parts.items()}}.items():
        print(f"{name:28}{form.format(value / unit):>14}")
