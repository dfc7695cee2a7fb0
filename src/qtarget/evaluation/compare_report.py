"""A comparison as Markdown, and as one HTML file without network or script.

Names of arms, tasks and folders are a stranger's text: escaped wherever they stand.
"""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import json
from collections.abc import Sequence
from html import escape
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
    factor, digits = (1, 1) if difference.measure == "tokens" else (100, 1)

    def shown(value: float, sign: bool = False) -> str:
        return f"{factor * value:{'+' if sign else ''}.{digits}f}"

    return [
        difference.arm,
        {"strict": "avg@n", "lenient": "lenient avg@n"}.get(difference.measure, difference.measure),
        difference.task,
        shown(difference.first),
        shown(difference.other),
        shown(difference.value, sign=True),
        f"{shown(difference.low, sign=True)} to {shown(difference.high, sign=True)}",
        difference.sentence(),
    ]


def heads(comparison: Comparison) -> list[str]:
    return ["arm", "score", "task", comparison.arms[0].name, "arm's", "difference", "95 %", "reading"]


def score_rows(comparison: Comparison) -> tuple[list[str], list[list[str]]]:
    """(heads, rows) of every arm's scores."""
    rows = []
    for task in comparison.tasks:
        for arm in comparison.arms:
            found = comparison.scores[arm.name][task]
            numbers = ["-" if found[key] is None else f"{100 * found[key]:.1f}" for key, _ in _SCORES]
            entropy = "-" if found["entropy"] is None else f"{found['entropy']:.3f}"
            last = f"{100 * found['pass'][-1]:.1f}" if found["pass"] else "-"
            faults = f"{found['timeouts']} / {found['errors']}"
            rows.append([task, arm.name, *numbers, last, f"{found['tokens']:.1f}", entropy, faults])
    names = ["task", "arm", *(name for _, name in _SCORES), "pass@n", "tokens", "entropy", "time-outs / errors"]
    return names, rows


def facts(comparison: Comparison) -> list[str]:
    """Sentences under the tables."""
    settings = ", ".join(f"{name} {value}" for name, value in comparison.settings.items() if value is not None)
    folders = "; ".join(f"{arm.name}: {', '.join(map(str, arm.folders))}" for arm in comparison.arms)
    return [
        f"Settings: {settings}.",
        f"Folders: {folders}.",
        "Scores in per cent; the strict reading where none is named. Differences are paired by problem and seed; "
        "intervals are percentiles of a bootstrap of training seeds, problems and samples.",
        *comparison.notes,
    ]


def as_json(comparison: Comparison) -> str:
    """All numbers, unrounded, for other programs."""
    made = {
        "arms": {arm.name: [*map(str, arm.folders)] for arm in comparison.arms},
        "settings": comparison.settings,
        "n": comparison.n,
        "differences": [
            {**dataclasses.asdict(d), "difference": d.value, "reading": d.sentence()} for d in comparison.differences
        ],
        "scores": comparison.scores,
        "notes": comparison.notes,
    }
    return json.dumps(made, indent=2, ensure_ascii=False) + "\n"


