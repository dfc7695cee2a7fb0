"""The README's badges, docs/assets/badges/*.svg: each says what a file of the repository says.

    python scripts/badges.py

The licence is pyproject.toml's; Pythons and versions of TRL are those that benchmarks/results/versions.json was run with.
"""

from __future__ import annotations

import json
import tomllib

from lock import ROOT

FOLDER = ROOT / "docs" / "assets" / "badges"
RESULTS = ROOT / "benchmarks" / "results" / "versions.json"
BADGE = """<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="20" role="img" aria-label="{label}: {value}">
<title>{label}: {value}</title>
<clipPath id="round"><rect width="{width}" height="20" rx="3"/></clipPath>
<g clip-path="url(#round)"><rect width="{left}" height="20" fill="#444"/>
<rect x="{left}" width="{right}" height="20" fill="#0b6e4f"/></g>
<g fill="#fff" font-family="Verdana, DejaVu Sans, sans-serif" font-size="11" text-anchor="middle">
<text x="{label_x}" y="14" textLength="{label_length}">{label}</text>
<text x="{value_x}" y="14" textLength="{value_length}">{value}</text></g>
</svg>
"""
NARROW, LETTER, MARGIN = 4, 7, 8  # pixels


def pythons() -> list[str]:
    """The Pythons of the runs on record that failed nothing, as ``3.11``."""
    runs = json.loads(RESULTS.read_text(encoding="utf-8")).values()
    found = {tuple(map(int, run["python"].split(".")[:2])) for run in runs if not run["failed"]}
    return [f"{major}.{minor}" for major, minor in sorted(found)]


def trl() -> list[str]:
    """Likewise the versions of TRL, as ``1.16``."""
    runs = json.loads(RESULTS.read_text(encoding="utf-8")).values()
    found = {tuple(map(int, run["versions"]["trl"].split(".")[:2])) for run in runs if not run["failed"]}
    return [f"{major}.{minor}" for major, minor in sorted(found)]


def badges() -> dict[str, str]:
    """File name → SVG."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    said = {
        "license": ("licence", project["license"]),
        "python": ("Python", " | ".join(pythons())),
        "trl": ("TRL", " | ".join(trl())),
    }
    return {f"{name}.svg": badge(label, value) for name, (label, value) in said.items()}


def badge(label: str, value: str) -> str:
    lengths = [sum(NARROW if letter in " .|-il" else LETTER for letter in text) for text in (label, value)]
    left, right = (length + 2 * MARGIN for length in lengths)
    return BADGE.format(
        label=label,
        value=value,
        left=left,
        right=right,
        width=left + right,
        label_x=left / 2,
        value_x=left + right / 2,
        label_length=lengths[0],
        value_length=lengths[1],
    )


def main() -> None:
    FOLDER.mkdir(parents=True, exist_ok=True)
    for name, text in badges().items():
        (FOLDER / name).write_text(text, encoding="utf-8")
        print(FOLDER.relative_to(ROOT) / name)


if __name__ == "__main__":
    main()
