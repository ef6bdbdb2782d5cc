"""The chapter of the book on silent bugs, made from their catalogue: the wrong lines, the curves, the probe."""

import json
import statistics
from pathlib import Path

import matplotlib.pyplot as plt

from tinylm.coursework import bugs, clinic

RECORD = Path(__file__).parent.parent / "lessons" / "recorded" / f"{clinic.RECORD}.json"

HEAD = """# A field guide to the bugs

Each of these {count} bugs was put, alone, into the same training run: a GPT of 27,000 parameters that learns a
language of 8 symbols in 600 steps. No run crashes. The curves were recorded by `lessons/record.py`; the grey ones are
those of the run without a bug. The probe was run on the model before its first step, and says what is printed here. All
runs are in `tinylm.coursework.bugs`.

:::{{warning}}
Lesson 14 lets you find twelve of them by yourself. If you want that, do it before you read on.
:::

The loss is that on fresh text at the end, in nats a token; the run without a bug has {sound:.2f}, guessing is ln V =
2.08, and the entropy is H = {entropy:.2f}. The gradient is its median norm, over that of the run without a bug.
Differences of 0.1 in the loss are no larger than those between seeds.

| | bug | loss | gradient | found by |
|---|---|---|---|---|
{rows}
"""

ENTRY = """({target})=
## {number}. {title}

![The losses, the gradient norm and the learning rate of this run](field_guide/{target}.png)

{run.tells}

The wrong lines:

```python
{wrong}
```

In the place of:

```python
{right}
```

The probe `tinylm.probe.{run.probe}`:

```text
{found}
```
"""


def chapter(pages: Path) -> str:
    """The chapter's Markdown; its pictures are saved in the folder field_guide of `pages`."""
    logs = json.loads(RECORD.read_text(encoding="utf-8"))["runs"]
    sound = logs[""]
    (pages / "field_guide").mkdir()
    rows, entries = [], []
    for number, name in enumerate(bugs.BUGS, 1):
        run, log, target = bugs.find(name), logs[name], f"bug-{number:02}"
        figure = clinic.dashboard(log, sound, "")
        figure.savefig(pages / "field_guide" / f"{target}.png", dpi=90)
        plt.close(figure)
        ratio = statistics.median(log["norm"]) / statistics.median(sound["norm"])
        gradient = f"{ratio:,.0f}" if ratio > 100 else f"{ratio:.2g}"
        link = f"#{target}"
        rows.append(f"| {number} | [{name}]({link}) | {log['fresh'][-1]:.2f} | × {gradient} | `probe.{run.probe}` |")
        ((right, wrong),) = bugs.changes(type(run))
        entries.append(
            ENTRY.format(
                target=target,
                number=number,
                title=name[0].upper() + name[1:],
                run=run,
                wrong=wrong,
                right=right,
                found=run.probed(run.probe),
            )
        )
    head = HEAD.format(count=len(rows), sound=sound["fresh"][-1], entropy=bugs.LANGUAGE.entropy, rows="\n".join(rows))
    return "\n".join([head, *entries])
