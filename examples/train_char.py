"""Train a GPT from scratch, on any text.

    tinylm train                    # or python examples/train_char.py: two minutes on a laptop
    tinylm train --data novel.txt
    tinylm train --resume           # continue after Ctrl-C or a power cut

Without --data it trains on the Python language reference, which comes with every Python. A token is a character.
"""

import io
import itertools
import json
import math
import os
import re
import shlex
from argparse import Namespace
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from tinylm import GPT, GPTConfig, cli, fused, random
from tinylm.array import keep_freed_memory, to_device
from tinylm.data import (
    TOKENIZERS,
    CharTokenizer,
    Tokenizer,
    fingerprint,
    language_reference,
    open_tokens,
    read_text,
    split,
)
from tinylm.data.tokenizer import describe
from tinylm.files import write_whole
from tinylm.memory import track_memory
from tinylm.parallel import available_cores
from tinylm.runs import Run, newest_run, read_metrics
from tinylm.runs.diagnosis import Monitor
from tinylm.runs.plots import loss_curve
from tinylm.runs.predicted import MEASURED
from tinylm.runs.progress import Progress, tell_changes
from tinylm.training import Step, TrainConfig, TrainState, evaluate, train

# The flags that a resumed run keeps, besides those of the model and of the training.
KEPT = ("data", "device", "save_every", "keep_last", "sample_tokens", "temperature", "top_k")


def main() -> None:
    parser = options()
    with cli.Screen():
        with parser.mistakes():
            args, run, before = arguments(parser)
            tokens, tokenizer, data = read_data(args.data, args.tokenizer)
            train_tokens, val_tokens = split(tokens, block_size=args.block_size)
            random.seed(args.seed)
            model = GPT(cli.from_options(GPTConfig, args, vocab_size=tokenizer.vocab_size)).to(args.device)
            state = TrainState(model, cli.from_options(TrainConfig, args))
            notes: list[str] = []
            engine = list(fused.load(*args.engine or (), tell=notes.append)) or ["reference"]
            config = {
                **{name: getattr(args, name) for name in KEPT},
                "tokenizer": describe(tokenizer)["kind"],
                "engine": engine,
                **asdict(model.config),
                **asdict(state.config),
            }
            if before is not None:
                run.resume(state, tokenizer, data, tell=print)
                tell_changes(before, config, state.step)
                # Where nothing has changed, what was measured stays.
                run.write_config(before if {**before, **config} == before else config)
            else:
                run.start(config, replace=bool(args.overwrite))

        sizes = f"{len(tokens):,} tokens, a vocabulary of {tokenizer.vocab_size}"
        print(f"text        {sizes}; the last tenth is for validation")
        print(f"model       {model.num_parameters():,} parameters")
        print(f"engine      {', '.join(engine)}", *notes, sep="\n")
        print(f"run         {run.folder}", flush=True)
        loop(state, train_tokens, val_tokens, tokenizer, data, run, args, config)
        finish(state, val_tokens, tokenizer, run, args, config)


def arguments(parser: cli.Parser) -> tuple[Namespace, Run, dict[str, Any] | None]:
    """The arguments, the run's folder, and the configuration of the run to resume (None: begin one)."""
    args = parser.parse_args()
    run = Run(run_folder(args) if args.out is None else args.out)
    before: dict[str, Any] | None = None
    if run.exists():
        if args.resume:
            before = run.config()
            parser.set_defaults(**{name: value for name, value in before.items() if name in args})  # unless given again
            args = parser.parse_args()
        elif not args.overwrite:
            raise ValueError(
                f"{run.folder} holds a run: --resume goes on with it, --overwrite replaces it, or choose another --out"
            )
    elif args.resume:
        if os.path.lexists(run.folder / "config.json"):
            run.config()  # says what is wrong with it
        print(f"there is no run in {run.folder} yet: beginning one")
    if args.device == "cuda":
        args.threads = 1  # a GPU is one worker
    return args, run, before


def run_folder(args: Namespace) -> Path:
    """runs/NAME after the data, with a number if that is taken; to resume or replace a run, the newest of these.

    To resume without --data it is the newest of all runs.
    """
    name = (Path(args.data).resolve().stem or "data") if args.data else "char"
    if args.resume or args.overwrite:
        pattern = r".*" if args.resume and not args.data else rf"{re.escape(name)}(-\d+)?"
        if (newest := newest_run("runs", pattern)) is not None:
            return newest
    folder = Path("runs") / name
    for number in itertools.count(2):
        if not folder.exists():
            break
        folder = Path("runs") / f"{name}-{number}"
    return folder


