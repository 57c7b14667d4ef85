"""The web page in a real browser, on a real server."""

import itertools
import math
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from megatron_ledom.inference.engines.engine import StepDelimiter
from megatron_ledom.reports.explanation import steps_of
from tests.support.browser import MISSING, Page, chromium
from tests.support.served import Served, serving

pytestmark = pytest.mark.skipif(bool(MISSING), reason=MISSING)
CTRL, ENTER, ESCAPE, TAB = "\ue009", "\ue007", "\ue00c", "\ue004"
RIGHT, LEFT, HOME, END = "\ue014", "\ue012", "\ue011", "\ue010"
FOLLOWING = " is the capital of France."
PROMPT = "The capital of France is"
ANSWERS = [" Paris.\nIt is café.", " Berlin.", " the cat 漢字 and the dog.\n\nThe end.\n"]
HTML = "<img src=x onerror=alert(1)><b>bold</b> &amp; </textarea><script>alert(2)</script>"
NORMALIZATIONS = ("none", "token", "byte")


@pytest.fixture(scope="module")
def browser() -> Iterator[Page]:
    """One browser for the tests of this file."""
    with chromium() as page:
        yield page


@pytest.fixture
def page(browser: Page) -> Iterator[Page]:
    """The browser; a violation of the content policy or an error in a module fails the test."""
    browser.complaints()
    yield browser
    assert browser.complaints() == []


@pytest.fixture(scope="module")
def lone(folders: tuple[Path, Path]) -> Iterator[Served]:
    """A server with a key and without a forward model."""
    with serving("--reverse", folders[1], LEDOM_API_KEY="right key") as server:
        yield server


def write(page: Page, **options: object) -> None:
    """Fill the form of `Write before` and start it with the keyboard."""
    page.fill("#suffix", str(options.pop("suffix", FOLLOWING)))
    for name, value in options.items():
        page.fill(f"#write-form [name={name}]", str(value))
    page.one("#suffix").send_keys(CTRL, ENTER)


def is_idle(page: Page, panel: str) -> bool:
    """Return True if no request of a panel runs."""
    return not page.one(f"#{panel}-stop").is_enabled()


def score(page: Page, prompt: str, answers: list[str]) -> None:
    """Type a prompt, joined to candidates as it is, and candidates; rank them and wait for the shading of the best one."""
    page.run("document.getElementById('separator').value = ''")
    page.fill("#prompt", prompt)
    page.click("#clear-candidates")
    for _ in answers[2:]:
        page.click("#add-candidate")
    for field, answer in zip(page.all("#candidates textarea"), answers, strict=True):
        field.send_keys(answer)
    page.one("#prompt").send_keys(CTRL, ENTER)
    page.until(lambda: is_idle(page, "rank"))


def order_of(page: Page) -> list[int]:
    """Return the positions of the candidates in the table."""
    return [int(row.get_attribute("data-position")) for row in page.all("#ranked tbody tr")]


def cells(page: Page, column: int) -> list[str]:
    """Return a column of the table."""
    return [row.text for row in page.all(f"#ranked tbody tr > :nth-child({column})")]


def reward(server: Served, **settings: Any) -> dict[str, Any]:
    """Return the server's response for the candidates of this file."""
    body = {"prompt": PROMPT, "candidates": ANSWERS, **settings}
    return dict(server.post("/v1/reward", body).raise_for_status().json())


def test_streamed_text_grows_at_its_front(page: Page, served: Served) -> None:
    page.open(served.url)
    page.run(
        "window.seen = [[], []]; new MutationObserver(() => document.querySelectorAll('.written').forEach("
        "(e, i) => window.seen[i].push(e.textContent))).observe(document.getElementById('alternatives'),"
        " {subtree: true, childList: true, characterData: true})"
    )
    options = {"n": 2, "max_tokens": 24, "seed": 5, "temperature": 1, "top_p": 0.9}
    write(page, **options)
    page.until(lambda: is_idle(page, "write") and page.all(".alternative"))
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
    write(page, max_tokens=450, n=1)
    page.until(lambda: page.all(".written") and page.text(".written"))
    page.press(ESCAPE)
    page.until(lambda: is_idle(page, "write"))
    assert page.text(".state") == "stopped"
    assert page.text(".written")
    assert page.problems() == []
    page.until(lambda: served.metric("ledom_waiting_requests") == 0)
    write(page, max_tokens=2, n=1)
    page.until(lambda: is_idle(page, "write") and page.text(".state") != "writing")
    assert page.problems() == []


