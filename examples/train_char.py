"""Train a character-level GPT from scratch, on any text, with nothing but tinylm.

    python examples/train_char.py                    # two minutes on a laptop
    python examples/train_char.py --data novel.txt

Without --data it learns to write like the reference of the Python language, which comes with every Python.
"""

import io
import json
import math
from argparse import Namespace
from dataclasses import asdict
from time import perf_counter

from tinylm import GPT, GPTConfig, cli, random
from tinylm.array import to_device
from tinylm.data import Vocabulary, language_reference, read_text, split
from tinylm.files import writable_folder, write_whole
from tinylm.plots import loss_curve
from tinylm.training import Step, TrainConfig, train


def main() -> None:
    parser = options()
    args = parser.parse_args()

    with parser.mistakes():
        config = cli.from_options(TrainConfig, args)
        text = language_reference() if args.data is None else read_text(args.data)
        vocabulary = Vocabulary.of(text)
        train_tokens, val_tokens = split(vocabulary.encode(text), block_size=args.block_size)
        random.seed(config.seed)
        model = GPT(cli.from_options(GPTConfig, args, vocab_size=len(vocabulary))).to(args.device)
        out = writable_folder(args.out)  # last: a mistake leaves nothing behind

    print(f"text        {len(text):,} characters, {len(vocabulary)} different; the last tenth is for validation")
    print(f"model       {model.num_parameters():,} parameters", flush=True)
    history: list[Step] = []
    started = perf_counter()
    with cli.Progress(config.steps) as progress:
        for step in train(model, train_tokens, val_tokens, config):
            progress.show(step)
            history.append(step)
    summary = summarise(history, perf_counter() - started, model, config, args)
    print(f"validation  loss {summary['val_loss']:.4f}, perplexity {summary['perplexity']:.3f}, ", end="")
    print(f"{summary['bits_per_character']:.3f} bits a character")
    print(f"time        {cli.clock(summary['seconds'])}, {summary['tokens_per_second']:,.0f} tokens/s", flush=True)

    picture = io.BytesIO()
    loss_curve(history, title=f"A GPT of {model.num_parameters():,} parameters").savefig(picture, dpi=150)
    write_whole(out / "loss.png", picture.getvalue())
    write_whole(out / "summary.json", json.dumps(summary, indent=2) + "\n")
    print(f"written     {out / 'loss.png'}, {out / 'summary.json'}\n")
    print(sample(model, vocabulary, args))


def options() -> cli.Parser:
    """The command line."""
    parser = cli.Parser("Train a character-level GPT from scratch on a text, and let it write.")

    data = parser.add_argument_group("data")
    data.add_argument("--data", metavar="FILE", help="a text in UTF-8 (default: Python's own language reference)")

    cli.add_options(
        parser.add_argument_group("model"),
        GPTConfig,
        block_size="the longest context, in characters",
        n_layer="transformer blocks",
        n_head="attention heads in each; they divide --n-embd",
        n_embd="channels: the width of the model",
        dropout="share of the activations dropped in training; helps where a large model meets a short text",
        bias="biases in the linear layers and the layer norms",
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
        clip="largest norm of the gradient, longer ones are shortened to it; 0: no limit",
        eval_every="steps between two validations; 0: only at the end",
        seed="of the initial weights, the batches, the dropout and the sample",
    )
    training.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where to compute")

    output = parser.add_argument_group("output")
    output.add_argument("--out", metavar="DIR", default="runs/char", help="folder for loss.png and summary.json")
    output.add_argument(
        "--sample-tokens", metavar="N", type=cli.at_least(0), default=500, help="characters that it writes at the end"
    )
    output.add_argument(
        "--temperature", metavar="X", type=cli.at_least(0, float), default=0.8, help="0: always the likeliest character"
    )
    output.add_argument(
        "--top-k", metavar="N", type=cli.at_least(1), help="choose among the N likeliest characters (default: all)"
    )
    return parser


def summarise(history: list[Step], seconds: float, model: GPT, config: TrainConfig, args: Namespace) -> dict:
    """What summary.json holds."""
    val_loss = history[-1].val_loss
    return {
        "val_loss": val_loss,
        "perplexity": math.exp(min(val_loss, 700)),
        "bits_per_character": val_loss / math.log(2),
        "steps": len(history),
        "seconds": seconds,  # evaluation included
        "tokens_per_second": sum(s.tokens for s in history) / sum(s.seconds for s in history),  # of training alone
        "parameters": model.num_parameters(),
        "config": {"data": args.data, "device": args.device, **asdict(model.config), **asdict(config)},
    }


def sample(model: GPT, vocabulary: Vocabulary, args: Namespace) -> str:
    """What the model writes after a line break."""
    start = "\n" if "\n" in vocabulary.characters else vocabulary.characters[0]
    ids = to_device(vocabulary.encode(start)[None], args.device)
    ids = model.generate(ids, args.sample_tokens, args.temperature, args.top_k, args.seed)
    return vocabulary.decode(to_device(ids[0, 1:], "cpu"))


if __name__ == "__main__":
    cli.run(main)