def read_data(path: str | None, kind: str | None) -> tuple[np.ndarray, Tokenizer, str]:
    """(tokens, tokenizer, fingerprint) of a text file, a folder of prepared tokens, or the default text for None."""
    if path is not None and Path(path).is_dir():
        prepared = open_tokens(path)
        its_kind = describe(prepared[1])["kind"]
        if kind not in (None, its_kind):
            raise ValueError(f"{path} was prepared with --tokenizer {its_kind}, not {kind}")
        return prepared
    text = language_reference() if path is None else read_text(path)
    tokenizer = TOKENIZERS[kind]() if kind not in (None, "characters") else CharTokenizer.of(text)
    tokens = tokenizer.encode(text)
    return tokens, tokenizer, fingerprint(tokens)


def loop(
    state: TrainState,
    train_tokens: np.ndarray,
    val_tokens: np.ndarray,
    tokenizer: Tokenizer,
    data: str,
    run: Run,
    args: Namespace,
    config: dict[str, Any],
) -> None:
    """Train to the end, and write down and save what happens. Raises cli.Stopped after a signal, when all is saved."""

    def save() -> None:
        run.save(state, tokenizer, data, args.keep_last)

    keep_freed_memory()
    monitor = Monitor()
    for record in read_metrics(run.folder) if state.step else ():
        monitor.update(record)
    with (
        cli.Stop(lambda: state.sound) as stop,
        Progress(state.config.steps, state.step) as progress,
        run.keeping(state, save, progress.say),
    ):
        for step in measured(train(state, train_tokens, val_tokens), state.model, run, config):
            with progress.disk_trouble("the metrics"):
                for record in run.record(step):
                    for finding in monitor.update(record):
                        progress.say(f"note: {finding}")
            progress.show(step)
            if step.val_loss is not None:
                text = sample(state.model, tokenizer, args, 200)
                progress.quote(text)
                with progress.disk_trouble("the sample"):
                    run.record_sample(step.step, text)
            due = args.save_every and step.step % args.save_every == 0
            best = step.val_loss is not None and step.val_loss == state.best_val_loss
            asked = stop.signal
            if due or best or asked or state.finished:
                with progress.disk_trouble(f"step {step.step}"):
                    save()
            if asked:
                stands = f"{progress.stands}; saved is step {step.step}, and --resume goes on from it"
                raise cli.Stopped(asked, stands)  # run.keeping() sees to it that this is so


def measured(steps: Iterator[Step], model: GPT, run: Run, config: dict[str, Any]) -> Iterator[Step]:
    """The steps; what the first one took is written into the run's configuration, for the report."""
    with track_memory(model, seldom=True) as memory:
        first = list(itertools.islice(steps, 1))
    tape = memory.peak.total
    del memory  # and all that it counted
    if tape:  # otherwise it was only the evaluation that a killed process did not come to
        found = {"parameters": model.num_parameters(), "tape": tape}
        with suppress(OSError):  # a full disk: the report will not have it
            run.write_config({**config, MEASURED: found})
    yield from first
    yield from steps


def finish(
    state: TrainState, val_tokens: np.ndarray, tokenizer: Tokenizer, run: Run, args: Namespace, config: dict[str, Any]
) -> None:
    """Say how the run ended; draw its curve; write a sample."""
    if state.step < state.config.steps:
        print(f"stopped     after step {state.step}: no better validation loss in {args.early_stop} evaluations")
    if state.val_loss is None:  # resumed with fewer steps than were already done
        state.val_loss = evaluate(
            state.model, val_tokens[: args.eval_tokens or None], args.batch_size, state.block_size
        )
    summary = {
        "val_loss": state.val_loss,
        "best_val_loss": state.best_val_loss,
        "perplexity": math.exp(min(state.val_loss, 700)),
        "bits_per_token": state.val_loss / math.log(2),
        "steps": state.step,
        "seconds": run.log.seconds,  # of training, over all resumptions, without evaluation
        "tokens_per_second": run.log.tokens / run.log.seconds,
        "parameters": state.model.num_parameters(),
        "config": config,
    }
    write_whole(run.folder / "summary.json", json.dumps(summary, indent=2) + "\n")
    picture = io.BytesIO()
    title = f"A GPT of {state.model.num_parameters():,} parameters"
    loss_curve(read_metrics(run.folder), title).savefig(picture, dpi=150)
    write_whole(run.folder / "loss.png", picture.getvalue())

    print(f"validation  loss {summary['val_loss']:.4f}, perplexity {summary['perplexity']:.3f}, ", end="")
    print(f"{summary['bits_per_token']:.3f} bits a token")
    print(f"time        {cli.clock(summary['seconds'])}, {summary['tokens_per_second']:,.0f} tokens/s")
    print(f"written     {run.folder / 'loss.png'}, {run.folder / 'summary.json'}")
    if args.sample_tokens:
        print(f"sample      {args.sample_tokens} tokens at temperature {args.temperature}:\n")
        print(sample(state.model, tokenizer, args, args.sample_tokens))
    folder = shlex.quote(str(run.folder))
    prompt = " ".join(tokenizer.decode(val_tokens[:20]).split()[:2])  # words that the model has characters for
    go_on = f"--steps {2 * state.config.steps}" if state.step >= state.config.steps else "--early-stop 0"
    print(f"""
next        tinylm generate --run {folder} --prompt {shlex.quote(prompt)}
            tinylm report {folder}
            tinylm train --out {folder} --resume {go_on}""")
    if run.saved != state.step:
        raise OSError(f"the last checkpoint could not be saved: saved is step {run.saved}")