def test_a_wrong_value_is_explained_at_its_field_by_the_server(page: Page, served: Served) -> None:
    page.open(served.url)
    for name, value, expected in [("temperature", 5, "less than or equal to 2"), ("n", 0, "greater than or equal to 1")]:
        write(page, **{name: value})
        page.until(lambda: page.problems() and is_idle(page, "write"))
        assert expected in page.problem_of(f"#write-form [name={name}]")
        assert len(page.problems()) == 1
        page.fill(f"#write-form [name={name}]", "1")
    write(page, max_tokens=1.5)
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
    write(page, suffix=HTML, max_tokens=2, n=1)
    page.until(lambda: is_idle(page, "write") and page.all(".given"))
    assert page.text(".given") == HTML
    page.open(served.url, "rank")
    score(page, HTML, [HTML, " b"])
    assert HTML in page.text("#ranked")
    page.open(served.url, "compare")
    page.fill("#compared", HTML)
    page.press(CTRL, ENTER)
    page.until(lambda: page.one("#comparison").is_displayed())
    assert page.text("#compared-strip .strip") == HTML
    assert page.run("return document.querySelectorAll('main img, main b, main script').length") == 0


def test_the_slider_ranks_as_the_server_without_a_call(page: Page, served: Served) -> None:
    page.open(served.url, "rank")
    score(page, PROMPT, ANSWERS)
    page.until(lambda: page.all(".shade"))
    calls = "return performance.getEntriesByType('resource').length"
    before, orders = page.run(calls), set()
    for weight in (0, 0.25, 0.5, 0.83, 1):
        page.slide(weight)
        expected = reward(served, weight=weight)
        assert order_of(page) == expected["order"]
        ranked = [expected["rewards"][position] for position in expected["order"]]
        assert [float(cell.replace("−", "-")) for cell in cells(page, 3)] == pytest.approx(ranked, abs=6e-4)
        assert page.text("#weight-value") == f"{weight:.2f}"
        orders.add(tuple(expected["order"]))
    assert page.run(calls) == before
    assert len(orders) > 1, "every weight gives the same order, so the slider is not tested"


def test_the_reward_of_the_page_equals_the_servers(page: Page, served: Served) -> None:
    page.open(served.url, "rank")
    given = [*ANSWERS, "", {"text": " Rome.", "forward_logprob": -3.25, "forward_tokens": 4}]
    texts = [one if isinstance(one, str) else one["text"] for one in given]
    for forward, reverse, mu in itertools.product(NORMALIZATIONS, NORMALIZATIONS, (0, -0.3)):
        for weight, temperature in ((0, 1), (0.37, 1), (0.5, 0.7), (1, 1)):
            settings = {
                "weight": weight,
                "temperature": temperature,
                "language_model_weight": mu,
                "forward_normalization": forward,
                "reverse_normalization": reverse,
            }
            answer = reward(served, candidates=given, **settings)
            script = "const r = a[0].results.map((one, i) => m.rewardOf(m.scoresOf(one), a[1], a[2][i], a[3]));"
            found = page.module("reward.js", f"{script} return [r, m.rank(r)]", answer, PROMPT, texts, settings)
            for own, servers in zip(found[0], answer["rewards"], strict=True):
                assert own == (servers if servers is None else pytest.approx(servers, rel=1e-9))
            assert found[1] == answer["order"]


def test_impossible_answers_rank_as_in_python(page: Page, served: Served) -> None:
    page.open(served.url, "rank")
    result = {"forward_logprob": None, "reverse_logprob": -2.0, "forward_tokens": 1, "reverse_tokens": 1}
    impossible = {**result, "minus_infinity": ["forward_logprob"]}
    script = "const f = (one, w) => m.rewardOf(m.scoresOf(one), 'x', 'y', {weight: w});"
    found = page.module(
        "reward.js",
        f"{script} return [f(a[0], 0.5) === -Infinity, f(a[0], 1), f(a[1], 0.5), f(a[1], 1),"
        " m.rank([null, -Infinity, -3, null, -1, -1])]",
        impossible,
        result,
    )
    assert found == [True, -2.0, None, -2.0, [4, 5, 2, 1, 0, 3]]


