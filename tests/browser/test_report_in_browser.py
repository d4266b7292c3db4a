"""The report of `diff` as readers meet it: mouse, keyboard, screen reader, paper, with and without a script."""

import re

import pytest
from axe_playwright_python.sync_playwright import Axe

KINDS = ("pass", "explained", "fail", "not_compared", "backward")
ROW = "fp32-isolated-layers.1.attn"
FOLDED_ROW = "bf16-isolated-layers.0.attn"  # in a group that passes


def row(page, anchor):
    return page.locator(f'[id="{anchor}"]')


def probes(page, group):
    """The probes a group shows, from top to bottom."""
    texts = page.locator("#rows details").nth(group).locator("tbody tr:not(.why):not([hidden]) th").all_text_contents()
    return [text.strip().removesuffix("#") for text in texts]


def column(page, group, number):
    rows = page.locator("#rows details").nth(group).locator("tbody tr:not(.why)")
    return [float(text) for text in rows.locator(f"td:nth-child({number})").all_text_contents()]


def choice(page, name):
    return page.locator(f"select[name={name}]")


def sort_button(page, group, name):
    return page.locator("#rows details").nth(group).get_by_role("button", name=name, exact=True)


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("kind", KINDS)
def test_no_rule_of_accessibility_is_broken(open_page, kind, scheme):
    page = open_page(kind, color_scheme=scheme, bypass_csp=True)
    page.get_by_role("button", name="Expand all").click()
    found = Axe().run(page)
    assert found.violations_count == 0, found.generate_report()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_of_a_selftest_is_sealed_accessible_and_fits_too(open_page, scheme):
    found = Axe().run(open_page("selftest", color_scheme=scheme, bypass_csp=True))
    assert found.violations_count == 0, found.generate_report()
    page = open_page("selftest", width=320)
    assert page.seen == []
    assert page.locator("script, img").count() == 0
    assert page.evaluate("document.documentElement.scrollWidth") == 320


@pytest.mark.parametrize("script", [True, False], ids=["script", "no script"])
@pytest.mark.parametrize("kind", [*KINDS, "hostile"])
def test_nothing_is_fetched_complained_of_or_blocked(open_page, kind, script):
    page = open_page(kind, java_script_enabled=script)
    page.locator("#glossary").scroll_into_view_if_needed()
    assert page.locator("h1").is_visible()
    assert page.seen == []


def test_the_style_sheet_is_not_blocked(open_page):
    page = open_page("fail")
    assert page.locator(".banner").evaluate("banner => getComputedStyle(banner).borderTopWidth") == "3px"


def test_what_the_policy_does_not_name_is_blocked(open_page):
    page = open_page("fail")
    page.evaluate(
        "() => { const evil = document.createElement('script'); evil.textContent = 'window.evil = 1';"
        " document.body.append(evil); document.body.setAttribute('style', 'color: red');"
        " document.body.append(Object.assign(new Image(), {src: 'https://example.org/x.png'})); }"
    )
    page.wait_for_timeout(100)
    assert page.evaluate("window.evil") is None
    assert {found[1] for words in page.seen if (found := re.match(r"error: violates (\S+)", words))} == {
        "script-src-elem",
        "style-src-attr",
        "img-src",
    }


@pytest.mark.parametrize("script", [True, False], ids=["script", "no script"])
def test_controls_exist_only_where_they_work(open_page, script):
    page = open_page("fail", java_script_enabled=script)
    assert page.locator(".controls").is_visible() == script
    assert page.get_by_role("button").count() == 0 or script
    assert row(page, ROW).is_visible()
    assert page.locator("#rows summary").first.is_visible()


@pytest.mark.parametrize("kind", [*KINDS, "hostile"])
def test_it_fits_a_narrow_window(open_page, kind):
    page = open_page(kind, width=320)
    page.get_by_role("button", name="Expand all").click()
    assert page.evaluate("document.documentElement.scrollWidth") == 320


def test_the_finding_is_seen_without_scrolling(open_page):
    page = open_page("fail")
    for words in ("✗ FAIL", "layers.1.attn", "the masks of full and sliding attention are swapped", "Where to look"):
        place = page.get_by_text(words).first.bounding_box()
        assert place["y"] + place["height"] < 900, words


def test_a_column_sorts_largest_first_then_smallest_then_as_it_was(open_page):
    page = open_page("fail")
    before = probes(page, 1)
    button = sort_button(page, 1, "mean_abs")
    head = button.locator("..")
    button.click()
    values = column(page, 1, 3)
    assert values == sorted(values, reverse=True)
    assert values[0] > values[-1]
    assert head.get_attribute("aria-sort") == "descending"
    button.click()
    assert column(page, 1, 3) == sorted(values)
    assert head.get_attribute("aria-sort") == "ascending"
    sort_button(page, 1, "probe").click()
    assert head.get_attribute("aria-sort") == "none"
    assert probes(page, 1) == sorted(before, key=lambda name: [int(p) if p.isdigit() else p for p in name.split(".")])
    for _ in range(2):
        sort_button(page, 1, "probe").click()
    assert probes(page, 1) == before


