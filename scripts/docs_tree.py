"""Write the tree of docs/architecture.md from the first lines of the modules' docstrings.

    python scripts/docs_tree.py [--check]

``--check`` changes nothing and exits with 1 where the page is another. A first line is one sentence that explains the
module to somebody new, of at most 90 characters; a folder's stands in its ``__init__.py``.
"""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "src" / "qtarget"
PAGE = ROOT / "docs" / "architecture.md"
BEGIN, END = "<!-- tree: written by make docs-tree -->", "<!-- end of tree -->"
LONGEST = 90
NAME = 20  # the column of names, as wide everywhere, so that a new file is one new line
# Folders from what is computed to who asks for it; one that is not here comes after these.
ORDER = ["targets", "losses", "data", "models", "teachers", "training", "lens", "signals", "evaluation", "verification"]
ORDER += ["planning", "cli", "engine", "cache", "server", "agreement"]


def first_line(path: Path) -> str:
    """The first line of a module's docstring; "" where it has none."""
    return (ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "").partition("\n")[0]


def faults() -> list[str]:
    """What is wrong with first lines."""
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        name, line = path.relative_to(ROOT), first_line(path)
        if not line:
            found.append(f"{name} has no docstring; its first line says what the module is for")
        elif len(line) > LONGEST or line[-1] not in ".?":
            found.append(f"{name} begins with {line!r}; use one sentence of at most {LONGEST} characters")
    return found


def tree(folder: Path = PACKAGE, depth: int = 1) -> list[str]:
    """A line for each module of a folder, then those of the folders in it."""
    indent = "  " * depth
    modules = [path for path in sorted(folder.glob("*.py")) if path.name != "__init__.py"]
    found = [f"{indent}{path.name:<{NAME}} {shown(path)}" for path in modules]
    for below in sorted(filter(Path.is_dir, folder.iterdir()), key=_place):
        if (below / "__init__.py").exists():
            found += [f"{indent}{below.name}/  {shown(below / '__init__.py')}", *tree(below, depth + 1)]
        elif below.name != "__pycache__" and (kinds := sorted({path.suffix[1:] for path in below.iterdir()})):
            found.append(
                f"{indent}{below.name}/  Files: {', '.join(kinds)}; a script's first line says what it is for."
            )
    return found


def shown(path: Path) -> str:
    return first_line(path).replace("``", "`")


def _place(folder: Path) -> tuple[int, str]:
    return (ORDER.index(folder.name) if folder.name in ORDER else len(ORDER), folder.name)


def section() -> str:
    """What stands between the marks."""
    return "\n".join(["", *(f"    {line}" for line in ["src/qtarget/", *tree()]), ""])


def page() -> str:
    """docs/architecture.md with the tree as it is now."""
    text = PAGE.read_text(encoding="utf-8")
    return re.sub(f"(?<={re.escape(BEGIN)}\n).*?(?={re.escape(END)})", lambda _: section() + "\n", text, flags=re.S)


def main() -> int:
    if wrong := faults():
        print(*wrong, sep="\n", file=sys.stderr)
        return 1
    now = page()
    if now == PAGE.read_text(encoding="utf-8"):
        return 0
    if "--check" in sys.argv:
        print(f"{PAGE.relative_to(ROOT)} shows another tree than src/qtarget has: make docs-tree", file=sys.stderr)
        return 1
    PAGE.write_text(now, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