def test_options_rank_again_and_say_what_needs_a_new_score(page: Page, served: Served) -> None:
    page.open(served.url, "rank")
    score(page, PROMPT, ANSWERS)
    page.click("#reward-options summary")
    page.run("const s = document.getElementById('forward-normalization'); s.value = 'token';"
             "s.dispatchEvent(new Event('input', {bubbles: true}))")  # fmt: skip
    assert order_of(page) == reward(served, forward_normalization="token")["order"]
    page.fill("#language-model-weight", "-0.5")
    assert "press Score again" in page.text("#ranking-problem")
    page.one("#prompt").send_keys(CTRL, ENTER)
    page.until(lambda: is_idle(page, "rank") and not page.one("#ranking-problem").is_displayed())
    settings = {"forward_normalization": "token", "language_model_weight": -0.5}
    assert order_of(page) == reward(served, **settings)["order"]
    page.click("#include-ends")
    assert "press Score again" in page.text("#ranking-problem")
    page.fill("#reward-temperature", "-1")
    page.one("#prompt").send_keys(CTRL, ENTER)
    page.until(lambda: page.all("#reward-temperature[aria-invalid]"))
    assert "greater than 0" in page.problem_of("#reward-temperature")


def test_tokens_and_steps_are_shaded_by_their_values(page: Page, served: Served) -> None:
    page.open(served.url, "rank")
    score(page, PROMPT, ANSWERS)
    for position in range(len(ANSWERS)):
        if not page.all(f"[data-shaded='{position}']"):
            page.click(f"[data-shade='{position}']")
            page.until(lambda position=position: page.all(f"[data-shaded='{position}']"))
    assert [int(one.get_attribute("data-shaded")) for one in page.all(".shade")] == order_of(page)
    results, values = reward(served, token_values=True)["results"], []
    for position, answer in enumerate(ANSWERS):
        own = f"[data-shaded='{position}']"
        strips = [page.run("return arguments[0].textContent", one).replace("↵", "") for one in page.all(f"{own} .strip")]
        assert strips == [PROMPT, answer]
        steps = steps_of(answer, StepDelimiter())
        shown = [page.run("return arguments[0].textContent", one).replace("↵", "") for one in page.all(f"{own} li .piece")]
        assert shown == [step.rstrip("\n") for step in steps]
        cells = [float(one.text.replace("−", "-")) for one in page.all(f"{own} .value")]
        assert cells[-1] == pytest.approx(results[position]["reverse_logprob"], abs=6e-3)
        values += [(value, fraction(page, one)) for value, one in zip(cells, page.all(f"{own} li .piece"), strict=True)]
    low, high = min(values)[0], max(values)[0]
    assert high > low
    assert [shade for _, shade in values] == pytest.approx([(v - low) / (high - low) for v, _ in values], abs=0.02)
    first = page.one("[data-shaded='1'] .strip .piece")
    expected = results[1]["reverse_token_logprobs"][0]
    assert fraction(page, first) == pytest.approx(min(1, max(0, 1 + expected / 10)), abs=1e-3)


def fraction(page: Page, piece: Any) -> float:
    """Return the place of a piece's colour between the coldest and the warmest one."""
    return float(page.run("return getComputedStyle(arguments[0]).getPropertyValue('--fraction')", piece))


def test_values_are_read_with_the_arrow_keys(page: Page, served: Served) -> None:
    page.open(served.url, "rank")
    score(page, PROMPT, ANSWERS)
    page.until(lambda: page.all(".shade"))
    page.run("document.querySelector('.strip').focus()")
    for key, expected in ((HOME, 0), (RIGHT, 1), (RIGHT, 2), (LEFT, 1)):
        page.press(key)
        pieces = page.all(".shade .strip")[0].find_elements("css selector", ".piece")
        assert "current" in pieces[expected].get_attribute("class")
    assert "log P_R −" in page.text(".readout")


@pytest.mark.parametrize("pattern", ["\n", r"[.!?]\s", "\n\n"])
def test_steps_are_cut_as_in_the_search(page: Page, served: Served, pattern: str) -> None:
    page.open(served.url, "rank")
    texts = ["", "a", "a\n", "\n\na\nb", "a.\n\n b! c?\td\n \n", " \x1c\n", "\ufeff\n漢字. 🙂\n", "a\u0085\n\nb\n", "\n"]
    found = page.module("steps.js", "return a[0].map((text) => m.stepsOf(text, m.delimiterOf(a[1])))", texts, pattern)
    assert found == [steps_of(text, StepDelimiter(pattern)) for text in texts]


