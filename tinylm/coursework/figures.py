"""The pictures of the lessons: where they go, and the lines that belong into each picture of a loss."""

import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe & Ito's colours, which colour-blind readers can tell apart.
BLUE, ORANGE, GREEN, RED, GREY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#666666"


def save_figure(figure: "Figure", name: str) -> None:
    """Save a picture as figures/NAME.png, beside the file that calls this (in a notebook, in the current folder).

    If the folder cannot be written, it says so, and the lesson goes on.
    """
    caller = sys._getframe(1).f_globals.get("__file__")
    folder = (Path(caller).parent if caller else Path()) / "figures"
    try:
        folder.mkdir(exist_ok=True)
        figure.savefig(folder / f"{name}.png", dpi=120, bbox_inches="tight")
        print(f"picture: {folder.name}/{name}.png")
    except OSError as error:
        print(f"picture {name} is not saved: {error}")


def bounds(axes: "Axes", V: int, entropy: float) -> None:
    """Draw the two losses between which a model of a language lies: ln V, guessing, and its entropy (nats a token)."""
    guessing = math.log(V)
    for value, text in ((guessing, f"ln V = {guessing:.2f}: guessing"), (entropy, f"H = {entropy:.2f}: the floor")):
        axes.axhline(value, color=GREY, linestyle="--", linewidth=1)
        axes.text(0.99, value, text, color=GREY, ha="right", va="bottom", transform=axes.get_yaxis_transform())
    axes.set_ylim(0, guessing * 1.15)
