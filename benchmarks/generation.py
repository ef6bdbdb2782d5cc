"""Tokens a second of generation with a cache of keys and values, in tinylm and in PyTorch.

    python benchmarks/generation.py [--config S M] [--batch 1 16] [--json FILE]

Both continue the same prompts with the same weights, greedily, in turn; the fastest of several
rounds counts. PyTorch runs in inference mode and writes into a cache that is allocated once. Both must say the same.
"""

import sys
from functools import partial

import common
import numpy as np
import torch
from torch.nn import functional as F
from torch_gpt import TorchGPT, from_tinylm
from train_step import CONFIGS

import tinylm
from tinylm import GPT

PROMPT = 8  # tokens


class Cached:
    """Greedy generation by a TorchGPT, a token at a time. The cache is allocated once."""

    def __init__(self, model: TorchGPT, model_config: tinylm.GPTConfig, batch: int):
        self.model, self.n_head = model.transformer, model_config.n_head
        shape = (batch, self.n_head, model_config.block_size, model_config.n_embd // self.n_head)
        self.caches = [(torch.empty(shape), torch.empty(shape)) for _ in self.model.h]

    @torch.inference_mode()
    def generate(self, prompts: torch.Tensor, n_tokens: int) -> torch.Tensor:
        """Prompts (B, T) and the `n_tokens` likeliest tokens after them."""
        length = prompts.shape[1]
        ids = torch.empty(len(prompts), length + n_tokens, dtype=torch.long)
        ids[:, :length] = prompts
        seen = 0
        for end in range(length, length + n_tokens):
            ids[:, end] = self.logits(ids[:, seen:end], seen).argmax(dim=-1)
            seen = end
        return ids

    def logits(self, ids: torch.Tensor, seen: int) -> torch.Tensor:
        """Of the token after `ids` (B, T), which come after `seen` tokens in the cache: (B, V)."""
        B, T = ids.shape
        x = self.model.wte(ids) + self.model.wpe.weight[seen : seen + T]
        for block, (keys, values) in zip(self.model.h, self.caches, strict=True):
            q, k, v = block.attn.c_attn(block.ln_1(x)).view(B, T, 3, self.n_head, -1).permute(2, 0, 3, 1, 4)
            keys[:, :, seen : seen + T] = k
            values[:, :, seen : seen + T] = v
            k, v = keys[:, :, : seen + T], values[:, :, : seen + T]
            y = F.scaled_dot_product_attention(q, k, v, is_causal=T > 1)
            x = x + block.attn.c_proj(y.transpose(1, 2).reshape(B, T, -1))
            x = x + block.mlp(block.ln_2(x))
        return F.linear(self.model.ln_f(x[:, -1]), self.model.wte.weight)


def check(ours: np.ndarray, theirs: np.ndarray, twin: TorchGPT) -> None:
    """Exit unless both chose the same tokens, up to one where two were as good as equal."""
    for row, rival in zip(ours, theirs, strict=True):
        differ = np.flatnonzero(row != rival)
        if len(differ):
            with torch.inference_mode():
                best = twin(torch.from_numpy(row[None, : differ[0]]))[0, -1].topk(2).values
            if (gap := float(best[0] - best[1])) > 1e-4:
                sys.exit(f"the tokens differ from {differ[0]} on, where the best two logits are {gap:.2g} apart")


def measure(model: GPT, twin: TorchGPT, batch: int, n_tokens: int, rounds: int) -> dict[str, float]:
    """Seconds of the fastest round of each: tinylm's engines and PyTorch."""
    prompts = np.random.default_rng(0).integers(model.config.vocab_size, size=(batch, PROMPT))
    cached = Cached(twin, model.config, batch)
    engines = common.compared()
    said: dict[str, np.ndarray] = {}

    def ours(engine: str) -> None:
        with common.engine(engine):
            said[engine] = model.generate(prompts, n_tokens, temperature=0)

    def theirs() -> None:
        said["torch"] = cached.generate(torch.from_numpy(prompts), n_tokens).numpy()

    runs = {engine: partial(ours, engine) for engine in engines} | {"torch": theirs}
    times = common.in_turn(runs, rounds)
    for engine in engines:
        check(said[engine], said["torch"], twin)
    return {who: min(seconds) for who, seconds in times.items()}


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--config", nargs="+", choices=CONFIGS, default=list(CONFIGS))
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 16], help="prompts at a time")
    parser.add_argument("--tokens", type=int, default=120, help="at most so many for each, or to the end of the block")
    parser.add_argument("--rounds", type=int, default=3, help="how often each generates; the fastest counts")
    args = parser.parse_args()

    engines = common.compared()
    columns = {"config": ("model", ""), "batch": ("batch", "d"), "tokens": ("tokens each", "d")}
    columns |= {f"{who}_tokens_s": (f"{who} tokens/s", ",.0f") for who in (*engines, "torch")}
    table = common.Table(columns | {f"{who}_ratio": (f"{who}/torch", ".2f") for who in engines})
    for name in args.config:
        config = CONFIGS[name][0]
        n_tokens = 4 if args.quick else min(args.tokens, config.block_size - PROMPT)
        tinylm.random.seed(0)
        model = GPT(config)
        model.eval()
        twin = from_tinylm(model)
        for batch in args.batch:
            seconds = measure(model, twin, batch, n_tokens, 1 if args.quick else args.rounds)
            speed = {f"{who}_tokens_s": batch * n_tokens / s for who, s in seconds.items()}
            ratios = {f"{engine}_ratio": seconds["torch"] / seconds[engine] for engine in engines}
            table.row(config=name, batch=batch, tokens=n_tokens, **speed, **ratios)
    common.save(args.json, table.rows)


if __name__ == "__main__":
    main()
