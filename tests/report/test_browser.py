"""Pages in a real browser: nothing fails, plots are drawn, and what can be chosen works, on wide and narrow screens."""

import shutil

import numpy as np
import pytest
from hostile import NAMES, hostile_result, hostile_sweep, hostile_training

import nodelens as nl
from nodelens.report import write_page, write_pruning_page, write_training_page

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install nodelens[dev]")
WIDTHS = (1400, 390)


@pytest.fixture(scope="module")
def browser():
    program = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if program is None:
        pytest.skip("no Chromium is installed: apt install chromium")
    with sync_api.sync_playwright() as started:
        opened = started.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield opened
        opened.close()


class Shown:
    """A page in the browser, and what it complained about."""

    def __init__(self, browser, file, width, **options):
        self.page = browser.new_page(viewport={"width": width, "height": 900}, **options)
        self.said = []
        self.page.on("console", lambda message: self.said.append(message.text) if message.type in ("error", "warning") else None)
        self.page.on("pageerror", lambda error: self.said.append(str(error)))
        self.page.on("dialog", lambda dialog: self.said.append(f"dialog {dialog.message}") or dialog.dismiss())
        self.page.goto(file.as_uri())

    def all_drawn(self):
        """Scrolls to every figure until it is drawn; the complaints of the page."""
        for holder in self.page.query_selector_all("figure.plot, [data-widget]"):
            holder.scroll_into_view_if_needed()
        self.page.wait_for_function(
            "nodelens.failed.length || nodelens.drawn >= document.querySelectorAll('figure.plot, [data-widget]').length",
            timeout=60_000,
        )
        empty = "[...document.querySelectorAll('figure.plot .canvas')].filter((each) => !each.querySelector('.main-svg')).length"
        assert self.page.evaluate(empty) == 0
        assert self.page.evaluate("document.documentElement.scrollWidth <= innerWidth"), "nothing sticks out"
        return self.said + self.page.evaluate("nodelens.failed")


