"""Where a lesson is: what it saves and reads stands beside it."""

import json
import sys
from pathlib import Path
from typing import Any


def folder() -> Path:
    """The folder of the file whose code called this package; in a notebook, which has no file, the current one."""
    frame: Any = sys._getframe(1)
    while frame.f_globals.get("__package__") == __package__:
        frame = frame.f_back
    file = frame.f_globals.get("__file__")
    return Path(file).parent if file else Path()


def recorded(name: str) -> dict[str, Any]:
    """What `record.py` wrote into recorded/NAME.json, beside the lesson. Raises FileNotFoundError elsewhere."""
    path = folder() / "recorded" / f"{name}.json"
    if not path.exists():
        raise FileNotFoundError(f"there is no {path}: work in the folder that `tinylm lessons start DIR` makes")
    return json.loads(path.read_text(encoding="utf-8"))
