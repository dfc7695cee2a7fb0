"""A comparison as Markdown, and as one self-contained HTML file without scripts.

Names of arms, tasks and folders are a stranger's text: escaped wherever they stand.
"""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qtarget.evaluation.compare import Comparison, Difference

# Told apart also by those who see no red or no green, and by the dashes below.
_COLOURS = ("#0b5fa5", "#b4420f", "#2d7d46", "#7a3fa0", "#8a6d00", "#444444")
_DASHES = ("", "6 3", "2 3", "8 3 2 3", "12 4", "1 2")
_SCORES = (
    ("strict", "avg@n"),
    ("lenient", "lenient avg@n"),
    ("majority", "maj@n"),
    ("greedy", "greedy"),
    ("no_answer", "no answer"),
    ("truncated", "cut off"),
)


def cells(difference: Difference) -> list[str]:
    """arm, measure, task, first, other, difference, interval, what may be said."""
    factor = 1 if difference.measure == "tokens" else 100
    first, other = (f"{factor * value:.1f}" for value in (difference.first, difference.other))
    value, low, high = (f"{factor * value:+.1f}" for value in (difference.value, difference.low, difference.high))
    measure = dict(_SCORES).get(difference.measure, difference.measure)
    return [
        *(difference.arm, measure, difference.task),
        *(first, other, value, f"{low} to {high}", difference.sentence()),
    ]


def heads(comparison: Comparison) -> list[str]:
    return ["arm", "score", "task", comparison.arms[0].name, "arm's", "difference", "95 %", "reading"]


def score_rows(comparison: Comparison) -> tuple[list[str], list[list[str]]]:
    """(heads, rows) of every arm's scores."""
    rows = []
    if comparison.metrics:
        for task, metric in comparison.metrics.items():
            for arm in comparison.arms:
                rows.append([task, arm.name, metric, f"{100 * comparison.scores[arm.name][task]['value']:.1f}"])
        return ["task", "arm", "score", "mean"], rows
    for task in comparison.tasks:
        for arm in comparison.arms:
            scores = comparison.scores[arm.name][task]
            numbers = ["-" if scores[key] is None else f"{100 * scores[key]:.1f}" for key, _ in _SCORES]
            entropy = "-" if scores["entropy"] is None else f"{scores['entropy']:.3f}"
            last = f"{100 * scores['pass'][-1]:.1f}" if scores["pass"] else "-"
            faults = f"{scores['timeouts']} / {scores['errors']}"
            rows.append([task, arm.name, *numbers, last, f"{scores['tokens']:.1f}", entropy, faults])
    names = ["task", "arm", *(name for _, name in _SCORES), "pass@n", "tokens", "entropy", "time-outs / errors"]
    return names, rows


def facts(comparison: Comparison) -> list[str]:
    """Sentences under the tables."""
    settings = ", ".join(f"{name} {value}" for name, value in comparison.settings.items() if value is not None)
    folders = "; ".join(f"{arm.name}: {', '.join(map(str, arm.folders))}" for arm in comparison.arms)
    return [
        *([f"Settings: {settings}."] if settings else []),
        f"Folders: {folders}.",
        "Scores in per cent; the strict reading unless another is named. Differences are paired by problem and seed; "
        "intervals are percentiles of a bootstrap of training seeds, problems and samples.",
        *comparison.notes,
    ]


def as_json(comparison: Comparison) -> str:
    """All numbers, unrounded, for other programs."""
    numbers = {
        "arms": {arm.name: [*map(str, arm.folders)] for arm in comparison.arms},
        "settings": comparison.settings,
        "n": comparison.n,
        "differences": [
            {**dataclasses.asdict(d), "difference": d.value, "reading": d.sentence()} for d in comparison.differences
        ],
        "scores": comparison.scores,
        "notes": comparison.notes,
    }
    return json.dumps(numbers, indent=2, ensure_ascii=False) + "\n"


