"""The pictures of the lessons: where they go, and the lines that belong into each picture of a loss."""

import math
from typing import TYPE_CHECKING, Union

from ..draw import Picture
from .place import folder

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe & Ito's colours, which colour-blind readers can tell apart.
BLUE, ORANGE, GREEN, RED, GREY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#666666"


def save_figure(figure: Union["Figure", Picture], name: str) -> None:
    """Save a figure as figures/NAME.png, a drawn graph as figures/NAME.svg, beside the file that calls this.

    In a notebook the folder is in the current one. If it cannot be written, this says so, and the lesson goes on.
    """
    figures = folder() / "figures"
    try:
        figures.mkdir(exist_ok=True)
        if isinstance(figure, Picture):
            path = figures / f"{name}.svg"
            figure.save(path)
        else:
            path = figures / f"{name}.png"
            figure.savefig(path, dpi=120, bbox_inches="tight")
        print(f"picture: {figures.name}/{path.name}")
    except OSError as error:
        print(f"picture {name} is not saved: {error}")


def bounds(axes: "Axes", V: int, entropy: float | None = None) -> None:
    """Draw the losses between which a model of a language lies: ln V, guessing, and its entropy if that is known."""
    guessing = math.log(V)
    lines = [(guessing, f"ln V = {guessing:.2f}: guessing", 0.99, "right", "bottom")]
    if entropy is not None:  # the label stands where few curves are: they begin high, and end near H or below
        lines.append((entropy, f"H = {entropy:.2f}: the floor", 0.01, "left", "top"))
    for value, text, x, ha, va in lines:
        axes.axhline(value, color=GREY, linestyle="--", linewidth=1)
        axes.text(x, value, text, color=GREY, ha=ha, va=va, transform=axes.get_yaxis_transform())
    axes.set_ylim(0, guessing * 1.15)
