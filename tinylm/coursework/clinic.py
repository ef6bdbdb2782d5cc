"""The bug clinic: broken runs to diagnose. Their curves are free, probes are counted.

    case = clinic.case(7)          # its curves, as a picture
    case.probe("causality")        # run on the broken model; counted
    case.diagnose("no positions")  # right, or two more
    clinic.score()

Whoever needs the fewest probes wins. The cases are runs of `bugs`; their curves were recorded, the probes run live.
"""

import difflib
import textwrap
from typing import TYPE_CHECKING

from .. import probe
from . import bugs
from .bugs.cases import CASES
from .figures import BLUE, GREY, ORANGE, bounds, save_figure
from .place import recorded

if TYPE_CHECKING:
    from matplotlib.figure import Figure

RECORD = "14_clinic"
WRONG = 2  # probes that a wrong diagnosis costs

_cases: dict[int, "Case"] = {}


class Case:
    """One broken run."""

    def __init__(self, number: int):
        self.number, self.run = number, bugs.find(CASES[number - 1])
        self.used: list[str] = []  # probes
        self.missed: list[str] = []  # wrong diagnoses
        self.solved = False

    @property
    def cost(self) -> int:
        """Probes so far; a wrong diagnosis counts as two."""
        return len(self.used) + WRONG * len(self.missed)

    def curves(self) -> "Figure":
        """The dashboard: losses, gradient norm and learning rate, over those of the sound run in grey."""
        logs = recorded(RECORD)["runs"]
        return dashboard(logs[self.run.name], logs[""], f"case {self.number}, {self.run.dtype}")

    def probe(self, name: str) -> None:
        """Run one probe on the broken run, print its result, and count it. Raises ValueError for another name."""
        if not isinstance(name, str) or name not in probe.PROBES:
            raise ValueError(f"there is no probe {name!r}; there are: {', '.join(probe.PROBES)}")
        print(self.run.probed(name))
        if name not in self.used and not self.solved:
            self.used.append(name)
        print(f"case {self.number}: {_probes(self.cost)}")

    def diagnose(self, name: str | None) -> None:
        """Name the bug, or give a part of its name; None: not yet. A wrong diagnosis counts as two probes.

        Prints the wrong lines and the right ones if it is right. A name that no bug of the catalogue has costs nothing.
        """
        if name is None or name is Ellipsis:
            print(f"case {self.number} is not diagnosed yet; clinic.names() lists what it can be")
            return
        said = str(name).lower().strip()
        meant = [bug for bug in bugs.BUGS if said and said in bug.lower()]
        meant = [bug for bug in meant if bug.lower() == said] or meant
        if len(meant) != 1:
            near = meant if len(meant) in (2, 3) else difflib.get_close_matches(said, bugs.BUGS, 3, 0.3)
            print(
                f"case {self.number}: {name!r} is none of clinic.names()" + (f"; {' or '.join(near)}?" if near else "")
            )
        elif meant[0] != self.run.name:
            if meant[0] not in self.missed and not self.solved:
                self.missed.append(meant[0])
            print(f"case {self.number}: no, it is not {meant[0]!r}; {_probes(self.cost)}")
        else:
            self.solved = True
            print(f"case {self.number}: right, {self.run.name!r}, after {_probes(self.cost)}")
            print(textwrap.fill(self.run.tells, 85))
            for right, wrong in bugs.changes(type(self.run)):
                print(f"\n# wrong\n{wrong}\n\n# right\n{right}")


def case(number: int) -> Case:
    """The case of a number from 1 to 12; its dashboard is saved as figures/14_case_07.png beside the lesson.

    The same number gives the same Case, with what it has cost so far. Raises ValueError for another number.
    """
    if not isinstance(number, int) or number not in range(1, len(CASES) + 1):
        raise ValueError(f"there is no case {number!r}: they are numbered from 1 to {len(CASES)}")
    if number not in _cases:
        _cases[number] = Case(number)
    save_figure(_cases[number].curves(), f"14_case_{number:02}")
    return _cases[number]


def names() -> None:
    """Print what a case can be: the names of all bugs in the catalogue."""
    print("\n".join(sorted(bugs.BUGS, key=str.lower)))


def score() -> None:
    """Print what each case that was opened has cost so far."""
    for number, each in sorted(_cases.items()):
        print(f"case {number:2}: {'diagnosed' if each.solved else 'open':10}{_probes(each.cost)}")
    solved = [each for each in _cases.values() if each.solved]
    costs = [sum(each.cost for each in _cases.values() if each.solved is done) for done in (True, False)]
    print(f"{len(solved)} of {len(CASES)} diagnosed, with {_probes(costs[0])}; in open cases: {_probes(costs[1])}")


def dashboard(log: dict, sound: dict, title: str) -> "Figure":
    """A run's losses, gradient norms and learning rates, over those of the sound run in grey. For logs see `record`."""
    import matplotlib.pyplot as plt  # slow to import, and `check` does without

    figure, (losses, norms, rates) = plt.subplots(
        1, 3, figsize=(12, 3.6), layout="constrained", width_ratios=[2, 1, 1], num=title or None, clear=True
    )
    losses.plot(sound["evaluated"], sound["fresh"], color=GREY, linewidth=1, label="fresh text, sound run")
    losses.plot(sound["steps"], sound["loss"], ":", color=GREY, linewidth=1, label="training text, sound run")
    losses.plot(log["steps"], log["loss"], color=ORANGE, label="training text")
    losses.plot(log["evaluated"], log["fresh"], "o-", color=BLUE, markersize=3, label="fresh text")
    bounds(losses, bugs.LANGUAGE.V, bugs.LANGUAGE.entropy)
    losses.set(xlabel="step", ylabel="loss (nats a token)", title=title)
    if max(log["fresh"]) > losses.get_ylim()[1]:
        losses.text(0.15, 0.93, f"fresh text: up to {max(log['fresh']):.1f}", color=BLUE, transform=losses.transAxes)
    figure.legend(frameon=False, ncols=4, loc="outside lower left")
    for axes, key, label in ((norms, "norm", "gradient norm before clipping"), (rates, "lr", "learning rate")):
        axes.plot(sound["steps"], sound[key], color=GREY, linewidth=1)
        axes.plot(log["steps"], log[key], color=ORANGE)
        axes.set(xlabel="step", title=label)
    norms.set_yscale("log")
    norms.set_ylim(min(0.1, 0.8 * min(log["norm"])), max(10, 1.5 * max(log["norm"])))
    norms.yaxis.set_major_formatter("{x:g}")
    return figure


def record(run: bugs.Run) -> dict[str, list[float]]:
    """Train, and thin the log out for a picture: means of ten steps."""
    log = run.train()
    tens = {
        key: [sum(log[key][i : i + 10]) / 10 for i in range(0, len(log[key]), 10)] for key in ("loss", "norm", "lr")
    }
    return {
        "steps": list(range(10, len(log["loss"]) + 1, 10)),
        "evaluated": log["evaluated"],
        **{key: [float(f"{x:.4g}") for x in values] for key, values in {**tens, "fresh": log["fresh"]}.items()},
    }


def _probes(n: int) -> str:
    return "1 probe" if n == 1 else f"{n} probes"
