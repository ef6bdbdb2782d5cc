"""What a run shows on the screen."""

from collections.abc import Iterator
from contextlib import contextmanager
from time import perf_counter
from typing import Any

from ..cli import clock
from ..optim import warmup_cosine
from ..training import Step


def tell_changes(before: dict[str, Any], now: dict[str, Any], step: int) -> None:
    """Print which settings of a resumed run differ from those until `step`, and the effect on its schedule."""
    for name, value in now.items():
        if name in before and before[name] != value and name != "steps":
            print(f"note: {name} was {before[name]} and is {value} from here on")
    if step >= now["steps"]:
        print(f"note: the run has had its {now['steps']} steps; give more --steps to go on")
    elif before.get("steps") not in (None, now["steps"]):
        at = [
            warmup_cosine(step, config["steps"], config["lr"], config["warmup"], config["min_lr"])
            for config in ({**now, **before}, now)
        ]
        print(
            f"note: the run was to end after {before['steps']} steps and now ends after {now['steps']}; the cosine is "
            f"stretched to it, and the learning rate goes on at {at[1]:.2e} instead of {at[0]:.2e}"
        )


class Smooth:
    """An exponential moving average over about 1 / (1 - beta) values, with bias correction."""

    def __init__(self, beta: float = 0.98):
        self.beta = beta
        self.total = self.weight = 0.0

    def add(self, value: float) -> float:
        """The average up to and including `value`."""
        self.total = self.beta * self.total + (1 - self.beta) * value
        self.weight = self.beta * self.weight + (1 - self.beta)
        return self.total / self.weight


class Progress:
    """Shows a training run: one live line on a terminal, a plain line every few seconds elsewhere.

        with Progress(steps) as progress:
            for step in train(...):
                progress.show(step)

    Ctrl-C inside raises a KeyboardInterrupt that says how far the run had come.
    """

    def __init__(self, steps: int, done: int = 0):
        from rich.console import Console
        from rich.live import Live

        self.steps = steps
        self.done = done  # before this process began
        self.console = Console(highlight=False, markup=False)
        self.live = Live(console=self.console, auto_refresh=False, transient=True)
        self.period = 0.1 if self.console.is_interactive else 5.0  # seconds between two lines
        self.loss, self.seconds = Smooth(), Smooth()
        self.stands, self.validated = "before the first step", ""
        self.started = perf_counter()
        self.due = 0.0
        self.troubles: set[str] = set()

    def __enter__(self) -> "Progress":
        if self.console.is_interactive:
            self.live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.live.stop()
        if kind is KeyboardInterrupt:
            raise KeyboardInterrupt(self.stands) from None

    def show(self, step: Step) -> None:
        """Show a finished step."""
        now = perf_counter()
        at = f"{step.step:{len(str(self.steps))}}/{self.steps}"
        loss = f"loss {step.loss:.3f} smoothed {self.loss.add(step.loss):.3f}"
        speed = step.tokens / self.seconds.add(step.seconds)
        pace = (now - self.started) / max(1, step.step - self.done)  # a resumed run may begin with an evaluation
        left = clock(pace * (self.steps - step.step))
        line = f"{at} {loss} lr {step.lr:.1e} norm {step.grad_norm:.2f} {speed:,.0f} tok/s {left} left"
        if step.val_loss is not None:
            self.validated = f", validation loss {step.val_loss:.3f} at step {step.step}"
        self.stands = f"after step {step.step} of {self.steps}: {loss}{self.validated}"

        if not self.console.is_interactive:
            if step.val_loss is not None or not self.due or now >= self.due:
                print(line if step.val_loss is None else f"{line} validation loss {step.val_loss:.3f}", flush=True)
                self.due = now + self.period
            return
        if step.val_loss is not None:
            self.console.print(f"{at} {loss} validation loss {step.val_loss:.3f}")
        if now >= self.due:
            self.live.update(self._with_bar(line, step.step), refresh=True)
            self.due = now + self.period

    def quote(self, text: str) -> None:
        """Print what the model wrote, indented."""
        self.say("\n".join("  | " + line for line in text.splitlines()))

    def say(self, message: str) -> None:
        """Print a separate line."""
        self.console.print(message, soft_wrap=True)

    @contextmanager
    def disk_trouble(self, what: str) -> Iterator[None]:
        """Inside, an OSError (a full disk) is reported once, and the run continues: what was saved before is kept."""
        try:
            yield
            self.troubles.discard(what)
        except OSError as error:
            if what not in self.troubles:
                self.say(f"warning: {what} could not be saved ({error.strerror}); the checkpoints before are intact")
            self.troubles.add(what)

    def _with_bar(self, line: str, step: int) -> Any:
        """The line, and a bar where there is room for one beside it."""
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        if self.console.width < len(line) + 10:
            return Text(line, no_wrap=True, overflow="ellipsis")
        row = Table.grid(expand=True, padding=(0, 1))
        row.add_column(no_wrap=True)
        row.add_column(ratio=1)
        row.add_row(line, ProgressBar(self.steps, step))
        return row