def markdown(comparison: Comparison) -> str:
    def table(names: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
        safe = [[_cell(text) for text in row] for row in (names, *rows)]
        lines = [f"| {' | '.join(row)} |" for row in safe]
        return "\n".join([lines[0], f"|{'---|' * len(names)}", *lines[1:]])

    parts = [
        f"# Differences to {_cell(comparison.arms[0].name)}",
        table(heads(comparison), [*map(cells, comparison.differences)]),
        "## Scores",
        table(*score_rows(comparison)),
        "\n".join(f"- {_cell(fact)}" for fact in facts(comparison)),
    ]
    return "\n\n".join(parts) + "\n"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ").replace("<", "&lt;")


# -- page ----------------------------------------------------------------------------------------------------------


@dataclass
class Plot:
    """What ``compare_report.html`` draws. Places are (x, y) in pixels from the top left; arms are numbers.

    Attributes:
        rules: (class, x1, y1, x2, y2). texts: (x, y, anchor, words). bands, lines: (places, arm).
        dots: (x, y, arm, title).
    """

    label: str
    width: int
    height: int
    rules: list[tuple[str, float, float, float, float]] = field(default_factory=list)
    texts: list[tuple[float, float, str, str]] = field(default_factory=list)
    bands: list[tuple[list[tuple[float, float]], int]] = field(default_factory=list)
    lines: list[tuple[list[tuple[float, float]], int]] = field(default_factory=list)
    dots: list[tuple[float, float, int, str]] = field(default_factory=list)


def html(comparison: Comparison) -> str:
    """The page. Whatever stands in it is escaped by the template's engine."""
    from jinja2 import FileSystemLoader, StrictUndefined
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    folder = Path(__file__).parent
    style = (folder / "compare_report.css").read_text(encoding="utf-8")
    differences, measures = comparison.differences, dict.fromkeys(one.measure for one in comparison.differences)
    engine = ImmutableSandboxedEnvironment(
        loader=FileSystemLoader(folder), autoescape=True, undefined=StrictUndefined, keep_trailing_newline=True
    )
    return engine.get_template("compare_report.html").render(
        style=style,
        digest=base64.b64encode(hashlib.sha256(style.encode()).digest()).decode(),
        colours=_COLOURS,
        dashes=_DASHES,
        words=("arm", "score", "task", "reading"),
        arms=[arm.name for arm in comparison.arms],
        differences=(heads(comparison), [*map(cells, differences)]),
        scores=score_rows(comparison),
        facts=facts(comparison),
        intervals=[_intervals([one for one in differences if one.measure == measure]) for measure in measures],
        curves=[_curves(comparison, task) for task in comparison.tasks] if comparison.n else [],
    )


def _curves(comparison: Comparison, task: str) -> Plot:
    """pass@k over k of every arm, with its 95 % band over problems."""
    width, height, left, bottom, top = 340, 220, 44, 34, 8
    plot = Plot(task, width, height)
    n = comparison.n
    highest = max(0.05, *(max(comparison.scores[arm.name][task]["pass_high"]) for arm in comparison.arms))

    def place(k: int, value: float) -> tuple[float, float]:
        x = left + (width - left - 10) * ((k - 1) / (n - 1) if n > 1 else 0.5)
        return x, height - bottom - (height - bottom - top) * value / highest

    for i in range(5):
        y = place(1, highest * i / 4)[1]
        plot.rules.append(("grid", left, y, width - 10, y))
        plot.texts.append((left - 6, y + 4, "end", f"{100 * highest * i / 4:.0f}"))
    for k in sorted({1, n, *(2**i for i in range(1, n.bit_length()) if 2**i <= n)}):
        plot.texts.append((place(k, 0)[0], height - bottom + 16, "middle", str(k)))
    plot.texts.append(((left + width) / 2, height - 4, "middle", "k"))
    for number, arm in enumerate(comparison.arms):
        scores: dict[str, Any] = comparison.scores[arm.name][task]
        upper, middle, lower = (
            [place(k, value) for k, value in enumerate(scores[name], start=1)]
            for name in ("pass_high", "pass", "pass_low")
        )
        plot.bands.append(([*upper, *reversed(lower)], number))
        plot.lines.append((middle, number))
    return plot


def _intervals(differences: Sequence[Difference]) -> Plot:
    """A dot and its interval for every task and arm, of one measure; the broken line is no difference."""
    measure = differences[0].measure
    row, left, width, height = 24, 220, 520, 24 * len(differences) + 40
    factor = 1 if measure == "tokens" else 100
    reach = max(1e-3, *(max(abs(d.low), abs(d.high)) for d in differences)) * 1.08
    name = {**dict(_SCORES), "tokens": "tokens per answer"}.get(measure, measure)
    plot = Plot(f"Difference in {name}", width, height)

    def place(value: float) -> float:
        return left + (width - left - 10) * (value / reach + 1) / 2

    plot.rules.append(("zero", place(0), 6, place(0), height - 30))
    for share in (-1, -0.5, 0, 0.5, 1):
        value = share * reach / 1.08
        plot.texts.append((place(value), height - 10, "middle", f"{factor * value:+.1f}"))
    arms = list(dict.fromkeys(d.arm for d in differences))
    for number, difference in enumerate(differences):
        y, arm = 18 + row * number, arms.index(difference.arm) + 1  # the first arm has no difference
        label = f"{difference.arm}, {difference.task}"
        shown = cells(difference)
        plot.texts.append((left - 10, y + 4, "end", label if len(label) <= 34 else label[:33] + "…"))
        plot.lines.append(([(place(difference.low), y), (place(difference.high), y)], arm))
        plot.dots.append((place(difference.value), y, arm, f"{label}: {shown[5]}, {shown[6]}"))
    return plot
