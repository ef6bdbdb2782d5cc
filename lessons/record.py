"""Record the longer experiments that lessons draw, as small JSON files in recorded/, with configuration and seeds.

    python lessons/record.py            # all of them: minutes
    python lessons/record.py 09         # those of lesson 09

A lesson draws what was recorded, and runs one point of it again, which must land where the recorded one is.
"""

import json
import sys
from pathlib import Path

from threadpoolctl import threadpool_limits

from tinylm import GPT, GPTConfig, random
from tinylm.data import Markov
from tinylm.training import TrainConfig, TrainState, train

FOLDER = Path(__file__).parent / "recorded"


def rates():
    """Lesson 09: the final loss against the learning rate, with and without a warmup."""
    model = {"vocab_size": 8, "block_size": 32, "n_layer": 2, "n_head": 4, "n_embd": 32}
    config = {"steps": 300, "batch_size": 16, "eval_every": 0}
    language = Markov()
    train_tokens, fresh = language.tokens(100_000, seed=1), language.tokens(5_000, seed=2)
    points = []
    for lr in (1e-3, 3e-3, 1e-2, 2e-2, 4e-2, 8e-2, 0.16):
        for warmup in (0, 30):
            for seed in (0, 1, 2):
                random.seed(seed)
                state = TrainState(GPT(GPTConfig(**model)), TrainConfig(**config, lr=lr, warmup=warmup, seed=seed))
                (*_, last) = train(state, train_tokens, fresh)
                points.append({"lr": lr, "warmup": warmup, "seed": seed, "loss": round(last.val_loss, 4)})
                print(points[-1], flush=True)
    return {"model": model, "training": config, "entropy": language.entropy, "points": points}


RECORDS = {"09_rates": rates}


def main():
    wanted = sys.argv[1:]
    names = [name for name in RECORDS if not wanted or name[:2] in wanted]
    if not names:
        sys.exit(f"record.py: nothing is recorded for {', '.join(wanted)}; there are {', '.join(RECORDS)}")
    FOLDER.mkdir(exist_ok=True)
    with threadpool_limits(1):  # small matrices: several threads would wait for each other
        for name in names:
            text = json.dumps(RECORDS[name](), indent=1)
            (FOLDER / f"{name}.json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
