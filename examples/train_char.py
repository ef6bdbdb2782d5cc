"""Train a character-level GPT from scratch, on any text.

    python examples/train_char.py                    # two minutes on a laptop
    python examples/train_char.py --data novel.txt
    python examples/train_char.py --resume           # continue after Ctrl-C or a power cut

Without --data it trains on the Python language reference, which comes with every Python.
"""

import io
import json
import math
from argparse import Namespace
from dataclasses import asdict
from pathlib import Path

import numpy as np

from tinylm import GPT, GPTConfig, cli, fused, random
from tinylm.array import keep_freed_memory, to_device
from tinylm.corpus import open_tokens
from tinylm.data import Vocabulary, fingerprint, language_reference, read_text, split
from tinylm.diagnosis import Monitor
from tinylm.files import writable_folder, write_whole
from tinylm.parallel import available_cores
from tinylm.plots import loss_curve
from tinylm.runs import Run, read_metrics
from tinylm.training import TrainConfig, TrainState, evaluate, train


def main() -> None:
    parser = options()
    args = parser.parse_args()
    with parser.mistakes():
        run = Run(args.out)
        resuming = args.resume and run.exists()
        before = run.config() if resuming else {}
        # Flags that are not given again keep their values.
        parser.set_defaults(**{name: value for name, value in before.items() if name in args})
        args = parser.parse_args()

        if args.device == "cuda":
            args.threads = 1  # a GPU is one worker
        config = cli.from_options(TrainConfig, args)
        tokens, vocabulary, data = read_data(args.data)
        train_tokens, val_tokens = split(tokens, block_size=args.block_size)
        random.seed(config.seed)
        model = GPT(cli.from_options(GPTConfig, args, vocab_size=len(vocabulary))).to(args.device)
        state = TrainState(model, config)
        notes: list[str] = []
        engine = list(fused.load(*args.engine or (), tell=notes.append)) or ["reference"]
        now = {"data": args.data, "device": args.device, "engine": engine, **asdict(model.config), **asdict(config)}

        if run.exists() and not (args.resume or args.overwrite):
            raise ValueError(
                f"{args.out} holds a run: --resume goes on with it, --overwrite replaces it, or choose --out"
            )
        writable_folder(args.out)  # last, so that a mistake creates no folder
        if resuming:
            run.resume(state, vocabulary, data, tell=print)
            cli.tell_changes(before, now, state.step)
            run.write_config(now)
        else:
            if args.resume:
                print(f"there is no run in {args.out} yet: beginning one")
            run.start(now)

    print(f"text        {len(tokens):,} characters, {len(vocabulary)} different; the last tenth is for validation")
    print(f"model       {model.num_parameters():,} parameters")
    print(f"engine      {', '.join(engine)}", *notes, sep="\n", flush=True)
    keep_freed_memory()
    monitor = Monitor()
    for line in read_metrics(args.out) if state.step else ():
        monitor.update(line)
    saved = state.step
    with cli.Progress(config.steps, state.step) as progress, cli.Stop() as stop, run.telling_last_good(state):
        for step in train(state, train_tokens, val_tokens):
            progress.show(step)
            with progress.disk_trouble("the metrics"):
                for line in run.record(step):
                    for finding in monitor.update(line):
                        progress.say(f"note: {finding}")
                if step.val_loss is not None:
                    run.record_sample(step.step, sample(model, vocabulary, args, 200))
            due = args.save_every and step.step % args.save_every == 0
            best = step.val_loss is not None and step.val_loss == state.best_val_loss
            asked = stop.signal
            if due or best or asked or state.finished:
                with progress.disk_trouble(f"step {step.step}"):
                    run.save(state, vocabulary, data, args.keep_last)
                    saved = step.step
            if asked:
                raise cli.Stopped(asked, f"{progress.stands}; saved is step {saved}, and --resume goes on from it")

    if state.step < config.steps:
        print(f"stopped     after step {state.step}: no better validation loss in {config.early_stop} evaluations")
    if state.val_loss is None:  # resumed with fewer steps than were already done
        state.val_loss = evaluate(model, val_tokens, config.batch_size)
    summary = summarise(state, run, now)
    print(f"validation  loss {summary['val_loss']:.4f}, perplexity {summary['perplexity']:.3f}, ", end="")
    print(f"{summary['bits_per_character']:.3f} bits a character")
    print(f"time        {cli.clock(summary['seconds'])}, {summary['tokens_per_second']:,.0f} tokens/s", flush=True)

    picture = io.BytesIO()
    loss_curve(read_metrics(args.out), title=f"A GPT of {model.num_parameters():,} parameters").savefig(
        picture, dpi=150
    )
    write_whole(run.folder / "loss.png", picture.getvalue())
    write_whole(run.folder / "summary.json", json.dumps(summary, indent=2) + "\n")
    print(f"written     {run.folder / 'loss.png'}, {run.folder / 'summary.json'}\n")
    print(sample(model, vocabulary, args, args.sample_tokens))


