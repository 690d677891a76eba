"""The page of the report, in a real browser."""

from __future__ import annotations

import shutil
from dataclasses import replace

import pytest
from playwright.sync_api import expect, sync_playwright

from feature_cache import Augmentations, FeatureCache
from feature_cache.movies import Movie, Source, write_movie
from feature_cache.report import Choice, look_at, render_page, survey_cache
from feature_cache.report.coverage import Column, CopyGroup, KnownMovie, SeenByModel
from feature_cache.spec import Context
from feature_cache.testing import FakeBackbone
from feature_cache.warm import plan_warm, run_warm
from synthetic import make_movie

CHROMIUM = shutil.which("chromium")
ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
HOSTILE = "b </script><script>window.hurt = 1</script><img src=x onerror='window.hurt = 1'>"

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium to open pages with")


@pytest.fixture(scope="module")
def browser():
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield chromium
        chromium.close()


@pytest.fixture(scope="module")
def page_file(tmp_path_factory):
    """Write the page of a cache with three movies, of which two are drawn."""
    folder = tmp_path_factory.mktemp("report")
    cache = FeatureCache(folder / "cache")
    copies = Augmentations("default", copies=9, seed=0)
    roots = [folder / name / "01" for name in ("a", HOSTILE, "c")]
    for seed, root in enumerate(roots):
        write_movie(root, *make_movie(frames=4, seed=seed))
        movie = Movie.open(root)
        features = cache.movie(movie.frames, movie.masks, FakeBackbone(), name=movie.name)
        features.warm()
        for copy in range(1, 10) if seed == 0 else []:
            features.with_draw(copies.draw(copy), copies.name_of(copy)).warm()
    features.with_draw(copies.draw(1), copies.name_of(1)).compute([2])
    cache.counter.save()
    strips = [look_at(cache, Source(str(root)), Choice("fake"), 3) for root in roots[:2]]
    file = folder / "out.html"
    file.write_text(render_page(survey_cache(cache.store), strips))
    return file


@pytest.fixture
def open_page(browser, page_file):
    """Open the page in a window; it must neither complain nor ask for anything."""
    said, asked, pages = [], [], []

    def open_in_window(width=1280, **options):
        page = browser.new_page(viewport={"width": width, "height": 800}, **options)
        pages.append(page)
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("request", lambda request: asked.append(request.url))
        page.goto(page_file.as_uri())
        return page

    yield open_in_window
    for page in pages:
        assert page.evaluate("window.hurt") is None
        page.close()
    assert said == []
    assert {url for url in asked if not url.startswith("data:")} == {page_file.as_uri()}


def rows_of(page):
    return page.locator("#matrix tbody tr")


def test_the_matrix_shows_what_is_there_partly_there_and_missing(open_page):
    page = open_page()
    expect(rows_of(page)).to_have_count(3)
    assert page.locator("#matrix thead th[scope=col]").count() == 4 + 10
    texts = [row.locator("td.cell").all_inner_texts() for row in rows_of(page).all()]
    assert texts[0] == ["✓"] * 10
    assert texts[1] == ["✓"] + ["0"] * 9
    assert texts[2] == ["✓", "1/4"] + ["0"] * 8
    expect(page.get_by_role("status").first).to_have_text(
        "3 of 3 movies, 2 with gaps: 71 records missing"
    )


def test_regions_of_frames_are_counted(open_page):
    row = rows_of(open_page()).first
    assert row.locator("td").nth(1).inner_text() == "5 / 5 / 5"


def test_names_are_shown_as_they_are(open_page):
    assert HOSTILE in rows_of(open_page()).nth(1).locator("th").inner_text()


def test_movies_are_found_by_words_and_by_gaps(open_page):
    page = open_page()
    page.get_by_label("Find movies").fill("tra /C/")
    expect(rows_of(page)).to_have_count(1)
    expect(page.locator("#shown")).to_have_text("1 of 3 movies, 1 with gaps: 35 records missing")
    page.get_by_label("Find movies").fill("")
    page.get_by_label("Only with gaps").check()
    expect(rows_of(page)).to_have_count(2)
    page.get_by_label("Find movies").fill("nothing like it")
    expect(rows_of(page)).to_have_count(0)


