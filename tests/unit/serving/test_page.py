"""The web page in a real browser, on a real server: text before a text, mistakes, keys, keyboard, themes, narrow windows."""

import itertools
import signal
from pathlib import Path

import pytest

from tests.support.browser import CTRL, END, ENTER, ESCAPE, HOME, MISSING, RIGHT, TAB, Page
from tests.support.served import Served, serving

pytestmark = pytest.mark.skipif(bool(MISSING), reason=MISSING)
FOLLOWING = " is the capital of France."
PROMPT = "The capital of France is"
ANSWERS = [" Paris.\nIt is café.", " Berlin."]
HTML = "<img src=x onerror=alert(1)><b>bold</b> &amp; </textarea><script>alert(2)</script>"


def test_streamed_text_grows_at_its_front(page: Page, served: Served) -> None:
    page.open(served.url)
    page.run(
        "window.seen = [[], []]; new MutationObserver(() => document.querySelectorAll('.written').forEach("
        "(e, i) => window.seen[i].push(e.textContent))).observe(document.getElementById('alternatives'),"
        " {subtree: true, childList: true, characterData: true})"
    )
    options = {"n": 2, "max_tokens": 24, "seed": 5, "temperature": 1, "top_p": 0.9}
    page.write(**options)
    page.until(lambda: page.is_idle("write") and page.all(".alternative"))
    written = [page.text(f".alternative:nth-child({number}) .written") for number in (1, 2)]
    expected = served.post("/v1/completions", {"model": "reverse", "suffix": FOLLOWING, **options}).json()["choices"]
    assert written == [choice["text"] for choice in expected]
    for snapshots in page.run("return window.seen"):
        assert len(set(snapshots)) > 2
        assert all(later.endswith(earlier) for earlier, later in itertools.pairwise(snapshots))
    assert page.text(".given") == FOLLOWING
    assert page.one(".text").get_attribute("aria-busy") == "false"
    page.click(".alternative .actions button:last-child")
    assert page.one("#suffix").get_attribute("value") == written[0] + FOLLOWING


def test_stop_ends_the_text_and_frees_the_server(page: Page, served: Served) -> None:
    page.open(served.url)
    page.write(max_tokens=450, n=1)
    page.until(lambda: page.all(".written") and page.text(".written"))
    page.press(ESCAPE)
    page.until(lambda: page.is_idle("write"))
    assert page.text(".state") == "stopped"
    assert page.text(".written")
    assert page.problems() == []
    page.until(lambda: served.metric("ledom_waiting_requests") == 0)
    page.write(max_tokens=2, n=1)
    page.until(lambda: page.is_idle("write") and page.text(".state") != "writing")
    assert page.problems() == []


def test_a_wrong_value_is_explained_at_its_field_by_the_server(page: Page, served: Served) -> None:
    page.open(served.url)
    for name, value, expected in [("temperature", 5, "less than or equal to 2"), ("n", 0, "greater than or equal to 1")]:
        page.write(**{name: value})
        page.until(lambda: page.problems() and page.is_idle("write"))
        assert expected in page.problem_of(f"#write-form [name={name}]")
        assert len(page.problems()) == 1
        page.fill(f"#write-form [name={name}]", "1")
    page.write(max_tokens=1.5)
    assert "whole number" in page.problem_of("#write-max")
    page.fill("#write-max", "100000")
    page.press(CTRL, ENTER)
    page.until(lambda: any("positions" in text for text in page.problems()))
    page.fill("#suffix", "")
    page.press(CTRL, ENTER)
    assert "at least one character" in page.problem_of("#suffix")
    assert page.all(".alternative") == []


def test_html_in_texts_stays_text(page: Page, served: Served) -> None:
    page.open(served.url)
    page.write(suffix=HTML, max_tokens=2, n=1)
    page.until(lambda: page.is_idle("write") and page.all(".given"))
    assert page.text(".given") == HTML
    page.open(served.url, "rank")
    page.score(HTML, [HTML, " b"])
    assert HTML in page.text("#ranked")
    page.open(served.url, "compare")
    page.fill("#compared", HTML)
    page.press(CTRL, ENTER)
    page.until(lambda: page.one("#comparison").is_displayed())
    assert page.text("#compared-strip .strip") == HTML
    assert page.run("return document.querySelectorAll('main img, main b, main script').length") == 0


def test_a_wrong_key_is_refused_at_the_field_of_the_key(page: Page, lone: Served) -> None:
    page.open(lone.url)
    assert "needs an API key, found none" in page.text("#models")
    page.write(max_tokens=2, n=1)
    page.until(lambda: page.all("#key-value[aria-invalid]"))
    page.fill("#key-value", "wrong")
    page.press(ENTER)
    page.until(lambda: "found a wrong one" in page.text("#models"))
    assert "found a wrong one" in page.problem_of("#key-value")
    page.fill("#key-value", "right key")
    page.press(ENTER)
    page.until(lambda: "reverse" in page.text("#models"))
    page.write(max_tokens=2, n=1)
    page.until(lambda: page.is_idle("write") and page.all(".state") and page.text(".state") != "writing")
    assert page.problems() == []
    assert page.run("return [localStorage.length, document.cookie]") == [0, ""]
    page.driver.refresh()
    page.until(lambda: page.text("#models").startswith("reverse"))