@pytest.fixture(scope="module")
def show(browser, pages):
    """Opens a page of a kind, once for all tests: opening takes longer than what they do with it."""
    opened = {}

    def opening(kind, width=1400):
        if (kind, width) not in opened:
            opened[kind, width] = Shown(browser, pages[kind], width)
        return opened[kind, width]

    return opening


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """One page of each kind, from saved files that are made up."""
    home = tmp_path_factory.mktemp("pages")
    runs = home / "runs"
    for seed in range(3):
        result = hostile_result()
        result.metadata["config"] |= {"seed": seed, "model": {"net": {"dropout": seed // 2}}}
        result.units["rq"] += seed * np.random.default_rng(seed).normal(size=len(result.units))
        result.save(runs / f"run{seed}")
    return {
        "run": write_page(runs / "run0"),
        "pruning": write_pruning_page(hostile_sweep(home / "prune")),
        "training": write_training_page(hostile_training(home / "train")),
        "runs": nl.compare(f"{runs}/*", home / "compared"),
    }


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("kind", ["run", "pruning", "training", "runs"])
def test_every_plot_is_drawn_and_nothing_complains(kind, width, show):
    assert show(kind, width).all_drawn() == []


def test_the_scatter_shows_what_is_chosen(show):
    page = show("run").page
    page.locator("[data-widget=units]").scroll_into_view_if_needed()
    page.wait_for_selector("[data-widget=units][data-drawn]")
    page.get_by_label("horizontal", exact=True).select_option("taylor")
    page.get_by_label("vertical", exact=True).select_option("synergy")
    page.get_by_label("layer", exact=True).select_option(NAMES[0])
    page.wait_for_selector(f"[data-drawn={css('taylor synergy ' + NAMES[0])}]")
    found = page.evaluate(
        "(() => { const {x, y, text} = document.querySelector('.units .canvas').data.at(-1); return {x, y, text}; })()"
    )
    units = hostile_result().units.loc[NAMES[0]]
    np.testing.assert_allclose(found["x"], units["taylor"], rtol=1e-6)
    np.testing.assert_allclose(found["y"], units["synergy"], rtol=1e-6)
    assert found["text"][3] == "&lt;script&gt;alert(1)&lt;/script&gt; 3"
    assert "40 units" in page.locator(".units .canvas").get_attribute("aria-label")


def test_the_table_is_filtered_sorted_and_saved(show):
    page = show("run").page
    page.locator("[data-widget=units]").scroll_into_view_if_needed()
    page.wait_for_selector(".units .rows td")
    page.get_by_label("layer", exact=True).select_option(label="all layers")
    page.wait_for_selector("[data-widget=units][data-drawn$=' ']")
    rows = page.locator(".units .rows")
    rows.get_by_role("searchbox").fill("=cmd() rq>0.5")
    units = hostile_result().units.loc["=cmd()"]
    count = int((units["rq"] > 0.5).sum())
    assert f"of {count}" in rows.locator(".soft").inner_text()
    rows.get_by_role("button", name="rq", exact=True).click()
    shown = [float(cell) for cell in rows.locator("tbody tr td:nth-child(3)").all_inner_texts()]
    assert shown == sorted(shown, reverse=True)
    assert shown[0] == pytest.approx(units["rq"].max(), rel=1e-3)
    with page.expect_download() as saved:
        rows.get_by_role("button", name="CSV").click()
    text = saved.value.path().read_text()
    assert text.count("\n") == count + 1
    assert text.splitlines()[1].startswith("'=cmd(),")


def test_a_heatmap_has_tokens_in_its_cells_and_the_table_behind_it(show):
    page = show("run").page
    figure = page.locator("figure[data-name='lens-tokens-0']")
    figure.scroll_into_view_if_needed()
    page.wait_for_selector("figure[data-name='lens-tokens-0'][data-drawn]")
    cells = figure.locator(".hm text, .heatmaplayer text").all_inner_texts()
    assert len(cells) == 3 * len(NAMES)
    figure.locator("summary").click()
    figure.locator("td").first.wait_for()  # the table is made when it is opened
    assert "<script>alert(1)</script>" in figure.locator("td").all_inner_texts()


def test_the_pointer_shows_the_name_of_a_layer(show):
    page = show("run").page
    page.wait_for_selector("figure[data-name=overview][data-drawn]")
    page.locator("figure[data-name=overview] .canvas .nsewdrag").first.hover()
    page.wait_for_selector("figure[data-name=overview] .hovertext")
    assert "rank" in page.locator("figure[data-name=overview] .hovertext").first.text_content()


def test_a_menu_and_the_keys_change_a_plot(show):
    page = show("run").page
    figure = page.locator("figure[data-name=units]")
    figure.scroll_into_view_if_needed()
    page.wait_for_selector("figure[data-name=units][data-drawn]")
    figure.get_by_label("metric", exact=True).select_option(label="taylor")
    visible = (
        "document.querySelector('figure[data-name=units] .canvas').data.filter((trace) => trace.visible).map((trace) => trace.name)"
    )
    assert page.evaluate(visible)[0] == "taylor"
    edge = "document.querySelector('figure[data-name=units] .canvas')._fullLayout.xaxis.range[0]"
    before = page.evaluate(edge)
    figure.locator(".canvas").focus()
    page.keyboard.press("ArrowRight")
    page.wait_for_function(f"{edge} > {before}")


def test_a_cell_of_a_sweep_shows_its_command_and_what_it_keeps(show):
    page = show("pruning").page
    cells = page.locator("[data-widget=cells]")
    cells.scroll_into_view_if_needed()
    cells.get_by_role("button", name="taylor-uniform-none-low-0.5-1").click()
    assert "criterion=[taylor]" in cells.locator("pre").inner_text()
    assert "amounts=[0.5]" in cells.locator("pre").inner_text()
    page.wait_for_function("document.querySelector('[data-widget=cells] .canvas').data")
    assert page.evaluate("[...document.querySelector('[data-widget=cells] .canvas').data[0].x]") == [0.5, 1]


def test_two_runs_are_compared_unit_by_unit(show):
    page = show("runs").page
    widget = page.locator("[data-widget=differences]")
    widget.scroll_into_view_if_needed()
    page.wait_for_selector("[data-widget=differences][data-drawn]")
    widget.get_by_label("second run", exact=True).select_option(label="run2")
    page.wait_for_function("document.querySelector('[data-widget=differences] td')")
    sizes = [abs(float(cell)) for cell in widget.locator("tbody td:nth-child(6)").all_inner_texts()]
    assert sizes == sorted(sizes, reverse=True)
    assert f"{40 * len(NAMES)}" in widget.locator(".rows .soft").inner_text()


def test_dark_pages_have_bright_letters(show):
    page = show("run").page
    page.wait_for_selector("figure[data-name=overview][data-drawn]")
    page.emulate_media(color_scheme="dark")
    page.wait_for_function("document.querySelector('figure[data-name=overview] .canvas')._fullLayout.font.color === '#e6e8eb'")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(21, 24, 28)"
    page.emulate_media(color_scheme="light")


def test_numbers_and_names_are_short_and_told_apart(show):
    page = show("run").page
    shown = "[4.4544e-6, -0.00012346, 0, 1234567.8, 0.5, 12].map(nodelens.shown)"
    assert page.evaluate(shown) == ["4.454e-6", "-0.0001235", "0", "1.235e6", "0.5", "12"]
    names = [
        "model.layers.11.self_attn.q_proj",
        "conditional_rayleigh_quotient",
        "fc1 → model.layers.111.self_attn.q_proj",
        "&lt;b&gt;, x",
    ]
    layout = page.evaluate("(names) => nodelens.fit({ height: 150, yaxis: { ticktext: names } }, 390)", names)
    found = ["…11.self_attn.q_proj", "conditional…_quotient", "fc1<br>→ …111.self_attn.q_proj", "&lt;b&gt;,<br>x"]
    assert layout["yaxis"]["ticktext"] == found
    assert layout["height"] > 200, "names in two lines need room"


def css(words):
    """Words as a quoted value of a selector."""
    return '"' + words.replace("\\", "\\\\").replace('"', '\\"') + '"'
