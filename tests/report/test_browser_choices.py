"""Quick choices in a real browser: the last one counts, and data that cannot be read are said on the page."""

import shutil

import numpy as np
import pandas as pd
import pytest

from nodelens.report import unit_data, write_page
from nodelens.results.result import Result

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install nodelens[dev]")
LAYERS = ("one", "two", "three")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A run whose page reads the units of each layer when it is chosen."""
    index = pd.MultiIndex.from_product([LAYERS, range(60)], names=["layer", "unit"])
    values = np.random.default_rng(0).random((len(index), 2))
    layers = pd.DataFrame({"units": 60}, index=pd.Index(LAYERS, name="layer"))
    about = {name: {"metric": name, "options": {}, "needs": {}, "source": ""} for name in ("a", "b")}
    result = Result(pd.DataFrame(values, index, ["a", "b"]), layers, {}, {"schema_version": 1, "metrics": about})
    home = tmp_path_factory.mktemp("choices")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(unit_data, "VALUES", 120)
        patch.setattr(unit_data, "SAMPLE", 30)
        write_page(result.save(home))
    return home


@pytest.fixture
def page(folder):
    program = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if program is None:
        pytest.skip("no Chromium is installed: apt install chromium")
    with sync_api.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=program, args=["--no-sandbox"])
        page = browser.new_page()
        page.said = []
        page.on("pageerror", lambda error: page.said.append(str(error)))
        page.goto((folder / "report.html").as_uri())
        page.locator("[data-widget=units]").scroll_into_view_if_needed()
        page.wait_for_function("document.querySelector('[data-widget=units]').dataset.drawn")
        yield page
        assert page.said == []
        browser.close()


def choose(page, *layers):
    """Chooses layers in one go, without waiting for what they draw."""
    script = """(layers) => { const box = document.querySelector("[data-widget=units] select[aria-label=layer]");
        for (const layer of layers) { box.value = layer; box.dispatchEvent(new Event("change")); } }"""
    page.evaluate(script, list(layers))


def drawn(page, layer):
    page.wait_for_function(f"document.querySelector('[data-widget=units]').dataset.drawn.endsWith(' {layer}')")


def test_the_last_of_quick_choices_is_shown_and_a_missing_file_is_said(page, folder):
    page.route("**/units-0.js", lambda route: page.wait_for_timeout(300) or route.continue_())
    choose(page, "one", "two")
    drawn(page, "two")
    page.wait_for_timeout(500)
    drawn(page, "two")
    names = "[...document.querySelectorAll('[data-widget=units] tbody tr')].map((row) => row.cells[0].textContent)"
    assert set(page.evaluate(names)) == {"two"}
    (folder / "report_files/units-2.js").rename(folder / "kept.js")
    choose(page, "three")
    failed = page.locator("[data-widget=units] > .failed")
    failed.wait_for()
    assert failed.text_content() == "report_files/units-2.js is missing: copy the page together with its folder"
    (folder / "report_files/units-2.js").write_text("0;")  # an empty copy
    choose(page, "three")
    page.wait_for_function("document.querySelector('[data-widget=units] > .failed:last-child').textContent.includes('is damaged')")
    (folder / "kept.js").rename(folder / "report_files/units-2.js")
    choose(page, "three")  # the folder was completed
    drawn(page, "three")
    assert failed.count() == 0


def test_choices_during_a_drawing_are_drawn_once_and_the_last_failure_counts(page):
    found = page.evaluate(
        """async () => {
          const holder = document.createElement("div"), seen = [], state = {};
          const wait = (time) => new Promise((resolve) => setTimeout(resolve, time));
          const update = nodelens.latest(holder, async () => {
            const { name, time } = state;
            await wait(time);
            seen.push(name);
            if (name === "bad") throw new Error("no data");
          });
          const choose = (name, time) => Object.assign(state, { name, time }) && update();
          const first = choose("slow", 60);
          choose("skipped", 0);
          choose("fast", 0);
          await first;
          const bad = choose("bad", 0);
          await bad;
          const said = holder.textContent;
          await choose("good", 0);
          return { seen, said, left: holder.textContent };
        }"""
    )
    assert found == {"seen": ["slow", "fast", "bad", "good"], "said": "no data", "left": ""}
    page.evaluate("nodelens.failed.length = 0")


def test_keys_of_the_browser_are_left_to_it(page):
    shown = """([key, more]) => { const canvas = document.querySelector("[data-widget=units] .canvas");
        const before = JSON.stringify(canvas._fullLayout.xaxis.range);
        const event = new KeyboardEvent("keydown", { key, cancelable: true, ...more });
        canvas.dispatchEvent(event);
        return [event.defaultPrevented, before === JSON.stringify(canvas._fullLayout.xaxis.range)]; }"""
    for more in ("ctrlKey", "altKey", "metaKey"):
        assert page.evaluate(shown, ["-", {more: True}]) == [False, True]
    assert page.evaluate(shown, ["-", {}])[0] is True