def test_a_gap_opens_the_command_that_fills_it(open_page):
    page = open_page()
    button = rows_of(page).nth(2).get_by_role("button", name="35 missing: show how to warm")
    button.focus()
    page.keyboard.press("Enter")
    command = page.locator("#matrix .command")
    expect(command).to_have_count(1)
    assert command.inner_text().startswith("feature-cache warm ")
    assert command.inner_text().endswith(" --backbone fake --copies 9")
    page.keyboard.press("Enter")
    expect(command).to_have_count(0)


def test_a_region_is_chosen_by_keyboard(open_page):
    page = open_page()
    strip = page.locator(".comparable").first
    listbox = strip.get_by_role("listbox").first
    regions = listbox.get_by_role("option")
    assert regions.count() == 5
    regions.first.focus()
    page.keyboard.press("ArrowRight")
    expect(regions.nth(1)).to_be_focused()
    assert [one.get_attribute("tabindex") for one in regions.all()] == ["-1", "0", "-1", "-1", "-1"]
    page.keyboard.press("Enter")
    expect(regions.nth(1)).to_have_attribute("aria-selected", "true")
    expect(strip.locator(".picked")).to_contain_text("likeness to region 2 of frame 0")
    fills = strip.locator(".region").evaluate_all("all => all.map((one) => one.style.fill)")
    assert len(fills) == 15
    assert all(fills)
    assert len(set(fills)) > 3
    assert strip.locator("tbody tr").count() == 3
    page.keyboard.press("Escape")
    expect(strip.locator(".picked")).to_have_text("No region is chosen.")
    assert not any(strip.locator(".region").evaluate_all("all => all.map((o) => o.style.fill)"))


def test_the_cosines_are_those_of_the_records(open_page, page_file):
    cache = FeatureCache(page_file.parent / "cache", "r")
    strip = look_at(cache, Source(str(page_file.parent / "a" / "01")), Choice("fake"), 3)
    vectors = [view.regions.features.astype(float) for view in strip.frames]
    own, others = vectors[0][3], vectors[1]
    cosines = others @ own / ((others**2).sum(1) * (own**2).sum()) ** 0.5
    page = open_page()
    shown = page.locator(".comparable").first
    shown.locator(".region").nth(3).click()
    cells = shown.locator("tbody tr").nth(1).locator("th, td").all_inner_texts()
    assert cells[:2] == ["1", str(1 + cosines.argmax())]
    assert float(cells[2]) == pytest.approx(cosines.max(), abs=0.02)


def test_a_region_is_where_its_pixels_are(open_page):
    page = open_page()
    shown = page.locator(".comparable").first.get_by_role("listbox").first
    view, box = shown.get_attribute("viewBox").split(), shown.bounding_box()
    assert view == ["0", "0", "128.0", "96.0"]
    assert box["width"] / box["height"] == pytest.approx(128 / 96, rel=0.01)


@pytest.mark.parametrize("width", [360, 1280])
def test_only_tables_scroll_sideways(open_page, width):
    page = open_page(width)
    rows_of(page).nth(1).get_by_role("button").click()
    page.locator(".region").first.click()
    page.evaluate("document.querySelectorAll('details').forEach((one) => { one.open = true })")
    assert page.evaluate("document.documentElement.scrollWidth") == width


def luminance(colour):
    parts = [float(part) / 255 for part in colour.removeprefix("rgb(").rstrip(")").split(",")]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


