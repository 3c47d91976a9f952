"""The report's page in a real browser, from disk, without a network."""

import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from reporting import (
    HOSTILE,
    hostile_audit,
    large_audit,
    mixed_audit,
    probe_view,
    write_audit,
)

from memlaw.report.page import render
from memlaw.report.sources import read_source
from memlaw.train.snapshots import Snapshots

pytestmark = pytest.mark.slow

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
if not CHROMIUM and not os.environ.get("MEMLAW_CI"):
    pytest.skip(
        "Chromium isn't installed (Debian: apt-get install chromium)", allow_module_level=True
    )
if not os.environ.get("MEMLAW_CI"):
    pytest.importorskip("playwright.sync_api", reason="Playwright isn't installed")
DESK, PHONE = {"width": 1280, "height": 900}, {"width": 390, "height": 844}


@pytest.fixture(scope="module")
def browser():
    """Headless Chromium; where it must be there and isn't, these tests fail."""
    from playwright.sync_api import sync_playwright

    assert CHROMIUM, "MEMLAW_CI is set, but there is no Chromium"
    with sync_playwright() as driver:
        chromium = driver.chromium.launch(
            executable_path=CHROMIUM, args=["--no-sandbox", "--disable-dev-shm-usage"]
        )
        yield chromium
        chromium.close()


@pytest.fixture
def show(browser):
    """`show(path)`: the page, drawn; it must never complain, nor ask for anything."""
    opened = []

    def opens(path: Path, *, viewport=DESK, scheme="light"):
        context = browser.new_context(viewport=viewport, color_scheme=scheme, offline=True)
        page = context.new_page()
        heard: list[str] = []
        page.on("console", lambda message: heard.append(message.text))
        page.on("pageerror", lambda error: heard.append(str(error)))
        page.on("dialog", lambda dialog: heard.append("dialog") or dialog.dismiss())
        page.on(
            "request",
            lambda request: (
                None if request.url.startswith(("file:", "data:")) else heard.append(request.url)
            ),
        )
        page.goto(path.absolute().as_uri())
        page.wait_for_selector("html[data-drawn]")
        opened.append((context, heard))
        return page

    yield opens
    for context, heard in opened:
        context.close()
        assert heard == []