def options() -> cli.Parser:
    """The command line."""
    parser = cli.Parser("Train a character-level GPT from scratch on a text, and generate a sample.")

    data = parser.add_argument_group("data")
    data.add_argument(
        "--data",
        metavar="PATH",
        help="a text in UTF-8, or a folder made by `tinylm prepare` from texts larger than memory "
        "(default: Python's own language reference)",
    )
    data.add_argument(
        "--tokenizer",
        choices=("characters", "bytes"),
        help="what a token is (default: characters; a prepared folder has its own)",
    )

    cli.add_options(
        parser.add_argument_group("model"),
        GPTConfig,
        block_size="the longest context, in tokens",
        n_layer="transformer blocks",
        n_head="attention heads in each; the number must divide --n-embd",
        n_embd="channels: the width of the model",
        dropout="share of the activations dropped in training; helps a large model on a short text",
        bias="biases in the linear layers and the layer norms",
        recompute="recompute the activations of every N blocks in backward: less memory, more time; 0: keep them all",
    )
    training = parser.add_argument_group("training")
    cli.add_options(
        training,
        TrainConfig,
        steps="updates",
        batch_size="sequences in each step",
        accumulate="micro-batches that a step is split into: less memory, the same result",
        lr="peak learning rate",
        min_lr="learning rate at the end of the cosine",
        warmup="steps over which the learning rate rises to its peak",
        beta1="AdamW's decay of the mean gradient",
        beta2="AdamW's decay of the mean squared gradient",
        weight_decay="AdamW's pull of the matrices towards zero",
        clip="largest norm of the gradient, larger ones are scaled down to it; 0: no limit",
        eval_every="steps between two validations; 0: only at the end",
        eval_tokens="validate on this many tokens, from the start of the last tenth; 0: on all of it",
        early_stop="stop after this many validations without a better one; 0: never",
        threads="threads that share each batch's sequences",
        dtype="of the activations: float32, or float16 with loss scaling (on a CPU: half the memory, but slower)",
        seed="of the initial weights, the batches, the dropout and the sample",
    )
    parser.set_defaults(threads=available_cores())
    training.add_argument(
        "--engine",
        nargs="+",
        choices=("composed", "reference", *fused.ENGINES),
        help="which engines compute, in order of preference, or `reference`, the readable ops of tinylm/ops "
        "(default: all engines that are installed)",
    )
    training.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where to compute")

    output = parser.add_argument_group("output")
    output.add_argument(
        "--out",
        metavar="DIR",
        help="the run's folder (default: runs/NAME after --data, with a number if that is taken; with --resume and "
        "--overwrite the newest)",
    )
    again = output.add_mutually_exclusive_group()
    again.add_argument("--resume", action="store_true", default=None, help="continue the run")
    again.add_argument("--overwrite", action="store_true", default=None, help="replace the run")
    output.add_argument(
        "--save-every",
        metavar="N",
        type=cli.at_least(0),
        default=250,
        help="steps between two checkpoints; 0: the best only",
    )
    output.add_argument(
        "--keep-last", metavar="K", type=cli.at_least(1), default=2, help="newest checkpoints to keep, besides the best"
    )
    output.add_argument(
        "--sample-tokens", metavar="N", type=cli.at_least(0), default=500, help="tokens to generate at the end"
    )
    output.add_argument(
        "--temperature", metavar="X", type=cli.at_least(0, float), default=0.8, help="0: always the likeliest token"
    )
    output.add_argument(
        "--top-k", metavar="N", type=cli.at_least(1), help="choose among the N likeliest tokens (default: all)"
    )
    return parser


def sample(model: GPT, tokenizer: Tokenizer, args: Namespace, n_tokens: int) -> str:
    """Text that the model generates after a line break."""
    try:
        start = tokenizer.encode("\n")
    except ValueError:  # the text has no line break
        start = np.zeros(1, int)
    ids = model.generate(
        to_device(start[None], args.device), n_tokens, temperature=args.temperature, top_k=args.top_k, seed=args.seed
    )
    return tokenizer.decode(to_device(ids[0, len(start) :], "cpu"))


if __name__ == "__main__":
    cli.run(main)
