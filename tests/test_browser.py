"""The built pages in a real Chromium: offline, typeset, readable on a phone, usable by keyboard, accessible."""

import functools
import http.server
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Error, sync_playwright

ROOT = Path(__file__).parents[1]
HTML = ROOT / "_build" / "html"
# No sandbox for root in a container; the rest keeps Chromium itself from asking other hosts.
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
NAMES = ["chromium", "chromium-browser", "google-chrome", "google-chrome-stable"]
ADVICE = (
    "The browser tests need Chromium: on Debian or Ubuntu `apt-get install chromium`, elsewhere "
    "`.venv/bin/python -m playwright install chromium`; or name one in the variable CHROMIUM."
)
PHONE = {"width": 375, "height": 800}
WIDE = {"width": 1600, "height": 900}
pytestmark = pytest.mark.slow

TYPESET = """async () => {
    await MathJax.startup.promise;
    const sources = document.querySelectorAll("div.math, span.math");
    return {
        sources: sources.length,
        bare: [...sources].filter(s => !s.querySelector("mjx-container")).map(s => s.textContent),
        errors: [...document.querySelectorAll("mjx-merror, [data-mjx-error]")].map(e => e.textContent),
        empty: [...document.querySelectorAll("mjx-container")].filter(m => !m.querySelector("mjx-math *")).length,
        left: [...document.querySelectorAll("article p, article li, article td, article figcaption")]
            .map(e => e.innerText).filter(t => /\\\\\\(|\\$\\$|\\\\begin\\{/.test(t)),
    };
}"""
PICTURES = """() => [...document.querySelectorAll("article img")].map(image => ({
    source: image.src, alt: image.alt, pixels: image.naturalWidth * image.naturalHeight, loaded: image.complete,
}))"""
OVERFLOW = """() => {
    const width = document.documentElement.clientWidth;
    const scrolls = e => {
        for (let p = e.parentElement; p; p = p.parentElement)
            if (["auto", "scroll", "hidden"].includes(getComputedStyle(p).overflowX)) return true;
        return false;
    };
    return {
        page: document.documentElement.scrollWidth - width,
        wide: [...document.querySelectorAll("article :is(p, li, h1, h2, figure, pre, mjx-container)")]
            .filter(e => e.getBoundingClientRect().right > width + 1 && !scrolls(e))
            .map(e => e.outerHTML.slice(0, 200)),
    };
}"""
CUT = """() => [...document.querySelectorAll("article .cell_input pre, article .cell_output pre")]
    .filter(e => e.clientWidth && e.scrollWidth > e.clientWidth).map(e => e.innerText.slice(0, 200))"""

# A token of code has the colour of its kind, and axe takes most of its time to measure each of thousands: code that
# shows no kind of token that code above it has not shown is hidden from it.
ONE_OF_EACH = """() => {
    const seen = new Set();
    for (const block of document.querySelectorAll("article div.highlight")) {
        const around = block.closest(".cell_input, .cell_output")?.className ?? "";
        const kinds = [...block.querySelectorAll("span")].map(span => around + "/" + span.className);
        block.hidden = kinds.length > 0 && kinds.every(kind => seen.has(kind));
        kinds.forEach(kind => seen.add(kind));
    }
}"""


