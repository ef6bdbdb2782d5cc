"""The catalogue: one file for each lesson or assignment, with its questions in order."""

from pathlib import Path

MODULES = sorted(path.stem for path in Path(__file__).parent.glob("*.py") if path.stem != "__init__")
PARTS = [name.removeprefix("lesson") for name in MODULES]
