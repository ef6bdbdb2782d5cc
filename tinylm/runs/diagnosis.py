"""Diagnosis of a training run from its curves: the condition, the evidence, and what to try.

`diagnose(records)` examines a finished run; `Monitor` applies the same rules while it runs. A record is one of a run's
metrics (see metrics.py): a step's (`loss`, `lr`, `grad_norm`, ...) or an evaluation's (`val_loss`). What counts as
wrong is listed in conditions.py.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, get_args

from .conditions import CONDITIONS, PASSED, Condition, Found
from .curves import Curves, Moment


@dataclass(frozen=True)
class Finding:
    """Something that is wrong with a run."""

    condition: str
    step: int  # where it was first noticed
    evidence: str
    advice: str
    level: int = 1  # 2: it ruins the run

    def __str__(self) -> str:
        return f"{self.condition} (step {self.step}): {self.evidence}. Try: {self.advice}."


def diagnose(records: Iterable[Mapping[str, Any]]) -> list[Finding]:
    """Everything wrong with a run that has not passed by its end, the most severe first. Empty for a healthy run."""
    monitor = Monitor()
    for record in records:
        monitor.update(record)
    return monitor.diagnosis()


class Monitor:
    """Watches a run. `update(record)` returns new findings: each condition once, and again if it gets worse.

    A step costs a few microseconds, however long the run; memory grows by one number every ten steps: see Curves.
    """

    def __init__(self) -> None:
        self._found: dict[str, Finding] = {}  # by condition, without those that have passed
        self._told: dict[str, int] = {}  # the level at which a condition was reported
        self._new: list[Finding] = []
        self._curves = Curves(self._found.keys())
        self._checks: dict[Moment, list[tuple[str, Condition]]] = {moment: [] for moment in get_args(Moment)}
        for name, moment, check in CONDITIONS:
            self._checks[moment].append((name, check() if isinstance(check, type) else check))

    def update(self, record: Mapping[str, Any]) -> list[Finding]:
        """Add a step's or an evaluation's record; returns the findings that are new or got worse."""
        self._new = []
        for moment in self._curves.add(record):
            for name, check in self._checks[moment]:
                news = check(self._curves)
                if news is None:
                    continue
                if news == PASSED or news.anew:
                    self._found.pop(name, None)
                if news != PASSED:
                    self._find(name, news)
        return self._new

    def diagnosis(self) -> list[Finding]:
        """The findings that have not passed, the worst first, with their latest evidence."""
        return sorted(self._found.values(), key=lambda finding: (-finding.level, finding.step))

    def _find(self, condition: str, found: Found) -> None:
        before = self._found.get(condition)
        step = before.step if before else self._curves.step
        level = max(found.level, before.level) if before else found.level
        finding = Finding(condition, step, found.evidence, found.advice, level)
        self._found[condition] = finding
        if level > self._told.get(condition, 0):
            self._told[condition] = level
            self._new.append(finding)
