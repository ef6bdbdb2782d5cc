"""Record the longer experiments that lessons draw, as small JSON files in recorded/, with configuration and seeds.

    python lessons/record.py            # all of them: minutes
    python lessons/record.py 09         # those of lesson 09
    python lessons/record.py 12_longer  # one of them

A lesson draws what was recorded, and runs one point of it again, which must land where the recorded one is.
"""

import json
import re
import sys
from pathlib import Path
from typing import Any

from threadpoolctl import threadpool_limits

from tinylm import GPT, GPTConfig, override, random
from tinylm.coursework import bugs, clinic
from tinylm.coursework.bugs.broken import TruncatedNorm
from tinylm.data import Markov
from tinylm.ops.layer_norm import LayerNorm
from tinylm.training import TrainConfig, TrainState, evaluate, train

FOLDER = Path(__file__).parent / "recorded"
LANGUAGE = Markov()
TRAIN, FRESH = LANGUAGE.tokens(100_000, seed=1), LANGUAGE.tokens(5_000, seed=2)


def final_loss(model: dict[str, Any], training: dict[str, Any], seed: int) -> float:
    """Train a GPT; its loss on fresh text at the end."""
    random.seed(seed)
    state = TrainState(GPT(GPTConfig(**model)), TrainConfig(**training, seed=seed))
    (*_, last) = train(state, TRAIN, FRESH)
    assert last.val_loss is not None
    return round(last.val_loss, 4)


def truncated() -> dict[str, Any]:
    """Lesson 05: the final loss with the right backward of layer norm, and with the truncated one."""
    model = {"vocab_size": 8, "block_size": 32, "n_layer": 4, "n_head": 4, "n_embd": 32}
    training = {"steps": 300, "batch_size": 16, "lr": 1e-2, "warmup": 30, "eval_every": 0}
    losses: dict[str, list[float]] = {"right": [], "truncated": []}
    for seed in range(5):
        losses["right"].append(final_loss(model, training, seed))
        with override(LayerNorm, TruncatedNorm.layer_norm):
            losses["truncated"].append(final_loss(model, training, seed))
        print(seed, losses["right"][-1], losses["truncated"][-1], flush=True)
    return {"model": model, "training": training, "seeds": 5, **losses}


def rates() -> dict[str, Any]:
    """Lesson 09: the final loss against the learning rate, with and without a warmup."""
    model = {"vocab_size": 8, "block_size": 32, "n_layer": 2, "n_head": 4, "n_embd": 32}
    training = {"steps": 300, "batch_size": 16, "eval_every": 0}
    points = []
    for lr in (1e-3, 3e-3, 1e-2, 2e-2, 4e-2, 8e-2, 0.16):
        for warmup in (0, 30):
            for seed in (0, 1, 2):
                loss = final_loss(model, {**training, "lr": lr, "warmup": warmup}, seed)
                points.append({"lr": lr, "warmup": warmup, "seed": seed, "loss": loss})
                print(points[-1], flush=True)
    return {"model": model, "training": training, "entropy": LANGUAGE.entropy, "points": points}


SMALL = {"vocab_size": 8, "block_size": 32, "n_layer": 2, "n_head": 4, "n_embd": 32}
SHORT = {"steps": 600, "batch_size": 16, "lr": 2e-2, "warmup": 30, "eval_every": 50}


def memorise(
    length: int, seed: int, steps: int = 600, decay: float = 0.3, batch: int = 16, **shape: Any
) -> dict[str, float]:
    """Lesson 12: train on the first `length` tokens; the losses on them and on fresh text at the end, and the best."""
    random.seed(seed)
    gpt = GPT(GPTConfig(**{**SMALL, **shape}))
    config = TrainConfig(**{**SHORT, "steps": steps, "batch_size": batch}, weight_decay=decay, seed=seed)
    seen = [step.val_loss for step in train(TrainState(gpt, config), TRAIN[:length], FRESH) if step.val_loss]
    on_text = evaluate(gpt.eval(), TRAIN[: min(length, 5000)], 16, 32)
    return {"train": round(on_text, 4), "fresh": round(seen[-1], 4), "best": round(min(seen), 4)}


def on_1500(ways: dict[str, dict[str, Any]]) -> dict[str, list[dict[str, float]]]:
    """Lesson 12: each way of training on 1,500 tokens, with three seeds."""
    runs = {}
    for name, options in ways.items():
        runs[name] = [memorise(1500, seed, **options) for seed in (0, 1, 2)]
        print(name, runs[name], flush=True)
    return runs


def gaps() -> dict[str, Any]:
    """Lesson 12: losses on the training text and on fresh text, by the length of that text, and by remedy."""
    lengths = {}
    for length in (500, 1500, 5000, 20_000, 100_000):
        lengths[str(length)] = [memorise(length, seed) for seed in (0, 1, 2)]
        print(length, lengths[str(length)], flush=True)
    remedies = on_1500(
        {
            "nothing": {},
            "dropout 0.1": {"dropout": 0.1},
            "dropout 0.3": {"dropout": 0.3},
            "weight decay 1": {"decay": 1.0},
            "half as wide": {"n_embd": 16},
            "one layer": {"n_layer": 1},
            "batch of 64": {"batch": 64},
        }
    )
    remedies["stopping early"] = [{**each, "fresh": each["best"]} for each in remedies["nothing"]]
    remedies["20,000 tokens"] = lengths["20000"]
    return {"model": SMALL, "training": SHORT, "entropy": LANGUAGE.entropy, "lengths": lengths, "remedies": remedies}


def longer() -> dict[str, Any]:
    """Lesson 12: remedies with more steps, and two together."""
    runs = on_1500(
        {
            "nothing, 2000 steps": {"steps": 2000},
            "dropout 0.1, 2000 steps": {"steps": 2000, "dropout": 0.1},
            "dropout 0.3, 2000 steps": {"steps": 2000, "dropout": 0.3},
            "dropout 0.1 and one layer": {"dropout": 0.1, "n_layer": 1},
        }
    )
    return {"model": SMALL, "training": SHORT, "runs": runs}


def broken() -> dict[str, Any]:
    """Lesson 14, and the field guide: the logs of the sound run, "", and of one with each bug of the catalogue."""
    runs = {}
    for name in ("", *bugs.BUGS):
        runs[name] = clinic.record(bugs.find(name))
        print(name, runs[name]["fresh"][-1], flush=True)
    return {"training": vars(bugs.Run.config), "runs": runs}


RECORDS = {"05_truncated": truncated, "09_rates": rates, "12_gaps": gaps, "12_longer": longer, clinic.RECORD: broken}


def main() -> None:
    wanted = sys.argv[1:]
    names = [name for name in RECORDS if not wanted or name in wanted or name[:2] in wanted]
    if not names:
        sys.exit(f"record.py: nothing is recorded for {', '.join(wanted)}; there are {', '.join(RECORDS)}")
    FOLDER.mkdir(exist_ok=True)
    with threadpool_limits(1):  # small matrices: several threads would wait for each other
        for name in names:
            text = json.dumps(RECORDS[name](), indent=1)
            text = re.sub(r"\[[^][{}]*\]", lambda row: " ".join(row[0].split()), text)  # a list of numbers: one line
            (FOLDER / f"{name}.json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