def read_data(path: str | None) -> tuple[np.ndarray, Vocabulary, str]:
    """(tokens, vocabulary, fingerprint) of a text file, a folder of prepared tokens, or the default text for None."""
    if path is not None and Path(path).is_dir():
        return open_tokens(path)
    text = language_reference() if path is None else read_text(path)
    vocabulary = Vocabulary.of(text)
    tokens = vocabulary.encode(text)
    return tokens, vocabulary, fingerprint(tokens)


def options() -> cli.Parser:
    """The command line."""
    parser = cli.Parser("Train a character-level GPT from scratch on a text, and generate a sample.")

    data = parser.add_argument_group("data")
    data.add_argument(
        "--data",
        metavar="PATH",
        help="a text in UTF-8, or a folder made by `python -m tinylm.data prepare` from texts larger than memory "
        "(default: Python's own language reference)",
    )

    cli.add_options(
        parser.add_argument_group("model"),
        GPTConfig,
        block_size="the longest context, in characters",
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
        eval_tokens="validate on this many characters, from the start of the last tenth; 0: on all of it",
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
    output.add_argument("--out", metavar="DIR", default="runs/char", help="the run's folder")
    again = output.add_mutually_exclusive_group()
    again.add_argument("--resume", action="store_true", default=None, help="continue the run in --out")
    again.add_argument("--overwrite", action="store_true", default=None, help="replace the run in --out")
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
        "--sample-tokens", metavar="N", type=cli.at_least(0), default=500, help="characters to generate at the end"
    )
    output.add_argument(
        "--temperature", metavar="X", type=cli.at_least(0, float), default=0.8, help="0: always the likeliest character"
    )
    output.add_argument(
        "--top-k", metavar="N", type=cli.at_least(1), help="choose among the N likeliest characters (default: all)"
    )
    return parser


def summarise(state: TrainState, run: Run, config: dict) -> dict:
    """The content of summary.json."""
    return {
        "val_loss": state.val_loss,
        "best_val_loss": state.best_val_loss,
        "perplexity": math.exp(min(state.val_loss, 700)),
        "bits_per_character": state.val_loss / math.log(2),
        "steps": state.step,
        "seconds": run.seconds,  # of training, over all resumptions, without evaluation
        "tokens_per_second": run.tokens / run.seconds,
        "parameters": state.model.num_parameters(),
        "config": config,
    }


def sample(model: GPT, vocabulary: Vocabulary, args: Namespace, n_tokens: int) -> str:
    """Text that the model generates after a line break."""
    start = "\n" if "\n" in vocabulary.characters else vocabulary.characters[0]
    ids = to_device(vocabulary.encode(start)[None], args.device)
    ids = model.generate(ids, n_tokens, args.temperature, args.top_k, args.seed)
    return vocabulary.decode(to_device(ids[0, 1:], "cpu"))


if __name__ == "__main__":
    cli.run(main)
