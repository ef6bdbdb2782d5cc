"""Shared by the command-line programs: flags from a dataclass, one-line errors, progress of a run."""

import argparse
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from time import perf_counter
from typing import Any, NoReturn, TypeVar

import numpy as np

from .optim import warmup_cosine
from .training import Step

Config = TypeVar("Config")


class _Help(argparse.ArgumentDefaultsHelpFormatter):
    """Adds each flag's default to its help, unless the default is None: such a help text describes it itself."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default is None else super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose --help shows the defaults, and whose errors are one line."""

    def __init__(self, description: str | None):
        super().__init__(description=description, formatter_class=_Help, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {' '.join(message.splitlines())}\n")

    @contextmanager
    def mistakes(self) -> Iterator[None]:
        """Inside, a ValueError is a mistake in the arguments: it ends the program with one line and status 2."""
        try:
            yield
        except ValueError as error:
            self.error(str(error))
        except MemoryError as error:
            self.error(f"this does not fit into memory: {error}")


def add_options(group: Any, config: type, **helps: str) -> None:
    """Add a flag with its default for each field of the dataclass `config` named in `helps`: --n-layer for n_layer."""
    known = {field.name: field for field in fields(config)}
    for name, text in helps.items():
        field = known[name]
        kind: dict[str, Any] = {"type": field.type, "metavar": "N" if field.type is int else "X"}
        if field.type is bool:
            kind = {"action": argparse.BooleanOptionalAction}
        group.add_argument("--" + name.replace("_", "-"), default=field.default, help=text, **kind)


def from_options(config: type[Config], options: argparse.Namespace, **more: Any) -> Config:
    """The dataclass `config` made from the flags with its fields' names, and from `more`."""
    names = [field.name for field in fields(config)]  # type: ignore[arg-type]
    return config(**{name: getattr(options, name) for name in names if name in options}, **more)


def at_least(low: float, kind: Callable[[str], Any] = int) -> Callable[[str], Any]:
    """For add_argument(type=...): a number that is finite and not below `low`."""

    def parse(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = float("nan")
        if not low <= value < float("inf"):
            what = "a whole number" if kind is int else "a number"
            raise argparse.ArgumentTypeError(f"must be {what} of at least {low}, not {text!r}")
        return value

    return parse


def run(main: Callable[[], None]) -> NoReturn:
    """Run a program, and exit as a shell expects: one line that says what stopped it, and a status.

    0: done; 1: failed while running; 2: a mistake in the arguments (see Parser); 130: Ctrl-C.
    """
    program = os.path.basename(sys.argv[0])
    np.seterr(over="ignore", invalid="ignore")  # the training loop checks for non-finite values itself
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")  # type: ignore[union-attr]  # a terminal may lack characters of the text
    try:
        main()
        sys.stdout.flush()
        sys.exit(0)
    except Stopped as stop:
        message, status = f"stopped {stop}", stop.status
    except KeyboardInterrupt as stop:
        message, status = f"interrupted {stop}".strip(), 130
    except FloatingPointError as error:
        message, status = f"error: {error}; a smaller learning rate may help", 1
    except MemoryError as error:
        message, status = f"error: out of memory: {error}", 1
    except BrokenPipeError:  # the reader of our output has gone (| head)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as error:
        message, status = f"error: {error}", 1
    print(f"{program}: {message}", file=sys.stderr)
    sys.exit(status)


class Stopped(Exception):
    """A signal ended the run after a complete step. The program exits with 128 + the signal's number."""

    def __init__(self, number: int, stands: str):
        super().__init__(stands)
        self.status = 128 + number


class Stop:
    """Inside, Ctrl-C and SIGTERM only set `stop.signal` to the signal's number (0 before); the program must check it.

    So a step is never interrupted in the middle. A second Ctrl-C interrupts at once.
    """

    def __init__(self) -> None:
        self.signal = 0

    def __enter__(self) -> "Stop":
        self._before = {number: signal.signal(number, self._asked) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _asked(self, number: int, _: object) -> None:
        if self.signal:
            raise KeyboardInterrupt
        self.signal = number


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
        left = clock((now - self.started) / (step.step - self.done) * (self.steps - step.step))
        line = f"{at} {loss} lr {step.lr:.1e} norm {step.grad_norm:.2f} {speed:,.0f} tok/s {left} left"
        if step.val_loss is not None:
            self.validated = f", validation loss {step.val_loss:.3f} at step {step.step}"
        self.stands = f"after step {step.step} of {self.steps}: {loss}{self.validated}"

        if not self.console.is_interactive:
            if step.val_loss is not None or step.step == self.done + 1 or now >= self.due:
                print(line if step.val_loss is None else f"{line} validation loss {step.val_loss:.3f}", flush=True)
                self.due = now + self.period
            return
        if step.val_loss is not None:
            self.console.print(f"{at} {loss} validation loss {step.val_loss:.3f}")
        if now >= self.due:
            self.live.update(self._with_bar(line, step.step), refresh=True)
            self.due = now + self.period

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


def clock(seconds: float) -> str:
    """65 -> '1:05', 3661 -> '1:01:01'."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