def test_another_delimiter_cuts_again_and_a_wrong_one_is_explained(page: Page, served: Served) -> None:
    page.open(served.url, "rank")
    score(page, PROMPT, [" One. Two. Three.", " One."])
    page.until(lambda: page.all(".shade"))
    if not page.all("[data-shaded='0']"):
        page.click("[data-shade='0']")
    page.until(lambda: page.all("[data-shaded='0']"))
    for pattern, expected in (("[", "regular expression"), ("x*", "empty text")):
        page.fill("#delimiter", pattern)
        page.press(TAB)
        assert expected in page.until(lambda: page.all("#delimiter[aria-invalid]") and page.problem_of("#delimiter"))
    page.fill("#delimiter", r"\.")
    page.press(TAB)
    page.until(lambda: len(page.all("[data-shaded='0'] li")) == 3)
    assert page.problems() == []


def test_json_lines_are_loaded_and_wrong_ones_explained(page: Page, served: Served) -> None:
    page.open(served.url, "rank")
    page.click("#paste summary")
    wrong = {
        "": "no line",
        '{"prompt": "a"}': 'Line 1: a candidate must be a text, or an object with "text"',
        '"a"\n{': "Line 2 is not JSON",
        '{"prompt": 5, "candidates": ["a"]}': "Line 1: expected a text",
        '{"prompt": "x", "candidates": ["a"]}\n"b"': "paste one kind",
    }
    for lines, expected in wrong.items():
        page.run("document.getElementById('lines').value = arguments[0]", lines)
        page.click("#load-lines")
        assert expected in page.problem_of("#lines")
    known = '{"text": " Paris.", "forward_logprob": -1.5, "forward_tokens": 2}'
    lines = f'{{"prompt": "Q", "candidates": [" A", {known}]}}\n\n{{"prompt": "Second", "candidates": ["b"], "gold": 1}}'
    page.run("document.getElementById('lines').value = arguments[0]", lines)
    page.click("#load-lines")
    assert page.problems() == []
    assert [field.get_attribute("value") for field in page.all("#candidates textarea")] == [" A", " Paris."]
    assert "given: −1.500" in page.text("#candidates")
    page.one("#prompt").send_keys(CTRL, ENTER)
    page.until(lambda: is_idle(page, "rank") and page.all("#ranked tbody tr"))
    assert "−1.500" in cells(page, 4)
    page.one("#question").send_keys("2")
    page.until(lambda: page.one("#prompt").get_attribute("value") == "Second")


def test_the_forward_model_samples_candidates(page: Page, served: Served) -> None:
    page.open(served.url, "rank")
    page.fill("#prompt", PROMPT)
    page.click("#sample summary")
    for name, value in (("n", 3), ("max_tokens", 5), ("seed", 4)):
        page.fill(f"#sample [name={name}]", str(value))
    page.click("#sample-run")
    page.until(lambda: len(page.all("#candidates textarea")) == 3)
    body = {"prompt": PROMPT + "\n", "n": 3, "max_tokens": 5, "seed": 4}
    expected = [choice["text"] for choice in served.post("/v1/completions", body).json()["choices"]]
    values = page.run("return [...document.querySelectorAll('#candidates textarea')].map((field) => field.value)")
    assert values == [text.replace("\r\n", "\n").replace("\r", "\n") for text in expected]
    page.fill("#sample [name=top_p]", "0")
    page.click("#sample-run")
    assert "greater than 0" in page.until(lambda: page.all("#sample-top-p[aria-invalid]") and page.problem_of("#sample-top-p"))


