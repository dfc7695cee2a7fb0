"""The table of docs/reliability.md: cases by kind. Run from the repository's root:

PYTHONPATH=src:tests/helpers:tests/bad_inputs python tests/bad_inputs/count.py
"""

from pathlib import Path

from test_corpus import ALL, CORPUS

PAGE = Path(__file__).parents[2] / "docs" / "reliability.md"


def table() -> str:
    lines = ["| kind | cases | refused | handled | what |", "|---|---|---|---|---|"]
    for kind, cases in CORPUS.items():
        refused = sum(bool(case.says) for case in cases)
        lines.append(f"| {kind} | {len(cases)} | {refused} | {len(cases) - refused} | {about(kind)} |")
    refused = sum(bool(case.says) for _, case in ALL)
    lines.append(f"| all | {len(ALL)} | {refused} | {len(ALL) - refused} | |")
    return "\n".join(lines)


def about(kind: str) -> str:
    """The first line of the kind's file."""
    return Path(__file__).with_name(f"bad_{kind}.py").read_text(encoding="utf-8").split('"""')[1].strip().rstrip(".")


if __name__ == "__main__":
    page = PAGE.read_text(encoding="utf-8")
    begin, end = "<!-- counts: tests/bad_inputs/count.py -->\n", "<!-- end of counts -->"
    before, after = page.index(begin) + len(begin), page.index(end)
    PAGE.write_text(f"{page[:before]}{table()}\n{page[after:]}", encoding="utf-8")