def markdown(comparison: Comparison) -> str:
    def table(names: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
        safe = [[_cell(text) for text in row] for row in (names, *rows)]
        lines = [f"| {' | '.join(row)} |" for row in safe]
        return "\n".join([lines[0], f"|{'---|' * len(names)}", *lines[1:]])

    parts = [
        f"# Differences to {_cell(comparison.arms[0].name)}",
        table(heads(comparison), [cells(difference) for difference in comparison.differences]),
        "## Scores",
        table(*score_rows(comparison)),
        "\n".join(f"- {_cell(fact)}" for fact in facts(comparison)),
    ]
    return "\n\n".join(parts) + "\n"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ").replace("<", "&lt;")


# -- page ----------------------------------------------------------------------------------------------------------

_STYLE = """
:root { color-scheme: light dark; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 68rem; margin: 2rem auto; padding: 0 1rem;
  color: #1b1b1b; background: #fff; }
table { border-collapse: collapse; margin: 1rem 0; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .7rem; text-align: right; border-bottom: 1px solid #d5d5d5; white-space: nowrap; }
th:first-child, td:first-child, td.word, th.word { text-align: left; }
.wide { overflow-x: auto; }
.plots { display: flex; flex-wrap: wrap; gap: 1.5rem; }
figure { margin: 0; } figcaption { font-weight: 600; }
svg text { font: 12px system-ui, sans-serif; fill: #1b1b1b; }
svg .axis { stroke: #777; } svg .zero { stroke: #777; stroke-dasharray: 3 3; } svg .grid { stroke: #e3e3e3; }
@media (prefers-color-scheme: dark) {
  body { color: #e8e8e8; background: #16181b; } svg text { fill: #e8e8e8; }
  th, td { border-color: #3a3d42; } svg .grid { stroke: #2b2e33; }
  svg .mark { filter: brightness(1.7); } .key { filter: brightness(1.7); }
}
"""


def html(comparison: Comparison) -> str:
    digest = base64.b64encode(hashlib.sha256(_STYLE.encode()).digest()).decode()
    first = escape(comparison.arms[0].name)
    curves = "".join(_curves(comparison, task) for task in comparison.tasks) if comparison.n else ""
    kinds = list(dict.fromkeys(difference.measure for difference in comparison.differences))
    intervals = "".join(_intervals([d for d in comparison.differences if d.measure == kind], kind) for kind in kinds)
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">\n'
        f"<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'sha256-{digest}'\">\n"
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>Differences to {first}</title><style>{_STYLE}</style></head><body>\n"
        f"<h1>Differences to {first}</h1>\n"
        + _table(heads(comparison), [cells(difference) for difference in comparison.differences])
        + f'<div class="plots">{intervals}</div>\n'
        + (f'<h2>pass@k, strict</h2>\n{_key(comparison)}<div class="plots">{curves}</div>\n' if curves else "")
        + "<h2>Scores</h2>\n"
        + _table(*score_rows(comparison))
        + "".join(f"<p>{escape(fact)}</p>\n" for fact in facts(comparison))
        + "</body></html>\n"
    )


