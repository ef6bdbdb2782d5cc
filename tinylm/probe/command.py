"""The probes on a run's newest checkpoint.

    tinylm probe runs/char

It exits with status 1 if something is found.
"""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from .. import cli, fused, random
from ..data import fingerprint, language_reference, make_tokenizer, open_tokens, read_text, split
from ..runs import DamagedError, Run
from ..runs.checkpoint import FORMAT
from ..runs.run import MODELS
from ..training import TrainConfig, TrainState
from . import run


def main() -> None:
    parser = cli.Parser("Look for silent bugs in a run: exits with status 1 if something is found.")
    parser.add_argument("run", metavar="RUN", help="folder of a run with a checkpoint")
    args = parser.parse_args()
    with parser.mistakes():
        state, train_tokens, val_tokens = load(Path(args.run), tell=print)
        fused.load(tell=lambda message: None)
        report = run(state, train_tokens, val_tokens)
    print(report)
    print(f"found: {len(report.findings)}" if report.findings else "nothing found")
    sys.stdout.flush()
    if report.findings:
        sys.exit(1)


def load(folder: Path, tell: Callable[[str], None]) -> tuple[TrainState, np.ndarray, np.ndarray | None]:
    """(the state of a run's newest sound checkpoint, its training tokens, its validation tokens).

    Where its data cannot be read again, `tell` says why, and the tokens are random, with None for validation. Raises
    ValueError if there is no sound checkpoint, or for a model or an optimizer of another class than `tinylm train` has.
    """
    found = Run(folder)
    saved = found.checkpoints()
    if not saved:
        raise ValueError(f"{folder} holds no checkpoint of a run")
    for checkpoint in reversed(saved):
        try:
            content, about = checkpoint.read()
            break
        except DamagedError as error:
            tell(f"{error}: going back to an older checkpoint")
    else:
        raise ValueError(f"no checkpoint in {folder} is sound")
    kind = about["model"]["class"]
    if kind not in MODELS:
        raise ValueError(f"{folder} holds a model of class {kind}: probe it in Python, by tinylm.probe.run")
    if about["format"] != FORMAT:
        raise ValueError(f"{folder} was saved by an earlier version of tinylm, and cannot be resumed or probed")
    model = MODELS[kind](about["model"]["config"])
    state = TrainState(model, TrainConfig(**about["training"]))
    try:
        state.load_state_dict(content)
    except ValueError as error:
        raise ValueError(f"{folder} was not trained by AdamW ({error}): probe it in Python") from None
    tell(f"{checkpoint.path}: {model.num_parameters():,} parameters after {state.step} steps")
    tokenizer = make_tokenizer(about["tokenizer"])
    try:
        tokens = read_data(found.config(), tokenizer, about["data"], tell)
        return state, *split(tokens, block_size=state.block_size)
    except ValueError as error:
        tell(f"note: its data cannot be read again, so the tokens are random ({error})")
        size = max(10_000, 2 * state.block_size)
        return state, random.generator(state.config.seed).integers(tokenizer.vocab_size, size=size), None


def read_data(config: dict[str, Any], tokenizer: Any, expected: str, tell: Callable[[str], None]) -> np.ndarray:
    """The tokens of a run's `data`: a text, a prepared folder, or the default text. Raises ValueError."""
    if "data" not in config:
        raise ValueError("config.json does not say what they are")
    path = config["data"]
    if path is not None and Path(path).is_dir():
        tokens, _, found = open_tokens(path)
    else:
        tokens = tokenizer.encode(language_reference() if path is None else read_text(path))
        found = fingerprint(tokens)
    if found != expected:
        tell("note: the data have changed since the run was started")
    return tokens