@pytest.fixture(scope="module")
def site():
    """The address of the book, built now if it is not up to date, served from this machine."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "tools.build", "--root", str(ROOT)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment, check=False)
    assert result.returncode == 0, result.stdout + result.stderr

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(HTML)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def browser():
    found = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)
    with sync_playwright() as playwright:
        try:
            chromium = playwright.chromium.launch(executable_path=found, args=FLAGS)
        except Error as error:
            if os.environ.get("CI"):
                pytest.fail(f"{ADVICE}\n{error}")
            pytest.skip(ADVICE)
        yield chromium
        chromium.close()


@pytest.fixture
def visit(browser):
    """Open a page in a context of its own; at the end, nothing may have failed or left the machine."""
    contexts, troubles = [], []

    def open_page(address, *, viewport=None, settle=True):
        context = browser.new_context(viewport=viewport or {"width": 1300, "height": 900})
        contexts.append(context)
        page = context.new_page()
        page.on("pageerror", lambda error: troubles.append(f"script error: {error}"))
        page.on("request", lambda request: _is_local(request.url) or troubles.append(f"outside: {request.url}"))
        page.on("requestfailed", lambda request: troubles.append(f"failed: {request.url} {request.failure}"))
        page.on("response", lambda answer: answer.status < 400 or troubles.append(f"{answer.status}: {answer.url}"))
        page.on("console", lambda line: line.type != "error" or troubles.append(f"console: {line.text}"))
        page.goto(address, wait_until="load")
        if settle:
            page.evaluate("() => window.MathJax && MathJax.startup ? MathJax.startup.promise : null")
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert not troubles, "\n".join(troubles)


def _is_local(url):
    return url.startswith(("http://127.0.0.1:", "file:", "data:", "blob:"))


def page_names():
    """Every page of the book by what `_toc.yml` says, so that collecting needs no build."""
    from tools.inputs import documents

    names = [path.relative_to(ROOT).with_suffix(".html").as_posix() for path in documents(ROOT)]
    return [*names, "search.html"]


def chapter_names():
    return [name for name in page_names() if (ROOT / name).with_suffix(".ipynb").is_file() and "index" not in name]


each_page = pytest.mark.parametrize("name", page_names())
each_chapter = pytest.mark.parametrize("name", chapter_names())


@each_page
def test_page_loads_with_its_formulas_pictures_and_code(site, visit, name):
    page = visit(f"{site}/{name}", viewport=WIDE)
    assert page.title()
    check_content(page)
    page.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
    assert page.evaluate(CUT) == [], "code is cut on a wide screen"


@each_page
def test_page_works_from_a_file_share(site, visit, name):
    check_content(visit(HTML.joinpath(name).as_uri()))


def check_content(page):
    pictures = page.evaluate(PICTURES)
    for picture in pictures:
        assert picture["loaded"], picture["source"]
        assert picture["pixels"] > 0, picture["source"]
        assert len(picture["alt"]) >= 20, f"no alt text: {picture['source']}"
    if page.evaluate("() => document.querySelectorAll('div.math, span.math').length"):
        math = page.evaluate(TYPESET)
        assert math["bare"] == []
        assert math["errors"] == []
        assert math["empty"] == 0
        assert math["left"] == []


def test_front_door_leads_to_the_book(site, visit):
    page = visit(f"{site}/index.html", settle=False)
    page.wait_for_url("**/book/index.html")
    assert "Fisher information" in page.inner_text("h1")


@each_page
def test_text_does_not_scroll_sideways_on_a_phone(site, visit, name):
    page = visit(f"{site}/{name}", viewport=PHONE)
    for button in page.query_selector_all("button.toggle-button"):
        button.evaluate("b => b.click()")
    page.evaluate("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")  # book.js has looked
    found = page.evaluate(OVERFLOW)
    assert found["page"] <= 0, f"the page is {found['page']} px wider than the phone"
    assert found["wide"] == []


@each_page
def test_no_serious_accessibility_violation(site, visit, name):
    page = visit(f"{site}/{name}")
    for button in page.query_selector_all("button.toggle-button"):
        button.evaluate("b => b.click()")
    # Colours change by transition; what axe reads halfway is no colour of ours.
    page.add_style_tag(content="*, *::before, *::after { transition: none !important; animation: none !important; }")
    page.evaluate(ONE_OF_EACH)
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)
        page.evaluate("scheme => { document.documentElement.dataset.theme = scheme; }", scheme)
        page.wait_for_timeout(100)
        # Without `preload`, axe would fetch style sheets by itself, and one of them from the wrong folder.
        # It describes every element that passes unless told not to, which takes longer than to check them all.
        options = {"preload": False, "resultTypes": ["violations"]}
        if scheme == "dark":  # the page is the same but for its colours
            options["runOnly"] = ["color-contrast", "link-in-text-block"]
        violations = Axe().run(page, options=options).response["violations"]
        serious = [v for v in violations if v["impact"] in ("serious", "critical")]
        shown = [
            f"{v['id']}: {v['help']}\n"
            + "\n".join(f"  {n['html'][:300]}\n  {n['failureSummary']}" for n in v["nodes"][:4])
            for v in serious
        ]
        assert not serious, f"{scheme}\n" + "\n".join(shown)


@each_chapter
def test_solutions_open_by_keyboard(site, visit, name):
    page = visit(f"{site}/{name}")
    buttons = page.locator(".solution.dropdown button.toggle-button")
    assert buttons.count() >= 1
    for position in range(buttons.count()):
        button = buttons.nth(position)
        solution = page.locator(".solution.dropdown").nth(position)
        content = solution.locator("section").first
        assert not content.is_visible()
        assert button.get_attribute("aria-expanded") == "false"
        button.focus()
        page.keyboard.press("Enter" if position % 2 else "Space")
        assert button.get_attribute("aria-expanded") == "true"
        assert content.is_visible()
        page.keyboard.press("Enter")
        assert not content.is_visible()


def test_solutions_are_reached_by_tab(site, visit):
    names = chapter_names()
    if not names:
        pytest.skip("no chapter is in the table of contents")
    page = visit(f"{site}/{names[0]}")
    # The heading's own link cannot hold the focus while it is hidden, so the heading itself does.
    page.evaluate("const h = document.querySelector('#exercises h2'); h.tabIndex = -1; h.focus()")
    for _ in range(200):  # every formula on the way is a stop of its own
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.matches('.solution button.toggle-button')"):
            outline = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
            assert outline != "none", "the focus cannot be seen"
            return
    pytest.fail("Tab does not reach the first solution")


def test_search_finds_hellinger(site, visit):
    page = visit(f"{site}/search.html?q=Hellinger")
    page.wait_for_selector("#search-results li a")
    found = [link.inner_text() for link in page.query_selector_all("#search-results li a")]
    assert any("Glossary" in text or "Hellinger" in text for text in found), found


def test_links_between_pages_lead_somewhere(site, browser):
    """Every link inside the book, its anchor included."""
    anchors, links = {}, []
    page = browser.new_page()
    for path in sorted(HTML.rglob("*.html")):
        page.set_content(path.read_text(encoding="utf-8"), wait_until="domcontentloaded")
        anchors[path] = set(page.evaluate("[...document.querySelectorAll('[id]')].map(e => e.id)"))
        hrefs = page.evaluate("[...document.querySelectorAll('main a[href]')].map(a => a.getAttribute('href'))")
        links += [(path, href) for href in hrefs if "://" not in href and not href.startswith("mailto:")]
    page.close()
    broken = []
    for path, href in links:
        target, _, anchor = href.partition("#")
        goal = (path.parent / target).resolve() if target else path
        if not goal.is_file() or (anchor and goal.suffix == ".html" and anchor not in anchors[goal]):
            broken.append(f"{path.relative_to(HTML)}: {href}")
    assert not broken, "\n".join(broken)