def test_a_server_that_is_gone_is_named_and_the_text_stays(page: Page, folders: tuple[Path, Path]) -> None:
    with serving("--reverse", folders[1]) as server:
        page.open(server.url)
        page.write(max_tokens=450, n=1)
        page.until(lambda: page.all(".written") and page.text(".written"))
        server.end(signal.SIGKILL)
        page.until(lambda: page.is_idle("write"))
        assert page.text(".state") == "broken off"
        assert page.text(".written")
        assert "Is it still running?" in page.problems()[0]
        page.write(max_tokens=2, n=1)
        page.until(lambda: "does not answer" in " ".join(page.problems()))
        for tab, field in (("rank", "#prompt"), ("compare", "#compared")):
            page.click(f"#tab-{tab}")
            page.fill(field, "text")
            for candidate in page.all("#candidates textarea"):
                if tab == "rank":
                    candidate.send_keys("a")
            page.one(field).send_keys(CTRL, ENTER)
            if tab == "rank":
                page.until(lambda: "does not answer" in " ".join(page.problems()))
    page.complaints()


def test_every_tool_is_reached_with_the_keyboard_alone(page: Page, served: Served) -> None:
    page.open(served.url)
    focused = "const e = document.activeElement; return e.id || e.tagName"
    seen = []
    for _ in range(12):
        page.press(TAB)
        seen.append(page.run(focused))
    assert {"theme", "tab-write", "suffix", "write-n", "write-seed"} <= set(seen)
    assert "tab-rank" not in seen  # arrow keys move between the tabs
    page.run("document.getElementById('tab-write').focus()")
    for key, expected in (
        (RIGHT, "rank"),
        (RIGHT, "compare"),
        (RIGHT, "write"),
        (END, "compare"),
        (HOME, "write"),
        (RIGHT, "rank"),
    ):
        page.press(key)
        assert page.run(focused) == f"tab-{expected}"
        assert page.one(f"#{expected}").is_displayed()
        assert page.one(f"#tab-{expected}").get_attribute("aria-selected") == "true"
    page.press(TAB)
    assert page.run(focused) == "prompt"
    outline = page.run("return getComputedStyle(document.activeElement).outlineStyle")
    assert outline == "solid"


def test_every_control_has_a_name(page: Page, served: Served) -> None:
    page.open(served.url, "rank")
    page.score(PROMPT, ANSWERS)
    nameless = page.run(
        "return [...document.querySelectorAll('input, textarea, select, button')].filter((e) => !e.labels?.length &&"
        " !e.getAttribute('aria-label') && !(e.tagName === 'BUTTON' && e.textContent.trim())).map((e) => e.outerHTML)"
    )
    assert nameless == []
    assert page.run("return new Set([...document.querySelectorAll('[id]')].map((e) => e.id)).size") == len(page.all("[id]"))


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_both_themes_are_legible(page: Page, served: Served, theme: str) -> None:
    features = [{"name": "prefers-color-scheme", "value": theme}]
    page.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    page.open(served.url, "rank")
    page.score(PROMPT, ANSWERS)
    page.until(lambda: page.all(".shade"))
    for switch in ("", "light", "dark"):
        page.run(
            "const t = document.getElementById('theme'); t.value = arguments[0]; t.dispatchEvent(new Event('change'))", switch
        )
        is_dark = (switch or theme) == "dark"
        paper = luminance(page, "body", "backgroundColor")
        assert paper < 0.05 if is_dark else paper > 0.9
        for selector in ("body", ".hint", "button.primary", ".reward", "summary", "[role=tab][aria-selected=false]"):
            ink = luminance(page, selector, "color")
            ground = luminance(page, selector, "backgroundColor") if selector == "button.primary" else paper
            light, dark = max(ink, ground), min(ink, ground)
            assert (light + 0.05) / (dark + 0.05) >= 4.5, (selector, switch, theme)
        for name in ("--low", "--high", "--forward", "--reverse"):
            page.run("document.querySelector('.piece').style.background = `var(${arguments[0]})`", name)
            ink, ground = (luminance(page, ".piece", name) for name in ("color", "backgroundColor"))
            assert (max(ink, ground) + 0.05) / (min(ink, ground) + 0.05) >= 4.5, (name, switch, theme)
    page.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


def luminance(page: Page, selector: str, name: str) -> float:
    """Return the relative luminance of a colour of an element, as WCAG defines it."""
    script = (
        "const c = document.createElement('canvas').getContext('2d'); c.fillStyle ="
        " getComputedStyle(document.querySelector(arguments[0]))[arguments[1]]; c.fillRect(0, 0, 1, 1);"
        "return [...c.getImageData(0, 0, 1, 1).data].slice(0, 3)"
    )
    red, green, blue = (
        value / 255 / 12.92 if value / 255 <= 0.04045 else ((value / 255 + 0.055) / 1.055) ** 2.4
        for value in page.run(script, selector, name)
    )
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def test_a_narrow_window_never_scrolls_sideways(page: Page, served: Served, lone: Served) -> None:
    size = {"width": 375, "height": 800, "deviceScaleFactor": 1, "mobile": True}
    page.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    try:
        page.open(served.url)
        page.write(suffix="a" * 300, max_tokens=8, n=2)
        page.until(lambda: page.is_idle("write") and page.all(".alternative"))
        page.click("#tab-rank")
        page.score("x" * 200, ["y" * 200, " b"])
        page.until(lambda: page.all(".shade"))
        for summary in page.all("#rank summary"):
            summary.click()
        page.click("#tab-compare")
        page.fill("#compared", "z" * 200)
        page.press(CTRL, ENTER)
        page.until(lambda: page.one("#comparison").is_displayed())
        for tab in ("write", "rank", "compare"):
            page.click(f"#tab-{tab}")
            assert page.run("return document.documentElement.scrollWidth") == 375, tab
        page.open(lone.url)
        page.until(lambda: page.one("#key-value").is_displayed())
        place = page.one("#key-form").rect
        assert 0 <= place["x"] <= place["x"] + place["width"] <= 375
    finally:
        page.driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
