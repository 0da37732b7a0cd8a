"""The built documentation in a real browser: its menu leads everywhere, its search finds, its pictures are there.

``make test-site`` builds the site and installs Debian's Chromium if it can; screenshots lie in ``build/docs/shots``.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import pytest

from helpers.command import ROOT

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

SITE, SHOTS = ROOT / "build" / "docs" / "html", ROOT / "build" / "docs" / "shots"
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
#: Pages that are looked at, with what must be seen on each.
LOOKED_AT = {
    "index.html": "resume on fewer nodes",
    "quickstart.html": "One command",
    "guides/methods.html": "Choosing a method",
    "guides/troubleshooting.html": "Why was my model refused?",
    "generated/configuration.html": "gradient_checkpointing",
    "generated/command-line.html": "lowrank-dist plan",
    "generated/compatibility.html": "gpt_oss",
    "generated/api-root.html": "PiSSAStrategy",
    "performance/index.html": "pissa_niter_4",
}
#: Questions of a new user, and the page that answers them.
SEARCHED = {
    "resume on fewer nodes": "guides/checkpoints.html",
    "vllm": "guides/serving.html",
    "refused": "guides/troubleshooting.html",
    "shard_within": "guides/planning.html",
    "randomized_svd": "generated/api-linalg.html",
}


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    pytest.importorskip("playwright", reason="playwright is not installed: make test-site")
    from playwright.sync_api import sync_playwright

    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    if found is None:
        pytest.skip(f"no browser ({', '.join(BROWSERS)}): make test-site installs one as root on Debian")
    if not (SITE / "index.html").exists():
        pytest.skip("the site is not built: make docs")
    with sync_playwright() as playwright:
        # a container has no user namespaces for the sandbox; nothing but these files is opened
        browser = playwright.chromium.launch(executable_path=found, args=["--no-sandbox"] if os.getuid() == 0 else [])
        yield browser
        browser.close()


@pytest.fixture
def page(browser: Browser) -> Iterator[Page]:
    """A page that has raised no error of a script and has missed no file when the test ends."""
    page = browser.new_page(viewport={"width": 1400, "height": 1000})
    problems: list[str] = []
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on(
        "response",
        lambda response: response.status < 400 or problems.append(f"{response.url}: status {response.status}"),
    )
    yield page
    page.close()
    assert not problems


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """Where the site is served: the search reads pages, which browsers forbid for files."""
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(SITE))) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


def test_the_menu_leads_to_every_part(page: Page, address: str) -> None:
    page.goto(address + "index.html")
    names = page.locator(".bd-header .navbar-nav .nav-link").all_inner_texts()
    assert [name.strip() for name in names] == [
        "Quickstart", "Guides", "Concepts", "Performance", "Reference", "Development",
    ]  # fmt: skip
    for name in names:
        page.locator(".bd-header .navbar-nav .nav-link", has_text=name.strip()).click()
        page.locator(".bd-header .nav-item.current", has_text=name.strip()).wait_for()
        entries = page.locator(".bd-sidebar-primary .bd-links .toctree-l1 > a")
        for entry in [entries.nth(i).get_attribute("href") for i in range(entries.count())]:
            assert entry is not None
            if entry != "#":
                assert (SITE / urlsplit(page.url).path.lstrip("/")).parent.joinpath(entry.split("#")[0]).exists()


@pytest.mark.parametrize(("words", "answer"), SEARCHED.items())
def test_search_finds(page: Page, address: str, words: str, answer: str) -> None:
    """Among the first ten results, for a user who clicks on the magnifying glass and types."""
    page.goto(address + "index.html")
    page.locator(".bd-header button.search-button").first.click()
    page.keyboard.type(words)
    page.keyboard.press("Enter")
    page.wait_for_url("**/search.html*")
    # results appear one after the other
    found = page.locator(".search-summary", has_text="found")
    found.wait_for()
    number = re.search(r"found (\d+) pages", found.inner_text())
    page.locator("ul.search > li").nth(min(int(number[1]) if number else 1, 10) - 1).wait_for()
    links = page.locator("ul.search > li > a")
    first = [str(links.nth(i).get_attribute("href")) for i in range(min(10, links.count()))]
    assert any(answer in link for link in first), first


@pytest.mark.parametrize(("name", "words"), LOOKED_AT.items())
def test_pages_can_be_looked_at(page: Page, address: str, name: str, words: str) -> None:
    """Nothing is wider than the window, pictures are loaded, and a screenshot is taken."""
    page.goto(address + name)
    assert words in page.locator("main").inner_text()
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    broken = "[...document.images].filter(i => i.offsetParent && !i.naturalWidth).map(i => i.src)"
    assert page.evaluate(broken) == []
    SHOTS.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=str(SHOTS / (name.replace("/", "-").removesuffix(".html") + ".png")))


def test_a_dark_page_has_the_dark_figure(browser: Browser, address: str) -> None:
    page = browser.new_page(color_scheme="dark", viewport={"width": 1400, "height": 1000})
    page.goto(address + "index.html")
    shown = "[...document.images].filter(i => i.offsetParent).map(i => i.src.split('/').pop())"
    assert page.evaluate(shown) == ["walk-dark.svg"]
    SHOTS.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=str(SHOTS / "index-dark.png"))
    page.close()


def test_a_narrow_window(browser: Browser, address: str) -> None:
    """Of a telephone: the text is not wider than the window."""
    page = browser.new_page(viewport={"width": 390, "height": 844})
    for name in LOOKED_AT:
        page.goto(address + name)
        assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth + 1"), name
    page.close()
