"""Writes the table of settings in docs/training.md from the docstring of QTargetConfig: ``make docs-settings``."""

from pathlib import Path

from qtarget.cli import fields

PAGE = Path(__file__).parent.parent / "docs" / "training.md"
BEGIN, END = "<!-- settings: written by make docs-settings -->", "<!-- end of settings -->"


def table() -> str:
    lines = ["| setting | default | what it does |", "|---|---|---|"]
    for name, default, text in fields.own():
        described = text.replace("``", "`").replace("|", "\\|")
        lines.append(f"| `{name}` | {'-' if default is None else default} | {described} |")
    return "\n".join(lines)


def written(page: str) -> str:
    """The page with the table as it is now."""
    before, rest = page.split(BEGIN)
    return f"{before}{BEGIN}\n{table()}\n{END}{rest.split(END)[1]}"


if __name__ == "__main__":
    PAGE.write_text(written(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
