"""Puts the site's pages together in build/site-pages: those of docs/, and those made of presets and notebook.

    python docs/site/stage.py [FOLDER]

Only this step needs torch and qtarget. What it leaves is Markdown, which MkDocs turns into pages in an environment of its
own. Files of the repository that a page links to come along, so that a link works on the site as it does there.
"""

from __future__ import annotations

import functools
import json
import os
import re
import shutil
import sys
from pathlib import Path

import divergence_pages
import notebook_page
import objective_pages
import references

ROOT = Path(__file__).resolve().parent.parent.parent
DOCS = ROOT / "docs"
# Pages that do not stand in docs/, and where on the site they are.
BESIDE = {
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "examples/first_look.ipynb": "first-look.md",
}
TABLE = "<!-- table: written when the site is built -->"
_LINK = re.compile(r"(!?)\[([^\]]*)\]\((?!https?:|#)([^)#\s]+)(#[^)]*)?\)")


def stage(folder: Path) -> None:
    """Write everything anew. Raises SystemExit with the public names that the reference lacks."""
    if wrong := references.faults():
        raise SystemExit("\n".join(wrong))
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    made = {
        "objectives": (objective_pages.pages(), objective_pages.table()),
        "divergences": (divergence_pages.pages(), divergence_pages.table()),
    }
    for name, (pages, table) in made.items():
        index = (DOCS / name / "index.md").read_text(encoding="utf-8").replace(TABLE, table)
        for page, text in {"index": index, **pages}.items():
            _write(folder / name / f"{page}.md", text)
    for page in sorted(DOCS.rglob("*.md")):
        place = page.relative_to(DOCS)
        if place.parts[0] not in made:
            _write(folder / place, moved(page, place, folder))
    for name, place in BESIDE.items():
        _write(folder / place, moved(ROOT / name, Path(place), folder))
    shutil.copytree(DOCS / "assets", folder / "assets", dirs_exist_ok=True)
    shutil.copytree(DOCS / "site" / "assets", folder / "assets", dirs_exist_ok=True)
    _write(
        folder / "navigation.json",
        json.dumps({"objectives": objective_pages.navigation(), "divergences": divergence_pages.navigation()}),
    )


def moved(page: Path, place: Path, folder: Path) -> str:
    """A page as it reads at ``place`` of the site; the files that it links to are copied there."""
    linked = functools.partial(_linked, page=page, place=place, folder=folder)
    text = page.read_text(encoding="utf-8")
    return notebook_page.markdown(text, linked) if page.suffix == ".ipynb" else linked(text)


def _linked(text: str, page: Path, place: Path, folder: Path) -> str:
    def link(found: re.Match) -> str:
        image, words, to, anchor = found[1], found[2], found[3], found[4] or ""
        file = (page.parent / to).resolve()
        if file.is_dir():
            return words  # a folder has no page
        at = _bring(file, folder)
        return f"{image}[{words}]({os.path.relpath(at, place.parent)}{anchor})"

    linked = _LINK.sub(link, text)
    # Two matrices beside each other are no link by its name; code, which is indented, stays as it is.
    return re.sub(r"^(?! {4}).*$", lambda line: line[0].replace("] [", r"] \["), linked, flags=re.M)


def _bring(file: Path, folder: Path) -> Path:
    """Where a linked file is on the site; one that is no page of it is copied there."""
    inside = file.relative_to(ROOT)
    if inside.as_posix() in BESIDE:
        return Path(BESIDE[inside.as_posix()])
    at = inside.relative_to("docs") if inside.parts[0] == "docs" else Path("files") / inside
    if at.suffix == ".md":
        if at.parts[0] == "files" and not (folder / at).exists():
            _write(folder / at, "")  # a page that links to itself ends here
            _write(folder / at, moved(file, at, folder))
    elif not (folder / at).exists():
        (folder / at).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, folder / at)
    return at


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    stage(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "build" / "site-pages")