CONTRASTS = """() => {
  const back = (element) => getComputedStyle(element).backgroundColor;
  const shown = (one) => one.checkVisibility() && one.innerText.trim();
  const all = document.querySelectorAll("h1, p, a, th, td, label, button, code, summary");
  return [...all].filter(shown).map((one) => {
    let behind = one;
    while (behind !== document.body && back(behind) === "rgba(0, 0, 0, 0)") {
      behind = behind.parentElement;
    }
    return [one.innerText, getComputedStyle(one).color, back(behind)];
  });
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_can_be_read(open_page, scheme):
    page = open_page(color_scheme=scheme)
    rows_of(page).nth(1).get_by_role("button").click()
    page.locator(".region").first.click()
    found = page.evaluate(CONTRASTS)
    assert len(found) > 50
    paper = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (luminance(paper) < 0.2) == (scheme == "dark")
    for text, colour, background in found:
        low, high = sorted([luminance(colour), luminance(background)])
        assert (high + 0.05) / (low + 0.05) >= 4.5, (text, colour, background)


def test_what_can_be_used_has_a_name_and_tables_have_headers(open_page):
    page = open_page()
    unnamed = page.evaluate("""() => [...document.querySelectorAll("th:not([scope])")].length""")
    assert unnamed == 0
    for role in ("listbox", "region", "button", "combobox", "searchbox", "checkbox", "img"):
        for one in page.get_by_role(role).all():
            assert one.aria_snapshot().partition('"')[2].strip(), role


def many_movies(report, number):
    """Give a report the movies of a much larger cache."""
    nine = {Context(): SeenByModel.of((k, k) for k in range(9))}
    movies = tuple(
        KnownMovie((source.path,), 9, 0, source, nine)
        for source in (Source(f"data/{i:04d}") for i in range(number))
    )
    columns = tuple(Column(CopyGroup(1, "default"), copy, f"[{copy}]") for copy in range(15))
    counts = tuple(tuple((i + copy) % 10 for copy in range(15)) for i in range(number))
    [space] = report.coverage
    coverage = replace(
        space,
        columns=columns,
        counts=counts,
        expected=(None, *(9,) * (number - 1)),
        wanted=((True,) * 15,) * number,
    )
    return replace(report, movies=movies, coverage=(coverage,))


def test_copies_that_nobody_asked_for_are_no_gaps(browser, cache, small_folder, tmp_path):
    """As of the movies of validation."""
    movies = [Source(str(small_folder(name, seed=seed))) for seed, name in enumerate("ab")]
    copies = Augmentations("flips", copies=2)
    run_warm(plan_warm(cache, movies, FakeBackbone(), augmentations=copies,
                       without_copies=movies[1:]))  # fmt: skip
    file = tmp_path / "asked.html"
    file.write_text(render_page(survey_cache(cache.store)))
    page = browser.new_page()
    page.goto(file.as_uri())
    texts = [row.locator("td.cell").all_inner_texts() for row in rows_of(page).all()]
    assert texts == [["✓", "✓"], ["✓", "-"]]
    expect(page.locator("#shown")).to_have_text("2 of 2 movies, 0 with gaps: 0 records missing")
    page.close()


def test_draws_that_no_command_makes_hide_none_that_one_does(
    browser, cache, small_folder, tmp_path
):
    movie = Movie.open(small_folder())
    cache.movie(movie, None, FakeBackbone()).warm()
    report = survey_cache(cache.store)
    columns = Column(CopyGroup(0), 0, "[]"), Column(CopyGroup(2), 1, "[1]")
    space = replace(report.coverage[0], columns=columns, counts=((5, 0),), wanted=((True, True),))
    file = tmp_path / "draws.html"
    file.write_text(render_page(replace(report, coverage=(space,))))
    page = browser.new_page()
    page.goto(file.as_uri())
    rows_of(page).get_by_role("button").click()
    expect(page.locator("#matrix .command")).to_have_count(1)
    page.close()


def test_many_movies_come_in_parts(browser, cache, small, tmp_path):
    cache.get_or_compute(*small, FakeBackbone())
    file = tmp_path / "many.html"
    file.write_text(render_page(many_movies(survey_cache(cache.store), 1000)))
    page = browser.new_page()
    page.goto(file.as_uri())
    expect(rows_of(page)).to_have_count(300)
    expect(rows_of(page).first.locator("td").last).to_have_text("never seen with masks")
    page.get_by_role("button", name="Show 300 more").click()
    expect(rows_of(page)).to_have_count(600)
    page.get_by_label("Find movies").fill("0999")
    expect(rows_of(page)).to_have_count(1)
    page.close()
