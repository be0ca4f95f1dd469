"""The pages in a real browser: complete without a network, legible in light and dark, on a phone and on paper."""

import importlib.util
import os
import shutil

import pytest

from hybrid_opt.reports.writing import read_report, write_report
from tests.reports.folders import write_run, write_study

NAMES = ("chromium", "chromium-browser", "google-chrome")
ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]

CONTRAST = """() => {
  const channels = text => (text.match(/[\\d.]+/g) || []).map(Number);
  const light = rgb => { const [r, g, b] = rgb.slice(0, 3).map(v => v / 255).map(v => v <= .03928 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4);
    return .2126 * r + .7152 * g + .0722 * b; };
  const ground = node => { for (; node; node = node.parentElement) { const c = channels(getComputedStyle(node).backgroundColor);
    if (c.length == 3 || c[3] > 0) return c; } return [255, 255, 255]; };
  const texts = [...document.querySelectorAll('body *')].filter(e => [...e.childNodes].some(n => n.nodeType == 3 && n.data.trim()));
  return texts.map(e => { const style = getComputedStyle(e), svg = e.namespaceURI.endsWith('svg');
    const [a, b] = [light(channels(svg ? style.fill : style.color)), light(ground(svg ? e.closest('div, li') : e))];
    return [(Math.max(a, b) + .05) / (Math.min(a, b) + .05), svg, e.textContent.trim().slice(0, 40)]; });
}"""
SIZES = "() => [...document.querySelectorAll('.drawing text')].map(e => e.getBoundingClientRect().height)"


def find_browser() -> str:
    """The browser's path; without one the tests are skipped, but never where they gate a landing."""
    found = next(filter(None, map(shutil.which, NAMES)), None)
    missing = "no chromium" if not found else "no playwright" if not importlib.util.find_spec("playwright") else None
    if missing:
        text = f"{missing} here: install one of {', '.join(NAMES)}, and the extra dev"
        pytest.fail(text) if os.environ.get("CI") == "true" else pytest.skip(text)
    return found


@pytest.fixture(scope="module")
def browser():
    path = find_browser()
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=ARGUMENTS)
        yield browser
        browser.close()


@pytest.fixture(scope="module", params=["run", "study"])
def page_file(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("browser") / request.param
    if request.param == "run":
        return write_report(write_run(folder))
    return write_report(
        write_study(folder, status=lambda arm, seed: "failed" if (arm, seed) == ("blend", 1) else "finished")
    )


@pytest.fixture
def open_page(browser, page_file):
    """Opens the page; afterwards nothing may have been requested and no error reported."""
    contexts, requests, errors = [], [], []

    def opened(width=1280, scheme="light"):
        context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
        contexts.append(context)
        page = context.new_page()
        page.on("request", lambda request: requests.append(request.url))
        page.on("console", lambda message: errors.append(message.text))
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto(page_file.as_uri())
        return page

    yield opened
    for context in contexts:
        context.close()
    assert set(requests) == {page_file.as_uri()}
    assert errors == []


@pytest.mark.parametrize("width", [360, 1280])
def test_the_page_never_scrolls_sideways(open_page, width):
    page = open_page(width)
    assert page.evaluate("document.documentElement.scrollWidth") == width
    shown = "e => { const box = e.getBoundingClientRect(); return box.left >= 0 && box.right <= innerWidth && box.width > 250 }"
    assert page.eval_on_selector_all("figure svg[viewBox]", f"all => all.map({shown})")
    assert all(page.eval_on_selector_all(".drawing > svg", f"all => all.map({shown})"))


def test_everything_is_there(open_page, page_file):
    page, report = open_page(), read_report(page_file.parent)
    names = [panel.name for section in report.sections for group in section.groups for panel in group.panels]
    assert page.eval_on_selector_all("figure", "all => all.map(e => e.id)") == [f"figure-{name}" for name in names]
    assert all(
        page.eval_on_selector_all("figure .drawing", "all => all.map(e => e.getAttribute('aria-label').length > 20)")
    )
    assert page.locator("section").count() == len(report.sections) == {"run": 7, "study": 8}[report.kind]
    assert page.locator("table").count() == sum(len(section.tables) for section in report.sections)
    assert page.locator("th:not([scope])").count() == 0
    assert page.evaluate("document.documentElement.lang") == "en"
    assert report.title in page.title()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_all_text_has_contrast(open_page, scheme):
    page = open_page(scheme=scheme)
    found = page.evaluate(CONTRAST)
    assert sum(svg for _, svg, _ in found) > 50
    assert len(found) > 150
    assert [row for row in found if row[0] < 4.5] == []
    ground = page.evaluate("getComputedStyle(document.documentElement).backgroundColor")
    assert ground == {"light": "rgb(255, 255, 255)", "dark": "rgb(22, 25, 29)"}[scheme]


def test_text_of_panels_is_legible_on_a_phone(open_page):
    assert min(open_page(360).evaluate(SIZES)) >= 10


def test_paper_is_light(open_page):
    page = open_page(scheme="dark")
    page.emulate_media(media="print", color_scheme="dark")
    assert page.evaluate("getComputedStyle(document.documentElement).backgroundColor") == "rgb(255, 255, 255)"
    assert min(row[0] for row in page.evaluate(CONTRAST)) >= 4.5
    page.set_viewport_size({"width": 718, "height": 1000})  # A4 without margins of 1 cm, at 96 dots an inch
    assert page.evaluate("document.documentElement.scrollWidth") <= 718
    assert page.pdf(format="A4").count(b"/Type /Page\n") > 0
