"""Predictions: a guess before a result is known, kept in a file beside the lessons."""

import fcntl
import json
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from ..files import write_whole
from .place import folder
from .values import describe, number

FILE = "predictions.json"


class Prediction:
    """A guess. When the result is there, `measured` compares the two."""

    def __init__(self, name: str, what: str, guess: float | None, path: Path):
        self.name, self.what, self.guess, self.path = name, what, guess, path

    def measured(self, value: float, digits: int = 3) -> None:
        """Print the result beside the guess, and write both down. Raises TypeError for what is not a number."""
        known = number(value)
        if known is None:
            raise TypeError(f"prediction {self.name} is measured by a number, not by {describe(value)}")
        value = known
        if self.guess is None:
            told = "you made no prediction"
        elif not value or not math.isfinite(value) or value.is_integer() or math.isclose(self.guess, value):
            told = f"you predicted {self.guess:.{digits}g}"  # of a count, a percentage says nothing
        else:
            off = abs(self.guess - value) / abs(value)
            told = f"you predicted {self.guess:.{digits}g}, {f'{off:.0%} off' if off < 10 else 'far off'}"
        print(f"prediction {self.name}: {self.what}: {value:.{digits}g}; {told}")
        self.record(measured=value)

    def record(self, **more: Any) -> None:
        """Write the guess down, and what is known by now. A file that cannot be written or read is left as it is."""
        entry = {"what": self.what, "predicted": self.guess, **more}
        # JSON has no nan and no inf: a diverged loss is written as the text "nan".
        entry = {key: str(x) if isinstance(x, float) and not math.isfinite(x) else x for key, x in entry.items()}
        try:
            with locked(self.path.parent):
                known = {**read(self.path), self.name: entry}
                write_whole(self.path, json.dumps(dict(sorted(known.items())), indent=1) + "\n")
        except (OSError, ValueError) as error:
            print(f"prediction {self.name} is not written down: {error}")


@contextmanager
def locked(place: Path) -> Iterator[None]:
    """Inside, no other process is: of two lessons that run at once, each keeps what the other wrote."""
    descriptor = os.open(place, os.O_RDONLY)
    try:
        with suppress(OSError):  # a file system without locks
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)  # and so unlocks


def read(path: Path) -> dict[str, dict[str, Any]]:
    """{name: {"what": ..., "predicted": ..., "measured": ...}}; empty without a file. ValueError for another file."""
    try:
        known = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (ValueError, RecursionError):
        known = None
    if not isinstance(known, dict) or not all(isinstance(entry, dict) for entry in known.values()):
        raise ValueError(f"{path} is not a file of predictions; move it away")
    return known


def predictions() -> dict[str, dict[str, Any]]:
    """All that are kept beside the lesson that calls this, as `read` returns them."""
    return read(folder() / FILE)


def predict(name: str, guess: float | None, what: str) -> Prediction:
    """Predict a number before it is computed; None for no prediction. `what` says what is predicted, with its unit.

        guess = predict("06.1", None, "loss after 60 steps, nats a token")
        ...
        guess.measured(loss)

    The lesson goes on whatever the guess. Both numbers are kept in `predictions.json` beside the file that calls this,
    or in the current folder in a notebook. Raises TypeError for a guess that is not a number.
    """
    value = None if guess is None or guess is Ellipsis else number(guess)
    if value is None and guess is not None and guess is not Ellipsis:
        raise TypeError(f'predict("{name}", ...) takes a number or None, not {describe(guess)}')
    prediction = Prediction(name, what, value, folder() / FILE)
    if value is not None:
        prediction.record()
    return prediction
