"""The report in a real browser without network: nothing complains, every image shows, on a laptop and on a phone."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import report_fixtures as fixtures
import test_paper
import workflow

from scripts.report import write_index

pytestmark = pytest.mark.browser
ROOT = Path(__file__).resolve().parents[1]
SIZES = {"laptop": (1280, 800), "phone": (375, 812)}
BROKEN = "[...document.images].filter(one => !one.complete || !one.naturalWidth).map(one => one.alt || one.src)"
UNFOLD = "document.querySelectorAll('details').forEach(one => one.open = true)"
SMALL = "pipelines=[coca] coca.train.epochs=2"


@pytest.fixture(scope="module")
def browser() -> Iterator:
    """Chromium, which must not reach any network."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        made = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        yield made
        made.close()


def opened(browser, path: Path, size: tuple[int, int]):
    """The page of a file, once it is loaded, and what went wrong while it was."""
    page, wrong = browser.new_page(viewport=dict(zip(("width", "height"), size, strict=True))), []
    page.on("console", lambda message: wrong.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("request", lambda request: wrong.append(request.url) if request.url.startswith("http") else None)
    page.goto(path.as_uri(), wait_until="load")
    page.wait_for_load_state("networkidle")
    return page, wrong


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Path:
    """The front page of a small results folder."""
    place = tmp_path_factory.mktemp("small")
    (place / "caption.rst").write_text("What {{ snakemake.wildcards.name }} shows.")
    folder = fixtures.results(place / "results")
    write_index.main(fixtures.index_arguments(folder, place / "caption.rst"))
    return folder / "index.html"


@pytest.fixture(scope="module")
def many(tmp_path_factory) -> Path:
    """The front page of a results folder with curves of six runs and a number in parts, one too long for a phone."""
    place = tmp_path_factory.mktemp("many")
    parts = {name: fixtures.METRIC | {"baseline": 0.6} for name in ("fabric", "a_dimension_of_a_very_long_name")}
    whole = fixtures.METRIC | {"parted_by": "dimension", "parts": parts}
    fixtures.rendered(place, {"coca": {"retrieval_r5": whole}}, runs=6)
    return place / "results/index.html"


@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
def test_the_front_page_shows_all_and_scrolls_only_downwards(browser, small, size):
    page, wrong = opened(browser, small, size)
    page.evaluate(UNFOLD)
    assert wrong == [] and page.evaluate(BROKEN) == []
    assert page.evaluate("document.images.length") == 3
    assert page.evaluate("document.documentElement.scrollWidth") <= size[0]
    edges = "[...document.querySelectorAll('.metrics td')].map(one => one.getBoundingClientRect().right)"
    assert max(page.evaluate(edges)) <= size[0], "a number is seen by scrolling sideways alone"
    text = page.get_by_text("retrieval r5").first
    assert text.is_visible() and float(text.evaluate("one => parseFloat(getComputedStyle(one).fontSize)")) >= 14
    assert page.evaluate("document.fonts.check('16px \"Noto Sans CJK SC\"', '浸')")


@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
def test_pictures_of_a_kind_are_folded_until_asked_for_and_fit_the_screen(browser, many, size):
    page, wrong = opened(browser, many, size)
    visible = "[...document.images].filter(one => one.checkVisibility()).length"
    assert page.evaluate(visible) == 4 and page.get_by_text("5 more of this kind").count() == 2
    page.locator("details summary", has_text="5 more of this kind").click()
    assert page.evaluate(visible) == 9 and page.evaluate(BROKEN) == []
    page.evaluate(UNFOLD)
    edges = "[...document.querySelectorAll('img, .cards td')].map(one => one.getBoundingClientRect().right)"
    assert max(page.evaluate(edges)) <= size[0] and page.evaluate("document.documentElement.scrollWidth") <= size[0]
    assert wrong == []


@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
def test_a_picture_opens_at_its_full_size_and_closes_where_the_page_was(browser, small, size):
    page, _ = opened(browser, small, size)
    box = "one => { const {width, height} = one.getBoundingClientRect(); return [width, height] }"
    image = page.get_by_alt_text("Sheet · train")
    image.scroll_into_view_if_needed()
    before, top = image.evaluate(box), page.evaluate("scrollY")
    assert before[0] < 1500
    image.click()
    assert image.evaluate(box) == [1500, 400]
    page.get_by_role("checkbox", name="full size: Sheet · train").press("Space")  # by keyboard too
    assert image.evaluate(box) == before and page.evaluate("scrollY") == top


def test_on_a_phone_a_table_that_is_too_wide_says_so_and_keeps_its_first_column(browser, small):
    page, _ = opened(browser, small, SIZES["phone"])
    frame, hint = page.locator("#cost .scroll"), page.get_by_text("scroll the table sideways")
    assert frame.evaluate("one => one.scrollWidth > one.clientWidth") and hint.is_visible()
    frame.evaluate("one => one.scrollLeft = one.scrollWidth")
    assert frame.locator("tbody td").first.bounding_box()["x"] >= 0
    assert frame.locator("tbody td").last.bounding_box()["x"] < SIZES["phone"][0]
    assert not opened(browser, small, SIZES["laptop"])[0].get_by_text("scroll the table sideways").is_visible()


def test_the_first_foreign_text_is_shown_by_the_embedded_font(browser, small):
    """Elsewhere in the list of fonts, it is shown as boxes until something else makes the browser draw it anew."""
    page, _ = opened(browser, small, SIZES["laptop"])
    cell = page.get_by_text("浸润性导管癌")
    width = "one => { const all = new Range(); all.selectNodeContents(one); return all.getBoundingClientRect().width }"
    size = float(cell.evaluate("one => parseFloat(getComputedStyle(one).fontSize)"))
    assert cell.evaluate(width) == pytest.approx(6 * size, rel=0.02)


@pytest.fixture(scope="module")
def published(tmp_path_factory) -> Path:
    """The page of published numbers, with runs of two pipelines."""
    place = tmp_path_factory.mktemp("published")
    rae = test_paper.full_protocol(place / "rae")
    vase = test_paper.vase_metrics(place / "vase", 96)
    front = place / "index.html"
    front.write_text("<title>front</title>")
    given = ("--rae", f"main/main={rae}", "--vase", f"main/main={vase}", "--drawn", "vase", "--front-page", str(front))
    test_paper.compared(place, *given)
    return place / "paper.html"


@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
def test_published_numbers_are_read_by_scrolling_downwards_alone(browser, published, size):
    page, wrong = opened(browser, published, size)
    assert wrong == [] and page.get_by_text("drawn data and tiny models").is_visible()
    edges = "[...document.querySelectorAll('td, a')].map(one => one.getBoundingClientRect().right)"
    assert max(page.evaluate(edges)) <= size[0], "a number is seen by scrolling sideways alone"
    assert page.evaluate("document.documentElement.scrollWidth") <= size[0]
    words = [page.get_by_text(one).first for one in ("0.5512 [0.54, 0.56], n = 50000", "DINOv2-B, ViT-XL decoder")]
    assert all(float(one.evaluate("one => parseFloat(getComputedStyle(one).fontSize)")) >= 14 for one in words)
    named = "one => getComputedStyle(one, '::before').content"
    cell = page.locator("td", has_text="0.5512 [").first
    assert ("this run" in cell.evaluate(named)) == (size == SIZES["phone"]), "cards name their lines"
    page.get_by_role("link", name="front page").click()
    assert page.title() == "front"


def test_dark_pages_stay_readable(browser, small):
    page = browser.new_page(color_scheme="dark")
    page.goto(small.as_uri())
    ink, back = page.evaluate("['color', 'backgroundColor'].map(name => getComputedStyle(document.body)[name])")
    brightness = [sum(map(int, one[4:-1].split(","))) for one in (ink, back)]
    assert brightness[0] - brightness[1] > 400


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """The results of one pipeline's report by the real workflow."""
    place = tmp_path_factory.mktemp("made")
    checkout = workflow.copy_checkout(place / "checkout")
    shutil.copy(ROOT / "config/demo.yaml", checkout / "config")
    directory = place / "run"
    directory.mkdir()
    workflow.run(
        checkout, directory, "report", "--configfile", f"{checkout}/config/demo.yaml", "--config", f"set={SMALL}"
    )
    return directory / "results/demo"


@pytest.mark.slow(minutes=2)
@pytest.mark.parametrize("name", ["index.html", "report.html", "paper.html"])
@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
def test_the_pages_of_a_real_run_show_all(browser, made, name, size):
    page, wrong = opened(browser, made / name, size)
    page.evaluate(UNFOLD)
    assert wrong == [] and page.evaluate(BROKEN) == []
    if name != "report.html":  # Snakemake's own, whose layout is not ours
        assert page.evaluate("document.documentElement.scrollWidth") <= size[0]


@pytest.mark.slow(minutes=2)
def test_snakemakes_own_report_shows_each_picture_of_the_front_page(browser, made):
    """Those with equal labels would stand in one row, where only the last can be opened."""
    page, _ = opened(browser, made / "index.html", SIZES["laptop"])
    pictures = page.evaluate("document.images.length")
    page, wrong = opened(browser, made / "report.html", SIZES["laptop"])
    page.get_by_text("Results", exact=True).first.click()
    rows = page.locator("table tbody tr")
    rows.first.wait_for()
    assert rows.count() == pictures >= 6
    shown = set()
    for row in rows.all():
        row.locator("a[iconname=eye]").click()
        image = page.locator("img[src^='data:image/png']")
        image.wait_for()
        page.wait_for_function(
            "seen => !seen.includes(document.querySelector(`img[src^='data:image/png']`).src)", arg=[*shown]
        )
        assert image.evaluate("async one => { await one.decode(); return one.naturalWidth }") > 100
        shown.add(image.get_attribute("src"))
    assert wrong == []


@pytest.mark.slow(minutes=2)
def test_the_front_page_of_a_real_run_names_its_numbers_and_all_that_lies_beside_it(browser, made):
    page, _ = opened(browser, made / "index.html", SIZES["laptop"])
    assert page.get_by_text("retrieval r5").first.is_visible()
    assert page.get_by_text("drawn data and tiny models").is_visible()
    links = page.evaluate("[...document.querySelectorAll('nav a')].map(one => one.getAttribute('href'))")
    assert {"report.html", "paper.html", "ro-crate-metadata.json"} <= set(links)
    assert all((made / one).is_file() for one in links if not one.startswith("#"))
    assert page.evaluate("document.images.length") >= 6


@pytest.mark.slow(minutes=2)
def test_published_numbers_of_a_real_run_say_that_data_are_drawn_and_lead_to_what_is_there(browser, made):
    page, _ = opened(browser, made / "paper.html", SIZES["phone"])
    assert page.get_by_text("drawn data and tiny models").is_visible()
    links = page.evaluate("[...document.querySelectorAll('a')].map(one => one.getAttribute('href'))")
    local = [one for one in links if not one.startswith(("#", "https:"))]
    assert "index.html" in local and any(one.endswith("/metrics.json") for one in local)
    assert all((made / one).is_file() for one in local)
