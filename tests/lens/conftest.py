"""A browser for the lens' pages."""

import pytest
from playwright.sync_api import sync_playwright

from lens_pages import FLAGS, Opened, chromium


@pytest.fixture(scope="session")
def browser():
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=chromium(), args=[*FLAGS.split(), "--disable-sync"])
        yield started
        started.close()


@pytest.fixture
def open_page(browser):
    opened = []

    def start(file, **context):
        opened.append(Opened(browser, file, **context))
        return opened[-1].page

    yield start
    for one in opened:
        one.close()
