"""The built site on a phone: a server for it, and pictures of a page in light and dark for CONTRIBUTING.md.

    make docs && python docs/site/phone.py

The pictures go to docs/assets/site_phone_light.png and site_phone_dark.png.
"""

from __future__ import annotations

import contextlib
import functools
import http.server
import os
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
PHONE = {"width": 390, "height": 844}
SCHEMES = {"light": "default", "dark": "slate"}  # what a reader's system asks for → the theme's name for it
PAGE = "objectives/target-sft.html"


@contextlib.contextmanager
def served(site: Path) -> Iterator[str]:
    """The address of a server of the site; opened as files, its search could not read its own index."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None: ...

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=site))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


def main() -> None:
    from playwright.sync_api import sync_playwright

    with served(ROOT / "build" / "site") as address, sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=shutil.which(os.environ.get("CHROMIUM", "chromium")), args=["--no-sandbox"]
        )
        for colours in SCHEMES:
            view = browser.new_context(viewport=PHONE, color_scheme=colours).new_page()
            view.goto(f"{address}/{PAGE}")
            view.wait_for_load_state("networkidle")
            view.screenshot(path=ROOT / "docs" / "assets" / f"site_phone_{colours}.png")
        browser.close()


if __name__ == "__main__":
    main()
