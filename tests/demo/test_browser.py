"""The page in Chromium: upload, restore, move the divider, download, close. A stand-in restores; the rest is real."""

import json
import shutil

import pytest
from PIL import Image

pytest.importorskip("gradio", reason="gradio is not installed (extra demo)")
webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
if not (shutil.which("chromium") and shutil.which("chromedriver")):
    pytest.skip("chromium and its driver are not installed", allow_module_level=True)

from selenium.common.exceptions import StaleElementReferenceException  # noqa: E402
from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.common.keys import Keys  # noqa: E402
from selenium.webdriver.support.ui import WebDriverWait  # noqa: E402

from consissr.inference.batch import Settings  # noqa: E402

FLAGS = (
    "headless", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "disable-background-networking",
    "disable-component-update", "disable-sync", "window-size=1280,900",
)  # fmt: skip


@pytest.fixture
def served(script, enlarger, tmp_path, monkeypatch):
    """(address, folder of what is served, what was loaded)."""
    monkeypatch.setenv("GRADIO_TEMP_DIR", "")  # given back afterwards, as what the script sets beside it
    monkeypatch.setenv("GRADIO_ANALYTICS_ENABLED", "")
    monkeypatch.setenv("GRADIO_HEARTBEAT_INTERVAL", "0.2")  # a closed page is noticed at once
    demo, root, asked = script("demo"), tmp_path / "served", []
    root.mkdir()

    def load(model, seed, steps, fidelity):
        asked.append((model, seed, steps, fidelity))
        return enlarger(), Settings(seed=seed)

    server = demo.launch(load, demo.parse(["--max-upload", "1"]), root, {})
    yield server.local_url, root, asked
    server.close(verbose=False)


@pytest.fixture
def browser(tmp_path):
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium")
    for flag in (*FLAGS, f"user-data-dir={tmp_path / 'profile'}"):
        options.add_argument(f"--{flag}")
    options.add_experimental_option("prefs", {"download.default_directory": str(tmp_path / "downloads")})
    options.set_capability("goog:loggingPrefs", {"performance": "ALL", "browser": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(shutil.which("chromedriver")))
    yield driver
    driver.quit()


def test_photographs_go_in_and_come_out(served, browser, upload, tmp_path):
    address, root, asked = served
    wait = WebDriverWait(browser, 300, ignored_exceptions=(StaleElementReferenceException,))

    def all_(selector):
        return browser.find_elements(By.CSS_SELECTOR, selector)

    def press(words):
        wait.until(lambda _: browser.find_elements(By.XPATH, f"//button[normalize-space(.)='{words}']"))[0].click()

    def said(words):
        return wait.until(lambda _: any(words in element.text for element in all_("[role=status]")))

    browser.get(address)
    press("Restore")
    said("No photographs")
    large = tmp_path / "large.png"
    Image.frombytes("L", (1200, 1000), bytes(1200 * 1000)).save(large, compress_level=0)
    all_("input[type=file]")[0].send_keys(str(large))
    wait.until(lambda _: "exceed the maximum allowed size" in browser.page_source)
    chosen = "\n".join(upload(name) for name in ("a.png", "scan.tif", "broken.jpg"))
    wait.until(lambda _: all_("input[type=file]"))[0].send_keys(chosen)
    wait.until(lambda _: all(name in browser.page_source for name in ("a.png", "scan", "broken")))
    press("Restore")
    said("2 of 3 restored")
    assert asked == [("nano-ccsr", 0, 0, 1)]
    assert [element.text for element in all_(".failed")] == ["broken.jpg: not an image that can be read"]

    # one picture at a time; arrow keys choose, and move the divider
    wait.until(lambda _: len(all_(".result input")) == 2)
    assert [element.is_displayed() for element in all_("compare-images")] == [True, False]
    all_(".result input")[0].send_keys(Keys.ARROW_DOWN)
    wait.until(lambda _: [element.is_displayed() for element in all_("compare-images")] == [False, True])
    inside = all_("compare-images")[1].shadow_root
    wait.until(lambda _: all(
        browser.execute_script("return arguments[0].complete && arguments[0].naturalWidth", image)
        for image in inside.find_elements(By.CSS_SELECTOR, "img")
    ))  # fmt: skip
    slider, left = (inside.find_element(By.CSS_SELECTOR, name) for name in ("input", "#left"))
    assert slider.accessible_name == "divider between before and after" and left.accessible_name == "before"
    before = left.value_of_css_property("clip-path")
    slider.send_keys(Keys.HOME)
    wait.until(lambda _: left.value_of_css_property("clip-path") not in (before, "none"))
    wait.until(lambda _: all(e.accessible_name for e in all_("button, input, select") if e.is_displayed()))

    # what is downloaded is what was restored
    all_(".result a")[0].click()
    all_("a.all")[0].click()
    wait.until(lambda _: {path.name for path in tmp_path.glob("downloads/*")} == {"a.png", "restored.zip"})
    (made,) = root.glob("run-*/out/a.png")
    assert (tmp_path / "downloads" / "a.png").read_bytes() == made.read_bytes()
    with Image.open(made) as image:
        assert image.size == (48, 36)

    asked_for = {
        event["params"]["request"]["url"]
        for entry in browser.get_log("performance")
        if (event := json.loads(entry["message"])["message"])["method"] == "Network.requestWillBeSent"
    }
    foreign = {url for url in asked_for if not url.startswith((address, "data:", "blob:", "chrome:"))}
    assert foreign == set(), "nothing is loaded from elsewhere"
    browser.get("about:blank")
    wait.until(lambda _: not [path for path in root.rglob("*") if path.is_file()])
