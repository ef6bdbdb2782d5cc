"""The cases of the clinic: the answers of lesson 14."""

# By number, from 1. Whoever reads on knows the answers.
CASES = (
    "no causal mask",
    "schedule stepped per micro-batch",
    "layer norm's backward without both terms",
    "accumulation undivided",
    "dropout left on in evaluation",
    "no positions",
    "gradients never unscaled",
    "the same batch at each step",
    "tied weight gets one of its two gradients",
    "optimizer state lost at resume",
    "validation text inside the training text",
    "clipping per tensor",
)