def test_compare_shows_both_models_token_by_token(page: Page, served: Served) -> None:
    page.open(served.url, "compare")
    text = "The cat sat on\nthe café 漢字 mat."
    page.fill("#compared", text)
    page.press(CTRL, ENTER)
    page.until(lambda: page.one("#comparison").is_displayed())
    assert page.text("#compared-strip .strip").replace("↵", "") == text
    pairs = [{"preceding": "", "following": text}, {"preceding": text, "following": ""}]
    data = served.post("/v1/score", {"pairs": pairs}).json()["data"]
    forward, reverse = data[0]["forward"], data[1]["reverse"]
    totals = [float(cell.text.replace("−", "-")) for cell in page.all("#totals td:nth-child(2)")]
    assert totals == pytest.approx([forward["logprob"], reverse["logprob"]], abs=6e-4)
    script = "const f = m.piecesOf(a[0], a[1]), r = m.piecesOf(a[0], a[2]); return m.commonPieces(a[0], f, r)"
    pieces = page.module("shading.js", script, text, forward, reverse)
    assert "".join(piece["text"] for piece in pieces) == text
    assert len(pieces) > 8
    for name, found in (("forward", forward), ("reverse", reverse)):
        assert math.fsum(piece[name] for piece in pieces) == pytest.approx(found["logprob"], rel=1e-9)
    page.one("#view").send_keys("log P of the f")
    assert page.all("#compared-strip .piece.warm")
    assert len(page.all("#differences tbody tr")) == 10


def test_a_wrong_key_is_refused_at_the_field_of_the_key(page: Page, lone: Served) -> None:
    page.open(lone.url)
    assert "needs an API key, found none" in page.text("#models")
    write(page, max_tokens=2, n=1)
    page.until(lambda: page.all("#key-value[aria-invalid]"))
    page.fill("#key-value", "wrong")
    page.press(ENTER)
    page.until(lambda: "found a wrong one" in page.text("#models"))
    assert "found a wrong one" in page.problem_of("#key-value")
    page.fill("#key-value", "right key")
    page.press(ENTER)
    page.until(lambda: "reverse" in page.text("#models"))
    write(page, max_tokens=2, n=1)
    page.until(lambda: is_idle(page, "write") and page.all(".state") and page.text(".state") != "writing")
    assert page.problems() == []
    assert page.run("return [localStorage.length, document.cookie]") == [0, ""]
    page.driver.refresh()
    page.until(lambda: page.text("#models").startswith("reverse"))


def test_without_a_forward_model_rank_uses_the_reverse_one_and_compare_says_what_is_missing(page: Page, lone: Served) -> None:
    page.open(lone.url, "rank")
    page.until(lambda: page.one("#key-value").is_displayed())
    page.fill("#key-value", "right key")
    page.press(ENTER)
    page.until(lambda: page.text("#models").startswith("reverse"))
    score(page, PROMPT, ANSWERS)
    page.until(lambda: page.all(".shade"))
    assert page.problems() == []
    headers = {"Authorization": "Bearer right key"}
    body = {"prompt": PROMPT, "candidates": ANSWERS, "weight": 1}
    assert order_of(page) == lone.post("/v1/reward", body, headers=headers).json()["order"]
    assert not page.one("#weight").is_enabled()
    assert "--forward DIR" in page.text("#weight-ends")
    assert not page.one("#sample-run").is_enabled()
    page.click("#tab-compare")
    assert "--forward DIR" in page.text("#compare-needs")
    assert not page.one("#compare-form .primary").is_enabled()


def test_a_server_that_is_gone_is_named_and_the_text_stays(page: Page, folders: tuple[Path, Path]) -> None:
    with serving("--reverse", folders[1]) as server:
        page.open(server.url)
        write(page, max_tokens=450, n=1)
        page.until(lambda: page.all(".written") and page.text(".written"))
        server.end(signal.SIGKILL)
        page.until(lambda: is_idle(page, "write"))
        assert page.text(".state") == "broken off"
        assert page.text(".written")
        assert "Is it still running?" in page.problems()[0]
        write(page, max_tokens=2, n=1)
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
    score(page, PROMPT, ANSWERS)
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
    score(page, PROMPT, ANSWERS)
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


def test_a_narrow_window_never_scrolls_sideways(page: Page, served: Served) -> None:
    size = {"width": 375, "height": 800, "deviceScaleFactor": 1, "mobile": True}
    page.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    try:
        page.open(served.url)
        write(page, suffix="a" * 300, max_tokens=8, n=2)
        page.until(lambda: is_idle(page, "write") and page.all(".alternative"))
        page.click("#tab-rank")
        score(page, "x" * 200, ["y" * 200, " b"])
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
    finally:
        page.driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