def _page(folder, name, runs=(), probes=()):
    path = folder / f"{name}.html"
    path.write_text(render(list(runs), list(probes), commands=[name]), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """An audit with failures and with snapshots, and a probe with law and plan."""
    folder = tmp_path_factory.mktemp("page")
    view = read_source(write_audit(mixed_audit(), folder / "mixed.json"))
    kept = Snapshots(len(view.recall.tokens))
    for epoch in range(1, 11):
        kept.add(epoch, view.recall.tokens.p * epoch / 10)
    view = replace(view, snapshots=kept)
    return _page(folder, "mixed", [view], [probe_view()])


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """Ten thousand records."""
    folder = tmp_path_factory.mktemp("large")
    return _page(folder, "large", [read_source(write_audit(large_audit(), folder / "l.json"))])


def _recall(page):
    return page.locator("#run0-recall")


def _titles(page):
    """Of the records in sight, from top to bottom."""
    return page.evaluate(
        "[...document.querySelectorAll('#run0-recall .row')]"
        ".sort((a, b) => parseFloat(a.style.top) - parseFloat(b.style.top))"
        ".map(row => row.querySelector('.title').textContent)"
    )


def _set(page, name, value):
    page.locator(f"#run0-recall [data-is={name}]").fill(str(value))


def test_it_draws_and_says_the_verdict_first(mixed, show):
    page = show(mixed)
    assert page.locator("h1").inner_text().strip() == "Not all recited"
    assert page.locator(".chart svg").count() == page.locator(".chart").count() == 7
    assert "of 41 records" in page.locator(".sentence").inner_text()


def test_failures_come_first_and_are_marked(mixed, show):
    page = show(mixed)
    row = _recall(page).locator(".row").first
    assert row.locator(".state").get_attribute("aria-label") == "not over the line or not recited"
    assert row.locator(".t.first.wrong.under").count() == 1
    assert row.locator(".t.behind").count() >= 1
    assert row.locator(".t.behind.end").count() == 1


def test_hover_gives_a_tokens_numbers(mixed, show):
    page = show(mixed)
    _recall(page).locator(".list .t.first").first.hover()
    tip = page.locator("#tip")
    text = tip.inner_text()
    for said in ("p\n", "NLL", "the model says", "margin over the best other", "−1.25 nats"):
        assert said in text
    _recall(page).locator("h2").hover()
    tip.wait_for(state="hidden")


def test_the_line_recolours_and_recounts(mixed, show):
    page = show(mixed)
    count = _recall(page).locator("[data-is=count]")
    recall = read_source(mixed.parent / "mixed.json").recall
    for line in (0.9, 0.02, 0.55):
        _set(page, "line", line)
        page.wait_for_timeout(80)
        under = int((recall.tokens.p < line).sum())
        assert f"{under} of {len(recall.tokens)} tokens are under it" in count.inner_text()
        shown = _recall(page).locator(".list .t.under").count()
        assert (shown > 0) == (under > 0)
    _set(page, "line", 0.9)
    page.wait_for_timeout(300)
    assert _recall(page).locator("[data-is=line-said]").inner_text() == "p ≥ 0.90"


def test_search_filter_and_order(mixed, show):
    page = show(mixed)
    recall = _recall(page)
    search, kind = recall.locator("[data-is=search]"), recall.locator("[data-is=filter]")
    search.fill("PERSON 29,")
    page.wait_for_timeout(80)
    assert [t.split(",")[0] for t in _titles(page)] == ["Person 29"]
    search.fill("no such thing")
    page.wait_for_timeout(80)
    assert "No record is like that" in recall.inner_text()
    search.fill("")
    kind.select_option("unrecited")
    failing = len(_titles(page))
    kind.select_option("failing")
    assert 0 < failing <= len(_titles(page)) < 41
    kind.select_option("passing")
    assert not set(page.locator(".row .state.bad").all_inner_texts())
    kind.select_option("disagree")
    page.wait_for_timeout(50)
    assert "No record is like that" in recall.inner_text()
    kind.select_option("all")
    recall.locator("[data-is=sort]").select_option("file")
    assert [t.split(",")[0] for t in _titles(page)[:3]] == ["Person 0", "Person 1", "Person 2"]
    recall.locator("[data-is=sort]").select_option("longest")
    assert _titles(page)[0] == "Recite the text."
    recall.locator("[data-is=sort]").select_option("p")
    low = [float(t) for t in recall.locator(".row .low").all_inner_texts()]
    assert low == sorted(low)


def test_the_training_slider_goes_back_in_time(mixed, show):
    page = show(mixed)
    recall = _recall(page)
    count = recall.locator("[data-is=count]")
    assert recall.locator("[data-is=epoch-said]").inner_text() == "as saved"
    _set(page, "epoch", 0)
    page.wait_for_timeout(80)
    assert "In epoch 1: 0 of 41 records" in count.inner_text()
    assert recall.locator(".t.first").count() == 1  # the legend's: rivals aren't known back then
    recall.locator("[data-is=play]").click()
    recall.locator("[data-is=epoch-said]:has-text('as saved')").wait_for()
    assert "In epoch" not in count.inner_text()
    assert recall.locator(".t.late").count() > 1


def test_a_row_opens_and_its_tokens_are_walked_by_keys(mixed, show):
    page = show(mixed)
    recall = _recall(page)
    recall.locator("[data-is=search]").fill("recite the text")
    page.wait_for_timeout(80)
    recall.locator(".open").focus()
    page.keyboard.press("Enter")
    detail = recall.locator(".detail")
    assert detail.locator(".t").count() == 261
    assert "Greedy decoding gives:" in detail.inner_text()
    assert page.evaluate("document.activeElement.getAttribute('aria-expanded')") == "true"
    page.keyboard.press("Tab")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    assert page.evaluate("document.activeElement.dataset.at") == page.evaluate(
        "document.querySelectorAll('.detail .t')[2].dataset.at"
    )
    assert "NLL" in page.locator("#tip").inner_text()
    page.keyboard.press("Escape")
    assert page.locator("#tip").is_hidden()
    recall.locator(".open").focus()
    page.keyboard.press("Enter")
    assert recall.locator(".detail").count() == 0


def test_rows_are_walked_by_keys(mixed, show):
    page = show(mixed)
    _recall(page).locator(".open").first.focus()
    for _ in range(30):
        page.keyboard.press("ArrowDown")
    place = "document.activeElement.closest('.row').getAttribute('aria-posinset')"
    assert page.evaluate(place) == "31"
    page.keyboard.press("ArrowUp")
    assert page.evaluate(place) == "30"
    box = page.evaluate("document.activeElement.getBoundingClientRect().top")
    assert 0 < box < 900


def test_of_ten_thousand_records_only_those_in_sight_are_rows(large, show):
    page = show(large)
    assert "10,000 of 10,000 records" in _recall(page).locator("[data-is=count]").inner_text()
    assert _recall(page).locator(".row").count() < 60
    most = page.evaluate(  # rows are made as they come into sight, and taken away again
        """async () => {
          const list = document.querySelector('.list');
          let most = 0;
          for (let i = 1; i <= 40; i++) {
            list.scrollTop = list.scrollHeight * i / 40;
            await new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)));
            most = Math.max(most, list.querySelectorAll('.row').length);
          }
          return most;
        }"""
    )
    assert 0 < most < 60
    assert page.locator(".row[aria-posinset='10000']").count() == 1
    assert _recall(page).locator(".row").count() < 60
    _recall(page).locator("[data-is=search]").fill("person 9876:")
    page.wait_for_timeout(50)
    assert _titles(page) == ["Person 9876:"]
    _set(page, "line", 0.8)
    page.wait_for_timeout(100)
    assert "0 of 10,000" not in _recall(page).locator("[data-is=count]").inner_text()


def test_hostile_records_run_nothing_and_show_as_text(tmp_path, show):
    source = write_audit(hostile_audit(), tmp_path / "h<script>window.hacked=9<b>.json")
    page = show(_page(tmp_path, "hostile", [read_source(source)]))
    _recall(page).locator("[data-is=sort]").select_option("file")
    assert [t.strip() for t in _titles(page)] == [t.strip() for t in HOSTILE]
    for i in range(len(HOSTILE)):
        _recall(page).locator(".row .open").nth(i).click()
        _recall(page).locator(".detail .t").first.hover()
    assert page.evaluate("window.hacked") is None
    assert page.locator(".recall img, .recall svg[onload], .recall b").count() == 0
    assert page.locator("main script:not([type='application/json'])").count() == 0
    assert "<b>bfloat16</b>" in page.locator("main").inner_text()


def test_the_policy_stops_what_would_get_in(mixed, browser):
    """Even a hole in the escaping would not run a script, nor fetch anything."""
    context = browser.new_context(offline=True)
    page = context.new_page()
    page.goto(mixed.as_uri())
    page.evaluate(
        """() => {
          const script = document.createElement('script');
          script.textContent = 'window.hacked = 1';
          document.body.append(script);
          const image = document.createElement('div');
          image.innerHTML = '<img src=x onerror="window.hacked = 2">';
          document.body.append(image);
        }"""
    )
    page.wait_for_timeout(100)
    assert page.evaluate("window.hacked") is None
    refused = page.evaluate("fetch('https://example.com').catch(() => 'refused')")
    assert refused == "refused"
    context.close()


def test_the_plan_is_computed_in_the_page(mixed, show):
    page = show(mixed)
    plan = page.locator("#probe0-plan")
    view = probe_view().plan
    for tokens, confidence in ((64, 0.9), (256, 0.5), (300, 0.99), (32, 0.2)):
        plan.locator("[data-is=tokens]").fill(str(tokens))
        plan.locator("[data-is=confidence]").fill(str(confidence))
        rank = int(plan.locator("[data-is=rank]").inner_text())
        assert rank == view.rank(tokens, confidence)
        assert plan.locator("[data-is=parameters]").inner_text() == f"{1152 * rank:,}"
        assert plan.locator("[data-is=megabytes]").inner_text() == f"{1152 * rank * 4 / 1e6:.3f} MB"
        said = float(plan.locator("[data-is=chance]").inner_text().split()[-1])
        assert abs(said - view.probability(rank, tokens)) < 6e-4
        beyond = tokens > 256 or rank > 12
        assert plan.locator("[data-is=warning]").is_visible() == beyond
    plan.locator("[data-is=tokens]").fill("")
    assert "at least one token" in plan.locator("[data-is=warning]").inner_text()


@pytest.mark.parametrize(("viewport", "scheme"), [(DESK, "light"), (PHONE, "dark")])
def test_no_accessibility_rule_of_level_a_or_aa_is_broken(mixed, show, scheme, viewport):
    import axe_playwright_python

    page = show(mixed, viewport=viewport, scheme=scheme)
    _recall(page).locator(".open").first.click()
    page.locator("details").first.evaluate("element => { element.open = true; }")
    axe = Path(axe_playwright_python.__file__).parent / "axe.min.js"
    page.evaluate(axe.read_text(encoding="utf-8"))
    found = page.evaluate(
        "axe.run({runOnly: ['wcag2a', 'wcag2aa', 'wcag21a', 'wcag21aa', 'wcag22aa']})"
    )
    assert len(found["passes"]) > 15
    assert [(v["id"], [n["html"][:200] for n in v["nodes"][:5]]) for v in found["violations"]] == []


@pytest.mark.parametrize("width", [320, 390, 768, 1280])
def test_nothing_is_wider_than_the_screen(mixed, show, width):
    page = show(mixed, viewport={"width": width, "height": 800})
    assert page.evaluate("document.documentElement.scrollWidth") <= width


def test_it_prints_all_records(mixed, show):
    page = show(mixed)
    page.evaluate("window.dispatchEvent(new Event('beforeprint'))")
    page.emulate_media(media="print")
    assert _recall(page).locator(".row").count() == 41
    rows = "[...document.querySelectorAll('.row')]"
    bottom = page.evaluate(f"Math.max(...{rows}.map(r => r.getBoundingClientRect().bottom))")
    law = page.evaluate("document.querySelector('#probe0-law').getBoundingClientRect().top")
    assert bottom <= law
    assert page.locator(".top").is_hidden()


def test_a_charts_points_tell_their_numbers(mixed, show):
    page = show(mixed)
    chart = page.locator("#chart-probe0-recall_heatmap svg")
    chart.scroll_into_view_if_needed()
    box = chart.bounding_box()
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 3)
    tip = page.locator("#vg-tooltip-element.visible")
    tip.wait_for()
    assert "recall" in tip.inner_text()


def test_charts_follow_the_colour_scheme(mixed, show):
    page = show(mixed)
    page.emulate_media(color_scheme="dark")
    page.wait_for_timeout(500)
    axis = page.locator("#chart-run0-probability svg text").first
    assert axis.get_attribute("fill") == "currentColor"
