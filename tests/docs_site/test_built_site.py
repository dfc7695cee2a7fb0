"""The site as it is built: every link leads somewhere, nothing is fetched from elsewhere, pages are fit for a phone.

``make docs`` builds it and runs these; without ``QTARGET_SITE`` they build it themselves.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import sync_playwright

import links
import phone
import references
from lens_pages import FLAGS, chromium

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.full

LENS = "lens-example.html"  # a page of its own, held by tests/lens


@pytest.fixture(scope="module")
def site() -> Path:
    if named := os.environ.get("QTARGET_SITE"):
        return ROOT / named
    subprocess.run(["sh", "scripts/docs_site.sh"], cwd=ROOT, check=True)
    return ROOT / "build" / "site"


@pytest.fixture(scope="module")
def address(site):
    with phone.served(site) as at:
        yield at


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


class Visit:
    """A browser at phone width: what its pages' scripts printed, and what was asked for elsewhere."""

    def __init__(self, browser, address, colours):
        self.context = browser.new_context(viewport=phone.PHONE, color_scheme=colours)
        self.view = self.context.new_page()
        self.printed, self.elsewhere = [], []
        self.view.on("console", lambda message: self.printed.append(f"{message.type}: {message.text}"))
        self.view.on("pageerror", lambda error: self.printed.append(f"error: {error}"))
        self.view.on("request", lambda request: self._asked(request.url, address))

    def _asked(self, url, address):
        if not url.startswith((address, "data:", "blob:")):
            self.elsewhere.append(url)

    def too_wide(self):
        return self.view.evaluate("document.documentElement.scrollWidth") > phone.PHONE["width"]

    def close(self):
        self.context.close()
        assert self.printed == []
        assert self.elsewhere == []


@pytest.mark.browser
@pytest.mark.parametrize("colours", phone.SCHEMES)
@pytest.mark.parametrize(
    "page", ["index.html", phone.PAGE, "first-look.html", "how-to/reading-the-log.html", "reference/losses.html"]
)
def test_a_page_on_a_phone_is_accessible(page, colours, address, browser):
    visit = Visit(browser, address, colours)
    visit.view.goto(f"{address}/{page}")
    visit.view.wait_for_load_state("networkidle")
    scheme = visit.view.evaluate("document.body.dataset.mdColorScheme")
    wide, found = visit.too_wide(), Axe().run(visit.view)
    visit.close()
    assert scheme == phone.SCHEMES[colours]
    assert not wide
    assert found.response["violations"] == [], found.generate_report()


@pytest.mark.browser
def test_every_page_fits_a_phone(site, address, browser):
    visit, wide = Visit(browser, address, "light"), []
    for page in sorted(site.rglob("*.html")):
        if (place := page.relative_to(site).as_posix()) != LENS:
            visit.view.goto(f"{address}/{place}")
            wide += [place] * visit.too_wide()
    visit.close()
    assert wide == []


@pytest.mark.browser
def test_search_finds_a_name(address, browser):
    visit = Visit(browser, address, "dark")
    visit.view.goto(f"{address}/index.html")
    visit.view.click("label[for=__search].md-header__button")
    visit.view.type("input.md-search__input", "apply_target")
    visit.view.wait_for_selector("a.md-search-result__link[href*='any-trainer']")
    visit.close()
