"""The site as it is built: every link leads somewhere, nothing is fetched from elsewhere, pages are fit for a phone.

``make docs`` builds it and runs these; without ``QTARGET_SITE`` they build it themselves.
"""

from __future__ import annotations

import functools
import http.server
import os
import subprocess
import threading
from pathlib import Path

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import sync_playwright

import links
import references
from lens_pages import FLAGS, chromium

ROOT = Path(__file__).parents[2]
PHONE = {"width": 390, "height": 844}

pytestmark = pytest.mark.full


@pytest.fixture(scope="module")
def site() -> Path:
    if named := os.environ.get("QTARGET_SITE"):
        return ROOT / named
    subprocess.run(["sh", "scripts/docs_site.sh"], cwd=ROOT, check=True)
    return ROOT / "build" / "site"


@pytest.fixture(scope="module")
def served(site):
    """The address of a server of the site: from a file a browser lets no script read the others, search among them."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_) -> None: ...

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=site))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def browser():
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=chromium(), args=FLAGS.split())
        yield started
        started.close()


def test_every_link_leads_somewhere_and_nothing_is_fetched_from_elsewhere(site):
    assert links.faults(site) == []


def test_a_broken_link_is_noticed(tmp_path):
    (tmp_path / "index.html").write_text(
        '<p id="here"><a href="#here">a</a><a href="#gone">b</a><a href="gone.html">c</a><a href="https://a.org">d</a>'
        '<script src="https://a.org/b.js"></script></p>'
    )
    assert links.faults(tmp_path) == [
        "index.html: #gone names a heading that is not there",
        "index.html: gone.html leads nowhere",
        "index.html: https://a.org/b.js is fetched from elsewhere",
    ]


def test_the_reference_has_every_name_and_its_examples_are_code(site):
    import qtarget as qt

    pages = {page.stem: page.read_text(encoding="utf-8") for page in (site / "reference").glob("*.html")}
    whole = "".join(pages.values())
    for identifier in references.identifiers():
        assert f'id="{identifier}' in whole, identifier  # or of a name in it, where a module has no heading
    assert "<blockquote>" not in whole and "doctest:" not in whole
    assert "<code>head_bias</code>" in pages["losses"]  # an entry of its own, though it shares a line in the docstring
    assert {name for name in qt.__all__ if f"<code>{name}</code>" not in pages["index"]} == set()


@pytest.mark.browser
@pytest.mark.parametrize("colours", ["light", "dark"])
@pytest.mark.parametrize("page", ["objectives/target-sft.html", "how-to/reading-the-log.html"])
def test_a_page_on_a_phone(page, colours, served, browser):
    context = browser.new_context(viewport=PHONE, color_scheme=colours)
    view = context.new_page()
    said, asked = [], []
    view.on("console", lambda message: said.append(f"{message.type}: {message.text}"))
    view.on("pageerror", lambda error: said.append(f"error: {error}"))
    view.on("request", lambda request: asked.append(request.url))
    view.goto(f"{served}/{page}")
    view.wait_for_load_state("networkidle")
    scheme = view.evaluate("document.body.dataset.mdColorScheme")
    wide = view.evaluate("document.documentElement.scrollWidth")
    found = Axe().run(view)
    context.close()
    assert said == []
    assert [url for url in asked if not url.startswith((served, "data:", "blob:"))] == []
    assert scheme == {"light": "default", "dark": "slate"}[colours]
    assert wide <= PHONE["width"]
    assert found.response["violations"] == [], found.generate_report()