def _table(names: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    words = {"arm", "score", "task", "reading"}

    def line(cells: Sequence[str], tag: str) -> str:
        scope = ' scope="col"' if tag == "th" else ""
        kinds = ['class="word"' if name in words else "" for name in names]
        inner = "".join(f"<{tag}{scope} {kind}>{escape(cell)}</{tag}>" for cell, kind in zip(cells, kinds, strict=True))
        return f"<tr>{inner}</tr>"

    body = "\n".join(line(row, "td") for row in rows)
    table = f"<table><thead>{line(names, 'th')}</thead><tbody>\n{body}\n</tbody></table>"
    return f'<div class="wide" tabindex="0">{table}</div>\n'


def _key(comparison: Comparison) -> str:
    items = "".join(
        f'<span class="key"><svg width="34" height="12" aria-hidden="true">{_line([(2, 6), (32, 6)], i)}</svg></span> '
        f"{escape(arm.name)} &nbsp; "
        for i, arm in enumerate(comparison.arms)
    )
    return f"<p>{items}</p>\n"


def _line(points: Sequence[tuple[float, float]], number: int) -> str:
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    dash = _DASHES[number % len(_DASHES)]
    return (
        f'<polyline class="mark" points="{path}" fill="none" stroke="{_COLOURS[number % len(_COLOURS)]}" '
        f'stroke-width="2"{f" stroke-dasharray={chr(34)}{dash}{chr(34)}" if dash else ""}/>'
    )


def _svg(width: int, height: int, label: str, body: str) -> str:
    return (
        f'<figure><figcaption>{escape(label)}</figcaption><svg role="img" aria-label="{escape(label, quote=True)}" '
        f'width="{width}" height="{height}" viewBox="0 0 {width} {height}">{body}</svg></figure>\n'
    )


def _curves(comparison: Comparison, task: str) -> str:
    """pass@k over k of every arm, with its 95 % band over problems."""
    width, height, left, bottom, top = 340, 220, 44, 34, 8
    n = comparison.n
    highest = max(0.05, *(max(comparison.scores[arm.name][task]["pass_high"]) for arm in comparison.arms))

    def place(k: int, value: float) -> tuple[float, float]:
        x = left + (width - left - 10) * ((k - 1) / (n - 1) if n > 1 else 0.5)
        return x, height - bottom - (height - bottom - top) * value / highest

    body = _grid(left, width - 10, [(place(1, highest * i / 4)[1], f"{100 * highest * i / 4:.0f}") for i in range(5)])
    for k in sorted({1, n, *(2**i for i in range(1, n.bit_length()) if 2**i <= n)}):
        body += f'<text x="{place(k, 0)[0]:.1f}" y="{height - bottom + 16}" text-anchor="middle">{k}</text>'
    body += f'<text x="{(left + width) / 2:.0f}" y="{height - 4}" text-anchor="middle">k</text>'
    for number, arm in enumerate(comparison.arms):
        found: dict[str, Any] = comparison.scores[arm.name][task]
        ks = range(1, n + 1)
        upper = [place(k, found["pass_high"][k - 1]) for k in ks]
        lower = [place(k, found["pass_low"][k - 1]) for k in reversed(ks)]
        area = " ".join(f"{x:.1f},{y:.1f}" for x, y in upper + lower)
        body += f'<polygon class="mark" points="{area}" fill="{_COLOURS[number % len(_COLOURS)]}" opacity="0.13"/>'
        body += _line([place(k, found["pass"][k - 1]) for k in ks], number)
    return _svg(width, height, task, body)


def _grid(x1: float, x2: float, lines: Sequence[tuple[float, str]]) -> str:
    return "".join(
        f'<line class="grid" x1="{x1}" x2="{x2}" y1="{y:.1f}" y2="{y:.1f}"/>'
        f'<text x="{x1 - 6}" y="{y + 4:.1f}" text-anchor="end">{escape(label)}</text>'
        for y, label in lines
    )


def _intervals(differences: Sequence[Difference], measure: str) -> str:
    """A dot and its interval for every task and arm; the broken line is no difference."""
    row, left, width = 24, 220, 520
    factor = 1 if measure == "tokens" else 100
    reach = factor * max(1e-3, *(max(abs(d.low), abs(d.high)) for d in differences)) * 1.08
    height = row * len(differences) + 40

    def place(value: float) -> float:
        return left + (width - left - 10) * (factor * value / reach + 1) / 2

    body = f'<line class="zero" x1="{place(0):.1f}" x2="{place(0):.1f}" y1="6" y2="{height - 30}"/>'
    for share in (-1, -0.5, 0, 0.5, 1):
        value = share * reach / 1.08
        body += f'<text x="{place(value / factor):.1f}" y="{height - 10}" text-anchor="middle">{value:+.1f}</text>'
    arms = list(dict.fromkeys(d.arm for d in differences))
    for number, difference in enumerate(differences):
        y = 18 + row * number
        label = f"{difference.arm}, {difference.task}"
        short = label if len(label) <= 34 else label[:33] + "…"
        arm = arms.index(difference.arm) + 1
        body += f'<text x="{left - 10}" y="{y + 4}" text-anchor="end">{escape(short)}</text>'
        body += _line([(place(difference.low), y), (place(difference.high), y)], arm)
        body += (
            f'<circle class="mark" cx="{place(difference.value):.1f}" cy="{y}" r="4" '
            f'fill="{_COLOURS[arm % len(_COLOURS)]}"><title>{escape(label)}: {escape(cells(difference)[5])}, '
            f"{escape(cells(difference)[6])}</title></circle>"
        )
    name = {"strict": "avg@n", "lenient": "lenient avg@n", "tokens": "tokens an answer"}.get(measure, measure)
    return _svg(width, height, f"Difference in {name}", body)