def test_what_explains_a_row_stays_below_it_when_sorted(open_page):
    page = open_page("fail")
    sort_button(page, 0, "probe").click()
    assert "the most rounding explains" in row(page, ROW).locator("+ tr.why").text_content()


def test_a_number_that_does_not_exist_sorts_last_either_way(open_page):
    page = open_page("not_compared")
    for _ in range(2):
        sort_button(page, 3, "rel_l2").click()
        assert probes(page, 3)[-1] == "head"


def test_rows_are_filtered_by_text_and_counted(open_page):
    page = open_page("fail")
    count = page.locator("#count")
    assert count.text_content() == "80 of 80 rows"
    page.locator("#filter").fill("1.ATTN")
    assert count.text_content() == "8 of 80 rows"
    assert probes(page, 0) == ["layers.1.attn_norm", "layers.1.attn"]
    assert row(page, "bf16-isolated-layers.1.attn").is_visible(), "its group was folded"
    page.locator("#filter").fill("no such probe")
    assert count.text_content() == "0 of 80 rows"
    assert page.locator("#rows details:visible").count() == 0
    page.get_by_role("button", name="Clear").click()
    assert count.text_content() == "80 of 80 rows"
    assert not row(page, FOLDED_ROW).is_visible(), "folded again"


def test_rows_are_filtered_by_status_dtype_and_mode(open_page):
    page = open_page("fail")
    choice(page, "status").select_option("fail")
    assert page.locator("#count").text_content() == "14 of 80 rows"
    assert probes(page, 0) == ["layers.1.attn"]
    assert page.locator("#rows tr.why:visible").count() == 14
    choice(page, "mode").select_option("end to end")
    assert page.locator("#count").text_content() == "13 of 80 rows"
    choice(page, "dtype").select_option("bf16")
    assert page.locator("#count").text_content() == "0 of 80 rows"
    choice(page, "status").select_option("")
    assert page.locator("#count").text_content() == "20 of 80 rows"


def test_rows_of_gradients_are_filtered_by_loss(open_page):
    page = open_page("backward")
    choice(page, "loss").select_option("head")
    assert page.locator("#count").text_content() == "80 of 160 rows"


@pytest.mark.parametrize("script", [True, False], ids=["script", "no script"])
def test_a_link_leads_to_its_row_and_shows_it(open_page, script):
    page = open_page("fail", fragment=f"#{FOLDED_ROW}", java_script_enabled=script)
    target = row(page, FOLDED_ROW)
    assert target.is_visible()
    assert 0 < target.bounding_box()["y"] < 900
    assert target.evaluate("row => getComputedStyle(row).outlineStyle") == "solid"
    other = row(page, "bf16-isolated-layers.0.mlp")
    assert other.evaluate("row => getComputedStyle(row).outlineStyle") == "none"


def test_a_link_to_a_row_that_is_filtered_out_clears_the_filter(open_page):
    page = open_page("fail")
    page.locator("#filter").fill("logits")
    assert not row(page, ROW).is_visible()
    page.locator("#first a").first.click()
    assert row(page, ROW).is_visible()
    assert page.locator("#filter").input_value() == ""


def test_every_row_offers_its_address(open_page):
    page = open_page("fail")
    link = page.get_by_role("link", name="Link to layers.1.attn", exact=True).first
    link.click()
    assert page.evaluate("location.hash") == f"#{ROW}"
    assert page.locator("#rows tbody th a").count() == 80


@pytest.mark.parametrize("fragment", ["#nothing", "#%E0%A4%A", "#<img src=x onerror=alert(1)>"])
def test_an_address_that_leads_nowhere_does_no_harm(open_page, fragment):
    page = open_page("fail", fragment=fragment)
    assert page.locator("#count").text_content() == "80 of 80 rows"
    assert page.seen == []


def test_the_keyboard_reaches_everything(open_page):
    page = open_page("fail")
    page.keyboard.press("Tab")
    skip = page.get_by_role("link", name="Skip to the verdict")
    assert skip.evaluate("link => link === document.activeElement")
    assert skip.bounding_box()["x"] >= 0, "seen when it has the focus"
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "main"
    passed = []
    while page.evaluate("document.activeElement.id") != "filter":
        page.keyboard.press("Tab")
        passed.append(page.evaluate("document.activeElement.className"))
        assert len(passed) < 200
    assert "copy" in passed
    assert "scroll" in passed, "what scrolls can be reached"


def test_enter_sorts(open_page):
    page = open_page("fail")
    button = sort_button(page, 0, "max_abs")
    button.focus()
    assert button.evaluate("button => getComputedStyle(button).outlineStyle") == "solid"
    page.keyboard.press("Enter")
    assert button.locator("..").get_attribute("aria-sort") == "descending"
    assert probes(page, 0)[0] == "layers.1.attn"


