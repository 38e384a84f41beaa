"""The report in headless Chromium: on a screen and on a phone, in light and dark."""

import shutil

import pytest
from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By

from csulora_callback import write_report
from tests.helpers.reports import deep_adapter, recipe_output

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
OPTIONS = (
    "--headless",
    "--no-sandbox",  # which root cannot have
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (CHROMIUM and DRIVER),
        reason="needs chromium and chromedriver; on Debian: apt-get install chromium chromium-driver",
    ),
]


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for option in (*OPTIONS, f"--user-data-dir={tmp_path_factory.mktemp('chromium')}"):
        options.add_argument(option)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(DRIVER))
    yield driver
    driver.quit()


@pytest.fixture(scope="module", params=["a recipe's two corrections", "32 layers of 7 kinds"])
def page(request, pair, subspace, tmp_path_factory):
    """A report, and how many figures it has."""
    folder = tmp_path_factory.mktemp("pages")
    if request.param == "32 layers of 7 kinds":
        run, figures = deep_adapter(folder), 6
    else:
        run, figures = recipe_output(folder / "output", pair, subspace), 2 + 2 * 6 + 7 + 4
    write_report(run, folder / "report.html")
    assert (folder / "report.html").stat().st_size < 250_000
    return folder / "report.html", figures


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_it_is_whole_and_fits(browser, page, width, scheme):
    file, figures = page
    size = {"width": width, "height": 844, "deviceScaleFactor": 1, "mobile": width < 500}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    browser.get(file.as_uri())
    for details in browser.find_elements(By.TAG_NAME, "details"):
        browser.execute_script("arguments[0].open = true", details)

    assert browser.get_log("browser") == []
    assert browser.execute_script("return innerWidth") == width
    assert browser.execute_script("return document.scrollingElement.scrollWidth") <= width
    fetched = browser.execute_script("return performance.getEntriesByType('resource').map(entry => entry.name)")
    assert [name for name in fetched if not name.startswith("data:")] == []
    found = browser.find_elements(By.CSS_SELECTOR, "figure svg[role=img]")
    assert len(found) == figures
    for figure in found:
        assert figure.accessible_name
        assert figure.size["width"] >= 300
        assert figure.size["height"] >= 60
        assert _outside(browser, figure) == []
    ground, ink = _brightness(browser, "background-color"), _brightness(browser, "color")
    assert (ground > 0.9 and ink < 0.2) if scheme == "light" else (ground < 0.15 and ink > 0.8)
    letters = browser.execute_script(
        "return [...new Set([...document.querySelectorAll('svg text')].map(t => getComputedStyle(t).fill))]"
    )
    assert letters == [browser.execute_script("return getComputedStyle(document.body).color")]


def _outside(browser, figure) -> list[str]:
    """Letters that a figure cuts off."""
    return browser.execute_script(
        """
        const box = arguments[0].getBoundingClientRect();
        return [...arguments[0].querySelectorAll("text")].filter(text => {
            const own = text.getBoundingClientRect();
            const across = own.left < box.left - 1 || own.right > box.right + 1;
            return across || own.top < box.top - 1 || own.bottom > box.bottom + 1;
        }).map(text => text.textContent);
        """,
        figure,
    )


def _brightness(browser, which: str) -> float:
    color = browser.execute_script(f"return getComputedStyle(document.body).getPropertyValue('{which}')")
    return sum(int(part) for part in color.removeprefix("rgb(").removesuffix(")").split(",")) / (3 * 255)
