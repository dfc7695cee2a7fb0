"""Whether every link of the built site leads somewhere on it, and whether it fetches anything from elsewhere.

python docs/site/links.py build/site
"""

from __future__ import annotations

import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

# What a browser fetches by itself; another site is only ever linked to.
_FETCHED = {("script", "src"), ("img", "src"), ("iframe", "src"), ("source", "src")}
_FETCHING_LINKS = {"stylesheet", "icon", "preload", "preconnect", "manifest"}


class Page(HTMLParser):
    """ids: what can be linked to. links: (where to, whether it is fetched)."""

    def __init__(self, text: str):
        super().__init__()
        self.ids: set[str] = set()
        self.links: list[tuple[str, bool]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        self.ids |= {given[name] for name in ("id", "name") if name in given}
        for name in ("href", "src"):
            if name in given:
                is_fetched = (tag, name) in _FETCHED or (tag == "link" and given.get("rel") in _FETCHING_LINKS)
                self.links.append((given[name], is_fetched))


def faults(site: Path) -> list[str]:
    """A sentence for each link that leads nowhere, and for each file that is fetched from another site."""
    pages = {path.resolve(): Page(path.read_text(encoding="utf-8")) for path in sorted(site.rglob("*.html"))}
    found = []
    for path, page in pages.items():
        # The page for missing addresses is shown under any address, so that its links start at the root of a server.
        for link, is_fetched in page.links if path.name != "404.html" else []:
            parts, where = urlsplit(link), f"{path.relative_to(site.resolve())}: {link}"
            if parts.scheme or parts.netloc:
                found += [f"{where} is fetched from elsewhere"] if is_fetched and parts.scheme != "data" else []
                continue
            to = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            to = to / "index.html" if to.is_dir() else to
            if not to.exists():
                found.append(f"{where} leads nowhere")
            elif parts.fragment and to in pages and unquote(parts.fragment) not in {*pages[to].ids, "__top"}:
                found.append(f"{where} names a heading that is not there")
    return found


if __name__ == "__main__":
    wrong = faults(Path(sys.argv[1]))
    print(*wrong, sep="\n")
    sys.exit(bool(wrong))
