"""Shared by the command-line programs: flags from a dataclass, one-line errors, signals, a screen that may vanish."""

import argparse
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import fields
from typing import Any, ClassVar, NoReturn, TypeVar

import numpy as np

Config = TypeVar("Config")


class _Help(argparse.ArgumentDefaultsHelpFormatter):
    """Adds each flag's default to its help, unless the default is None: such a help text describes it itself."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default is None else super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose --help shows the defaults, and whose errors are one line."""

    def __init__(self, description: str | None = None, **options: Any):
        super().__init__(description=description, formatter_class=_Help, allow_abbrev=False, **options)

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
    try:
        return config(**{name: getattr(options, name) for name in names if name in options}, **more)
    except TypeError as error:  # a config.json that somebody edited
        raise ValueError(error) from None


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

    0: done; 1: failed while running, or its output could not be written; 2: a mistake in the arguments (see Parser);
    129, 130, 143: stopped by SIGHUP, Ctrl-C, SIGTERM.
    """
    ended = False

    def end(number: int, _: object) -> None:
        if not ended:  # more signals must not disturb the end
            raise KeyboardInterrupt if number == signal.SIGINT else Stopped(number)

    def unraisable(what: Any) -> None:
        # Raised where Python cannot pass it on, in __del__ or a weak reference's callback: the signal comes once more.
        if isinstance(what.exc_value, KeyboardInterrupt | Stopped):
            if Stop.active is not None:
                Stop.active._interrupted = False  # it was not
            again = threading.Timer(0.01, os.kill, (os.getpid(), getattr(what.exc_value, "status", 130) - 128))
            again.daemon = True
            again.start()
        else:
            sys.__unraisablehook__(what)

    sys.unraisablehook = unraisable
    program = os.path.basename(sys.argv[0])
    np.seterr(over="ignore", invalid="ignore")  # the training loop checks for non-finite values itself
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by the shell (>&-)
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
        getattr(sys, name).reconfigure(errors="replace")  # a terminal may lack characters of the text
    try:
        try:
            for number in _signals():
                signal.signal(number, end)
            main()
            sys.stdout.flush()
        finally:
            ended = True
        message, status = "", 0
    except Stopped as stop:
        message, status = f"stopped {stop}".strip(), stop.status
    except KeyboardInterrupt as stop:
        message, status = f"interrupted {stop}".strip(), 130
    except FloatingPointError as error:
        message, status = f"error: {error}; a smaller learning rate may help", 1
    except MemoryError as error:
        message, status = f"error: out of memory: {error}", 1
    except BrokenPipeError:  # the reader of our output has gone (| head)
        message, status = "", 1
    except OSError as error:
        message, status = f"error: {error}", 1
    with suppress(OSError):
        if message:
            print(f"{program}: {message}", file=sys.stderr, flush=True)
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:  # otherwise Python would complain about it at its end
            discard(stream)
    sys.exit(status)


def discard(stream: Any) -> None:
    """Send what is still written to an output stream to nowhere."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


class Screen:
    """Inside, training goes on even if its output can no longer be written: the terminal was closed, the disk is full.

    The block then ends with the OSError.
    """

    def __enter__(self) -> "Screen":
        self.stream: Any = sys.stdout
        self.error: OSError | None = None
        sys.stdout = self
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.flush()
        sys.stdout = self.stream
        if self.error is not None and kind is None:
            raise self.error

    def write(self, text: str) -> int:
        self._try(lambda: self.stream.write(text))
        return len(text)

    def flush(self) -> None:
        self._try(self.stream.flush)

    def _try(self, act: Callable[[], Any]) -> None:
        try:
            act()
        except OSError as error:
            self.error = self.error or error
            discard(self.stream)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


class Stopped(BaseException):
    """A signal ends the program, which exits with 128 + the signal's number. Like KeyboardInterrupt, no Exception."""

    def __init__(self, number: int, stands: str = ""):
        super().__init__(stands)
        self.status = 128 + number


class Stop:
    """Inside, Ctrl-C, SIGTERM and SIGHUP only set `stop.signal` to the signal's number (0 before).

    The program must check it after each step, so that a step is never interrupted in the middle. A second Ctrl-C
    interrupts at once, if `ready()`; after that nothing disturbs the end of the program. A signal that is ignored
    (nohup; & in a script) stays ignored.
    """

    active: ClassVar["Stop | None"] = None

    def __init__(self, ready: Callable[[], bool] = lambda: True) -> None:
        self.signal = 0
        self._ready = ready
        self._interrupted = False

    def __enter__(self) -> "Stop":
        Stop.active = self
        self._before = {number: signal.signal(number, self._asked) for number in _signals()}
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self.signal and kind is not None:
            self._interrupted = True  # the program ends: its handlers stay, and do nothing
            Stop.active = None
            return
        Stop.active = None
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if self.signal:  # it came after the last check
            signal.raise_signal(self.signal)

    def _asked(self, number: int, _: object) -> None:
        if self.signal and number == signal.SIGINT and self._ready() and not self._interrupted:
            self._interrupted = True
            raise KeyboardInterrupt
        self.signal = self.signal or number


def _signals() -> list[int]:
    """Those that end a program, Ctrl-C, SIGTERM and SIGHUP, but for those that are ignored (nohup; & in a script)."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    return [number for number in numbers if signal.getsignal(number) is not signal.SIG_IGN]


def clock(seconds: float) -> str:
    """65 -> '1:05', 3661 -> '1:01:01'."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
