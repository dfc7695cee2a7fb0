"""The pages' pictures, as SVG inside the page: no file, no script, and the same bytes each time.

Text and axes take the page's own colour, so that they can be read in the light and in the dark.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

import worked_tokens

_BLUE = "#4a7fd0"
_FONT = 'font-size="12" fill="currentColor"'


def figure(pictures: Sequence[str], caption: str) -> str:
    """Pictures beside each other where there is room, and what they show. One block of HTML: no empty line in it."""
    lines = ['<figure class="qt-figure">', '<div class="qt-pictures">', *pictures, "</div>"]
    return "\n".join([*lines, f"<figcaption>{escape(caption, quote=False)}</figcaption>", "</figure>"])


def bars(title: str, rows: Sequence[tuple[str, float, float]], label: str) -> str:
    """p, pale, and Q, blue, of one token's words; a bar of a negative Q goes to the left."""
    values = [value for _, p, Q in rows for value in (p, Q)]
    low, high = min(0.0, *values), max(1.0, *values)
    left, right, top, step = 78, 238, 34, 30

    def x(value: float) -> float:
        return left + (value - low) / (high - low) * (right - left)

    said = "; ".join(f"{word} {_number(p)} to {_number(Q)}" for word, p, Q in rows)
    drawn = [f'<text x="0" y="14" {_FONT} font-weight="bold">{escape(title)}</text>']
    for place, (word, p, Q) in enumerate(rows):
        y = top + place * step
        weight = ' font-weight="bold"' if word == label else ""
        drawn += [
            f'<text x="{left - 8}" y="{y + 14}" text-anchor="end" {_FONT}{weight}>{escape(word)}</text>',
            f'<rect {_between(x(0), x(p))} y="{y}" height="9" fill="currentColor" opacity="0.35"/>',
            f'<rect {_between(x(0), x(Q))} y="{y + 10}" height="9" fill="{_BLUE}"/>',
            f'<text x="{right + 8}" y="{y + 14}" {_FONT}>{_number(p)} → {_number(Q)}</text>',
        ]
    bottom = top + len(rows) * step
    drawn.append(f'<path d="M{_px(x(0))} {top - 4}V{bottom - 6}" stroke="currentColor"/>')
    return _svg(340, bottom, f"{title}. The label is {label}. From p to Q: {said}.", drawn)


def worked(target) -> list[str]:
    """A picture for each of the worked tokens."""
    return [
        bars(token.title, rows, token.words[token.label])
        for token, rows in zip(worked_tokens.TOKENS, worked_tokens.taught(target), strict=True)
    ]


def curve(
    points: Sequence[tuple[float, float]], across: str, upward: str, title: str, ends: tuple[float, float], top_y: float
) -> str:
    """A line through (x, y), with the ends of both axes named.

    Args:
        ends: of the axis across. top_y: what the axis upward reaches at the least.
    """
    ys = [y for _, y in points]
    low, high = min(0.0, *ys), max(top_y, *ys)
    left, right, top, bottom = 52, 330, 30, 180

    def place(x: float, y: float) -> str:
        across_px = left + (x - ends[0]) / (ends[1] - ends[0]) * (right - left)
        return f"{_px(across_px)},{_px(bottom - (y - low) / (high - low) * (bottom - top))}"

    zero = place(ends[0], 0).partition(",")[2]
    drawn = [
        f'<text x="0" y="14" {_FONT} font-weight="bold">{escape(upward)}</text>',
        f'<path d="M{left} {top}V{bottom}M{left} {zero}H{right}" stroke="currentColor" fill="none"/>',
        f'<text x="{left - 6}" y="{top + 4}" text-anchor="end" {_FONT}>{_short(high)}</text>',
        f'<text x="{left - 6}" y="{bottom + 4}" text-anchor="end" {_FONT}>{_short(low)}</text>',
        f'<text x="{left}" y="{bottom + 20}" {_FONT}>{_short(ends[0])}</text>',
        f'<text x="{(left + right) // 2}" y="{bottom + 20}" text-anchor="middle" {_FONT}>{escape(across)}</text>',
        f'<text x="{right}" y="{bottom + 20}" text-anchor="end" {_FONT}>{_short(ends[1])}</text>',
        f'<polyline points="{" ".join(place(x, y) for x, y in points)}" fill="none" stroke="{_BLUE}" '
        'stroke-width="2.5"/>',
    ]
    return _svg(340, bottom + 26, title, drawn)


def _svg(width: int, height: int, title: str, drawn: Sequence[str]) -> str:
    opening = f'<svg viewBox="0 0 {width} {height}" width="{width}" role="img" aria-label="{escape(title)}">'
    return "\n".join([opening, *drawn, "</svg>"])


def _between(a: float, b: float) -> str:
    return f'x="{_px(min(a, b))}" width="{_px(abs(b - a))}"'


def _px(value: float) -> str:
    """A tenth of a pixel is as fine as is seen, and coarse enough to be the same on every machine."""
    return f"{value:.1f}"


def _number(value: float) -> str:
    return f"{round(value, 2) + 0.0:.2f}"  # + 0.0: no minus before a zero


def _short(value: float) -> str:
    return f"{value:.3g}" if math.isfinite(value) else str(value)