def test_a_slash_leads_to_the_filter_and_is_text_within(open_page):
    page = open_page("fail")
    page.keyboard.press("/")
    assert page.evaluate("document.activeElement.id") == "filter"
    page.keyboard.type("a/b")
    assert page.locator("#filter").input_value() == "a/b"


def test_everything_folds_and_unfolds(open_page):
    page = open_page("fail")
    everything = page.locator("main details").count()
    page.get_by_role("button", name="Expand all").click()
    assert page.locator("main details[open]").count() == everything > 5
    page.get_by_role("button", name="Collapse all").click()
    assert page.locator("main details[open]").count() == 0


def test_the_command_is_copied(open_page):
    page = open_page("fail", permissions=["clipboard-read", "clipboard-write"])
    page.locator("button[data-copies=command]").click()
    page.locator("button.copy", has_text="Copied").first.wait_for()
    assert page.evaluate("navigator.clipboard.readText()") == "modernbert-align diff --dtype bf16"


def test_where_copying_is_refused_the_command_is_selected(open_page):
    page = open_page("fail")
    page.evaluate("() => { navigator.clipboard.writeText = () => Promise.reject(new Error('refused')); }")
    page.locator("button[data-copies=command]").click()
    page.locator("button.copy", has_text="Selected").first.wait_for()
    assert page.evaluate("getSelection().toString()") == "modernbert-align diff --dtype bf16"


@pytest.mark.parametrize("section", ["charts", "map", "steps"])
def test_pointing_at_a_chart_shows_the_numbers_once(open_page, section):
    page = open_page("fail")
    tip = page.locator(".tip")
    assert not tip.is_visible()
    places = page.locator(f"#{section} svg .tips rect")
    assert places.count() > 5
    places.nth(4).hover()
    assert tip.is_visible()
    assert len(tip.text_content()) > 10
    assert page.locator(f"#{section} svg .tips title").count() == 0, "no second box of the browser's own"
    page.mouse.move(5, 5)
    assert not tip.is_visible()


@pytest.mark.parametrize("section", ["charts", "map"])
def test_a_click_in_a_chart_shows_the_rows_of_its_probe(open_page, section):
    page = open_page("fail")
    place = page.locator(f"#{section} svg .tips rect").nth(4)
    place.hover()
    probe = page.locator(".tip").text_content().split("\n")[0]
    place.click()
    assert page.locator("#filter").input_value() == probe
    shown = page.locator("#rows tbody tr:not(.why):visible th")
    assert shown.count() >= 2
    assert all(probe in text for text in shown.all_text_contents())


def test_without_a_script_the_browser_shows_the_numbers(open_page):
    page = open_page("fail", java_script_enabled=False)
    assert "layers.0.attn" in "".join(page.locator("#charts svg .tips title").all_text_contents())


@pytest.mark.parametrize("script", [True, False], ids=["script", "no script"])
def test_paper_shows_what_is_folded_and_no_controls(open_page, script):
    page = open_page("fail", java_script_enabled=script)
    folded = row(page, FOLDED_ROW).locator("td").first
    seen = "cell => cell.checkVisibility({contentVisibilityAuto: true}) && cell.getBoundingClientRect().height > 0"
    assert not folded.evaluate(seen)
    page.emulate_media(media="print")
    assert folded.evaluate(seen)
    assert not page.locator(".controls").is_visible()
    assert not page.locator("nav").is_visible()
    assert not page.locator(".rows tbody a:visible, .rows thead button + a:visible").count()
    head = page.locator(".rows thead th").nth(2)
    assert head.inner_text() == "mean_abs"
    assert head.evaluate("head => getComputedStyle(head).position") == "static", "else sheets after the first lack it"
    assert page.pdf().startswith(b"%PDF")


def test_a_browser_that_does_not_unfold_on_paper_by_itself_is_told_to(open_page):
    page = open_page("fail")
    page.evaluate("window.dispatchEvent(new Event('beforeprint'))")
    assert page.locator("details:not([open])").count() == 0
    page.evaluate("window.dispatchEvent(new Event('afterprint'))")
    assert page.locator("details:not([open])").count() > 0


def test_hostile_names_are_text(open_page):
    page = open_page("hostile")
    page.get_by_role("button", name="Expand all").click()
    page.locator("#filter").fill("<img")
    assert page.locator("#count").text_content() == "1 of 81 rows"
    names = page.evaluate("[...document.querySelectorAll('*')].flatMap(element => element.getAttributeNames())")
    assert not [name for name in names if name.startswith("on") or name == "style"]
    for place in (
        page.locator("#rows tbody tr:visible th").first,
        page.locator("#charts svg").first.locator(".tips rect").last,
    ):
        place.hover()
    page.wait_for_timeout(100)
    assert page.seen == []
    assert page.locator("img").count() == 0
    assert page.locator("script").count() == 1
    assert "alert(1)" in page.locator("h1").text_content()
    assert "alert(1)" in page.locator(".tip").text_content()
    assert "[U+202E]" in page.locator("h1").text_content()
    assert "\u202e" not in page.locator("main").inner_text(), "what runs backwards can look like something else"
