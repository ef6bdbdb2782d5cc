"""Generate text with a trained model: it continues a prompt.

tinylm generate --run runs/char --prompt "The "
tinylm generate --prompt "The " --temperature 0.7 --top-p 0.95 --stop "."
"""

import numpy as np

from tinylm import cli, fused
from tinylm.array import to_device
from tinylm.data import Tokenizer
from tinylm.runs import load_model, newest_run


def main() -> None:
    parser = options()
    args = parser.parse_args()

    with parser.mistakes():
        folder = newest_run(saved=True) if args.run is None else args.run
        if folder is None:
            raise ValueError(
                "there is no run with a checkpoint under runs/: `tinylm train` makes one, or name a folder with --run"
            )
        model, tokenizer = load_model(folder, args.device)
        fused.load(tell=lambda message: None)
        text = first_text(tokenizer) if args.prompt is None else args.prompt
        prompt = encode(tokenizer, text, "--prompt")
        if args.stop is not None:
            encode(tokenizer, args.stop, "--stop")  # the model must be able to write it
        choice = {name: getattr(args, name) for name in ("temperature", "top_k", "top_p", "seed")}
        tokens = model.stream(to_device(prompt[None], args.device), args.tokens, **choice)

    print(text, end="", flush=True)
    written, ids, count = "", [], 0
    try:
        for (token,) in tokens:
            count += 1
            ids.append(int(token))
            new = tokenizer.decode(ids)
            if new.endswith("\ufffd") and len(ids) < 4:  # a character whose bytes are not complete yet
                continue
            print(new, end="", flush=True)
            written, ids = written + new, []
            if args.stop is not None and written.endswith(args.stop):
                break
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"after {count} tokens") from None
    finally:
        print()  # so that the next output starts on a new line


def first_text(tokenizer: Tokenizer) -> str:
    """A line break, or the first token's text where the model has no line break."""
    try:
        tokenizer.encode("\n")
        return "\n"
    except ValueError:
        return tokenizer.decode([0])


def options() -> cli.Parser:
    """The command line."""
    parser = cli.Parser("Generate text: a trained model continues a prompt.")
    parser.add_argument("--run", metavar="DIR", help="folder of the run that trained the model (default: the last)")
    parser.add_argument("--prompt", metavar="TEXT", help="the text to continue (default: a line break)")
    parser.add_argument("--tokens", metavar="N", type=cli.at_least(0), default=500, help="tokens to write at most")
    parser.add_argument("--stop", metavar="TEXT", help="stop as soon as this text was written (default: none)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where to compute")

    choice = parser.add_argument_group("choice of the next token")
    choice.add_argument(
        "--temperature",
        metavar="X",
        type=cli.at_least(0, float),
        default=0.8,
        help="above 1: more random than the model; below 1: less random",
    )
    choice.add_argument(
        "--greedy", dest="temperature", action="store_const", const=0.0, help="always the likeliest: --temperature 0"
    )
    choice.add_argument("--top-k", metavar="N", type=cli.at_least(1), help="keep only the N likeliest (default: all)")
    choice.add_argument(
        "--top-p", metavar="P", type=float, default=1.0, help="choose among the fewest that together have probability P"
    )
    choice.add_argument("--seed", metavar="N", type=int, default=0, help="random seed: another seed gives another text")
    return parser


def encode(tokenizer: Tokenizer, text: str, flag: str) -> np.ndarray:
    """Token ids of a flag's text. Raises ValueError that names the flag and the characters outside the vocabulary."""
    if not text:
        raise ValueError(f"{flag} is empty")
    try:
        return tokenizer.encode(text)
    except ValueError as error:
        raise ValueError(f"{flag} has {error}") from None


if __name__ == "__main__":
    cli.run(main)
